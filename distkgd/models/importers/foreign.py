"""What an importer makes of another library's files: rows and constants in this library's layout, not yet written."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.data.triples import read_numbered
from distkgd.distributed.finite import broken_row
from distkgd.errors import DataError, ModelError, UnsupportedError
from distkgd.models.model_folder import told
from distkgd.scorers import Scorer
from distkgd.scorers.interleaved import join_pairs

T = TypeVar("T")
Table = Literal["entity", "relation"]
Layout = Literal["interleaved", "halves"]
KEPT = "training_triples"  # the folder in which PyKEEN keeps names and triples
NAME_FILES = {
    "entities": (f"{KEPT}/entity_to_id.tsv.gz", "entities.tsv", "entities.dict", "entity_ids.del"),
    "relations": (f"{KEPT}/relation_to_id.tsv.gz", "relations.tsv", "relations.dict", "relation_ids.del"),
}
ROWS_AT_ONCE = 1 << 14
CHECKED = 256  # triples whose scores are compared


@dataclass(frozen=True)
class Given:
    """What the user says of a model beside where it lies; None: what its files say.

    layout: of complex numbers and other pairs of vectors: (re, im, re, im, …) or all re before all im.
    names: the folder of the files with names; None: beside the tables.
    trust_pickle: run what a pickle says, which can be anything.
    """

    scorer: str | None = None
    margin: float | None = None
    norm: int | None = None
    layout: Layout | None = None
    names: Path | None = None
    trust_pickle: bool = False

    def folders(self, *beside: Path) -> tuple[Path, ...]:
        """Where names may be: in the folder that the user says, else in these, the first one first."""
        return beside if self.names is None else (self.names,)


@dataclass(frozen=True)
class Foreign:
    """A model of another library.

    files: where the two tables lie, for messages.
    names: of entities and of relations.
    entity: [entities, scorer.entity_size], in memory or mapped: only the rows that are asked for are read.
    relation: [relations, scorer.relation_size], with `reciprocal` twice as many, the inverse ones last.
    halves: pairs of numbers lie in halves, all first ones before all second ones. turn: makes phases of relations.
    original: [n, 3] int64 triples -> [n] scores as the library itself computes them, where it is at hand.
    unchecked: what to say where it is not.
    trained: reads the names (head, relation, tail) of the triples that it was trained on, where its files keep them.
    """

    library: str
    scorer: Scorer
    files: tuple[Path, Path]
    names: tuple[pl.Series, pl.Series]
    entity: Tensor
    relation: Tensor
    reciprocal: bool = False
    halves: bool = False
    turn: float = 1.0
    original: Callable[[Tensor], Tensor] | None = None
    trained: Callable[[], pl.DataFrame] | None = None
    unchecked: str = "it is not at hand; the formula is that of its documentation"

    def __post_init__(self) -> None:
        (rows, width), scorer, relations = self.relation.shape, self.scorer, len(self.names[1])
        entities_fit = self.entity.shape[1] == scorer.entity_size
        if not entities_fit or width != scorer.relation_size:
            raise ModelError(
                f"{self.files[entities_fit]}: relations of {width} numbers, beside {self.entity.shape[1]} per entity, "
                f"do not fit {scorer}, which needs {scorer.relation_size} beside {scorer.entity_size}."
            )
        if rows != relations * (2 if self.reciprocal else 1):
            each = "two rows each, the inverse ones last" if self.reciprocal else "one row each"
            raise ModelError(f"{self.files[1]}: {rows:,} rows do not fit {relations:,} relations with {each}.")

    def rows(self, table: Table, ids: Tensor) -> Tensor:
        """[k, size] rows of a table in this library's layout."""
        rows = (self.entity if table == "entity" else self.relation)[ids]
        if self.halves and in_pairs(self.scorer.name, table):
            rows = join_pairs(*rows.chunk(2, -1))
        return rows * self.turn if table == "relation" and self.turn != 1.0 else rows

    def finite_rows(self, table: Table, ids: Tensor) -> Tensor:
        """`rows` in the dtype of entities; ModelError names the first one that holds NaN or an infinity."""
        rows = self.rows(table, ids).to(self.entity.dtype)
        if (broken := broken_row(table, rows)) is not None:
            found = told(broken._replace(row=int(ids[broken.row])), *map(Vocabulary, self.names))
            raise ModelError(
                f"{self.files[table == 'relation']}: {found}; such a model has no scores, and is not imported. Take "
                "one whose training has not diverged."
            )
        return rows

    def check(self) -> str:
        """A line: the largest difference between the library's own scores and ours, of triples drawn at random.

        Raises ModelError where it is more than 1e-5 (of scores beyond 1: relative), and for rows that are not finite.
        """
        if self.original is None:
            return f"{self.library}: {self.unchecked}"
        entities, relations = map(len, self.names)
        sizes = torch.tensor([entities, relations, entities])
        triples = (torch.rand(CHECKED, 3, generator=torch.Generator().manual_seed(0)) * sizes).long()
        h, r, t = triples.unbind(1)
        ours = self.scorer.score(self.rows("entity", h), self.rows("relation", r), self.rows("entity", t)).double()
        theirs = self.original(triples).double()
        apart = float(((theirs - ours).abs() / theirs.abs().clamp_min(1.0)).max())
        if math.isnan(apart):
            for block in torch.arange(entities).split(ROWS_AT_ONCE):
                self.finite_rows("entity", block)
            self.finite_rows("relation", torch.arange(len(self.relation)))
        if not apart <= 1e-5:
            raise ModelError(
                f"{self.library} scores its triples otherwise than {self.scorer} does (by up to {apart:.2g}); it "
                "computes another formula than it seems to, and is not imported."
            )
        return f"{CHECKED} triples score as in {self.library} (largest difference {apart:.1g})"


