"""What an importer makes of another library's files: rows and constants in this library's layout, not yet written."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.distributed.finite import broken_row
from distkgd.errors import ModelError
from distkgd.models.model_folder import told
from distkgd.scorers import Scorer
from distkgd.scorers.interleaved import join_pairs

Rows = Callable[[Tensor], Tensor]
Array = NDArray[np.floating[Any]]
Layout = Literal["interleaved", "halves"]
NAME_FILES = {
    "entities": ("entities.tsv", "entities.dict", "entity_ids.del"),
    "relations": ("relations.tsv", "relations.dict", "relation_ids.del"),
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

    entity: [k] int64 ids -> [k, scorer.entity_size].
    relation: [k] -> [k, scorer.relation_size] of as many rows as relations or, with `reciprocal`, twice as many, the
        inverse ones last.
    original: [n, 3] int64 triples -> [n] scores as the library itself computes them, where it is at hand.
    unchecked: what to say where it is not.
    trained: reads the names (head, relation, tail) of the triples that it was trained on, where its files keep them.
    files: where the two tables lie, for messages.
    """

    library: str
    scorer: Scorer
    reciprocal: bool
    entities: pl.Series
    relations: pl.Series
    entity: Rows
    relation: Rows
    dtype: torch.dtype
    original: Callable[[Tensor], Tensor] | None = None
    trained: Callable[[], pl.DataFrame] | None = None
    unchecked: str = "it is not at hand; the formula is that of its documentation"
    files: tuple[Path, Path] | None = None

    @property
    def num_relation_rows(self) -> int:
        """Rows of the relation table."""
        return len(self.relations) * (2 if self.reciprocal else 1)

    def score(self, triples: Tensor) -> Tensor:
        """[n] scores of [n, 3] triples by this library's formula."""
        h, r, t = triples.unbind(1)
        return self.scorer.score(self.entity(h), self.relation(r), self.entity(t))


def finite_rows(model: Foreign, table: Literal["entity", "relation"], ids: Tensor) -> Tensor:
    """Rows [k] of a table; ModelError names the first one that holds NaN or an infinity."""
    rows = (model.entity if table == "entity" else model.relation)(ids).detach().to(model.dtype)
    if (broken := broken_row(table, rows)) is not None:
        found = told(broken._replace(row=int(ids[broken.row])), Vocabulary(model.entities), Vocabulary(model.relations))
        where = model.files[table == "relation"] if model.files else model.library
        raise ModelError(
            f"{where}: {found}; such a model has no scores, and is not imported. Take one whose training has not "
            "diverged."
        )
    return rows


def check(model: Foreign) -> str:
    """A line: the largest difference between the library's own scores and ours, of triples drawn at random.

    Raises ModelError where it is more than 1e-5 (of scores beyond 1: relative), and for rows that are not finite.
    """
    if model.original is None:
        return f"{model.library}: {model.unchecked}"
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([len(model.entities), len(model.relations), len(model.entities)])
    triples = (torch.rand(CHECKED, 3, generator=generator) * sizes).long()
    theirs, ours = model.original(triples).double(), model.score(triples).double()
    apart = float(((theirs - ours).abs() / theirs.abs().clamp_min(1.0)).max().detach())
    if math.isnan(apart):
        for block in torch.arange(len(model.entities)).split(ROWS_AT_ONCE):
            finite_rows(model, "entity", block)
        finite_rows(model, "relation", torch.arange(model.num_relation_rows))
    if not apart <= 1e-5:
        raise ModelError(
            f"{model.library} scores its triples otherwise than {model.scorer} does (by up to {apart:.2g}); it "
            "computes another formula than it seems to, and is not imported."
        )
    return f"{CHECKED} triples score as in {model.library} (largest difference {apart:.1g})"


def interleaved(rows: Tensor, layout: Layout = "halves") -> Tensor:
    """[..., 2k] (a, b, a, b, …) of rows with all a's before all b's."""
    return join_pairs(*rows.chunk(2, -1)) if layout == "halves" else rows


def in_pairs(scorer: str, table: Literal["entity", "relation"]) -> bool:
    """Whether a table's columns are pairs of numbers, which libraries store in halves."""
    return scorer in (("complex", "rotate", "simple", "cp") if table == "entity" else ("complex", "simple", "pairre"))


def open_array(path: Path) -> Array:
    """[rows, columns] of a .npy file, mapped, not read; ModelError when it is damaged or something else."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path}: missing, truncated, or no .npy file of numbers: {error}.") from None
    if found.ndim < 2 or not np.issubdtype(found.dtype, np.floating):
        raise ModelError(f"{path} holds {found.dtype} {list(found.shape)}; expected a table of floating-point rows.")
    table: Array = found.reshape(len(found), -1)
    return table


def rows_of_array(array: Array, change: Callable[[Tensor], Tensor]) -> Rows:
    """Rows of a mapped array, changed by `change`; only those that are asked for are read."""
    return lambda ids: change(torch.from_numpy(np.ascontiguousarray(array[ids.numpy()])))


def read_names(
    folders: Sequence[Path], kind: Literal["entities", "relations"], number: int, halves: bool = False
) -> pl.Series:
    """[number] names of the `id<TAB>name` lines, in any order, of the first of NAME_FILES in the first of `folders`."""
    paths = [folder / name for folder in folders for name in NAME_FILES[kind] if (folder / name).is_file()]
    if not paths:
        raise ModelError(
            f"no names of {kind} in {' or '.join(map(str, folders))}; looked for {', '.join(NAME_FILES[kind])}, with a "
            "line `id<TAB>name` per row. Put them there, or say where they are: launch/import.py --names FOLDER."
        )
    return names_of_table(paths[0], number, ("id", "name"), halves=halves)


def names_of_table(
    path: Path, number: int, columns: tuple[str, str], header: bool = False, halves: bool = False
) -> pl.Series:
    """[number] names by id of a table of ids and names, in the order of `columns`; ModelError names what is wrong.

    halves: there may be half as many, where every relation has an inverse.
    """
    types = {"id": pl.Int64, "name": pl.String}
    quote = '"' if header else None
    try:
        frame = pl.read_csv(
            path.read_bytes(),
            separator="\t",
            has_header=header,
            new_columns=list(columns),
            schema_overrides=[types[column] for column in columns],
            quote_char=quote,
        ).sort("id")
    except (OSError, pl.exceptions.PolarsError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ModelError(f"{path} is no table of {columns[0]} and {columns[1]}: {reason}.") from None
    if halves and 2 * len(frame) == number:
        number = len(frame)
    if frame["id"].to_list() != list(range(number)):
        raise ModelError(f"{path} has {len(frame):,} rows or other ids than 0 … {number - 1:,}, which the model has.")
    return frame["name"]