def counterpart(model: str, known: Mapping[str, T], path: Path) -> T:
    """What another library's `model` is here; UnsupportedError where it is nothing."""
    if model not in known:
        raise UnsupportedError(f"{path}: {model} has no counterpart here; supported are {', '.join(known)}.")
    return known[model]


def in_pairs(scorer: str, table: Table) -> bool:
    """Whether a table's columns are pairs of numbers, which libraries store in halves."""
    return scorer in (("complex", "rotate", "simple", "cp") if table == "entity" else ("complex", "simple", "pairre"))


def open_array(path: Path) -> Tensor:
    """[rows, columns] of a .npy file, mapped, not read; ModelError when it is damaged or something else."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)  # "c" would claim as much memory as the file is long
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that such a tensor must not be written to
            found = torch.from_numpy(rows)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ModelError(f"{path}: missing, truncated, or no .npy file of numbers: {error}.") from None
    return table_of(found, path)


def table_of(found: Tensor, path: Path) -> Tensor:
    """[rows, columns] of what is in a file; ModelError when it is no table of numbers."""
    if found.ndim < 2 or not found.is_floating_point():
        raise ModelError(f"{path} holds {found.dtype} {list(found.shape)}; expected a table of floating-point rows.")
    return found.flatten(1)


def read_names(
    folders: Sequence[Path], entities: int, relations: int, halves: bool = False
) -> tuple[pl.Series, pl.Series]:
    """Names of as many entities and relations: lines `id<TAB>name`, in any order, of the first of NAME_FILES there is.

    folders: the first one first. halves: there may be half as many relations, where every one has an inverse.
    """

    def table(kind: str) -> Path:
        for path in (folder / name for folder in folders for name in NAME_FILES[kind]):
            if path.is_file():
                return path
        raise ModelError(
            f"no names of {kind} in {' or '.join(map(str, folders))}; looked for {', '.join(NAME_FILES[kind])}, with a "
            "line `id<TAB>name` per row. Put them there, or say where they are: distkgd import --names FOLDER."
        )

    return names_of_table(table("entities"), entities), names_of_table(table("relations"), relations, halves)


def names_of_table(path: Path, number: int, halves: bool = False) -> pl.Series:
    """[number] names by id of a table of ids and names, PyKEEN's with a header; ModelError names what is wrong."""
    try:
        frame = read_numbered(path, header=path.parent.name == KEPT).sort("id")
    except DataError as error:
        raise ModelError(f"{error}.") from None
    if halves and 2 * len(frame) == number:
        number = len(frame)
    if frame["id"].to_list() != list(range(number)):
        raise ModelError(f"{path} has {len(frame):,} rows or other ids than 0 … {number - 1:,}, which the model has.")
    return frame["name"]
