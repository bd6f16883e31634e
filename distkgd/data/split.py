"""A file of triples as a data set: train, valid and test, drawn by seed, and what of the held-out triples leaks.

A triple is held out only if train keeps one for each of its entities and its relation: in the drawn order, the first
triple of every word stays. The order is drawn over the sorted distinct triples, so that neither the order of the
lines nor doubled lines change the split.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.paths import AnyPath
from distkgd.common.random import Stream
from distkgd.data.leaks import Twin, find_leaks
from distkgd.data.reading.folders import read_files, read_folder
from distkgd.data.reading.formats import AS_THEY_ARE, How, check_file
from distkgd.data.triples import COLUMNS, SPLITS, Graph, Vocabulary, assemble, words_of
from distkgd.errors import DataError

HELD_OUT = 0.05  # of the triples for valid, and again for test
MOST_HELD_OUT = 10_000  # for each: more make figures slower, hardly surer
FEW_HELD_OUT = 100


@dataclass(frozen=True)
class Split:
    """A data set that is not on disk yet.

    files: split -> its TSV file. notes: what was skipped or is odd, for people.
    leaks: held-out split -> how many of its triples train says in other words; twins: the relations behind that.
    """

    graph: Graph
    files: dict[str, bytes]
    seed: int
    allow_unseen: bool
    source: str
    source_sha256: str
    notes: tuple[str, ...]
    leaks: dict[str, int]
    twins: tuple[Twin, ...]

    def about(self) -> dict[str, object]:
        """What split.json says."""
        sizes = {split: self.files.get(split, b"").count(b"\n") for split in SPLITS}
        told = {"source": self.source, "source_sha256": self.source_sha256, "sha256": self.graph.sha256}
        how = {"seed": self.seed, "allow_unseen": self.allow_unseen, "triples": sizes, "notes": list(self.notes)}
        return told | how | {"leaks": self.leaks, "twins": [asdict(twin) for twin in self.twins]}


def split_file(path: AnyPath, name: str, *, seed: int = 0, allow_unseen: bool = False, how: How = AS_THEY_ARE) -> Split:
    """Read one file of triples and draw a data set called `name` from it; nothing is written.

    allow_unseen: held-out triples may hold entities that train lacks (never relations). how: what is said of the file.
    Raises DataError for what is no file of triples, and where fewer than two triples can be held out.
    """
    path = Path(path)
    check_file(path)
    found = read_files({"train": path}, how)
    entities, relations, notes = found.entities, found.relations, found.notes
    rows = pl.DataFrame(found.rows["train"].numpy(), schema=COLUMNS)
    distinct = rows.unique().sort(COLUMNS)  # ids follow the names, so this is their order
    if doubled := len(rows) - len(distinct):
        notes.append(f"{doubled:,} of {len(rows):,} triples were there before; the repeats were dropped")
    triples = torch.from_numpy(distinct.to_numpy(order="c"))
    parts = draw(triples, len(entities), len(relations), seed=seed, allow_unseen=allow_unseen, where=str(path))
    if len(parts["test"]) < FEW_HELD_OUT:
        few = f"{len(parts['valid']):,} and {len(parts['test']):,}"
        notes.append(f"valid and test have {few} triples: figures of so few move by chance")
    held = {split: triples[parts[split]] for split in SPLITS}
    files = {split: _tsv(held[split], entities, relations) for split in SPLITS}
    digest = hashlib.sha256(b"".join(files[split] for split in SPLITS)).hexdigest()
    leaked = find_leaks(held, relations)
    notes += filter(None, [str(leaked)])
    leaks = {split: number for split, (number, _) in leaked.counts.items()}
    graph = assemble(name, held, Vocabulary(entities), Vocabulary(relations), digest, leaks=False)
    with path.open("rb") as file:
        source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Split(graph, files, seed, allow_unseen, str(path), source_sha256, tuple(notes), leaks, leaked.twins)


def copy_folder(folder: Path, name: str, how: How) -> Split:
    """A data set with the splits and labels of a folder, read as `how` says; nothing is written."""
    graph = read_folder(folder, name, how=how)
    columns = graph.entities.names, graph.relations.names
    files = {split: _tsv(rows, *columns) for split in SPLITS if len(rows := getattr(graph, split))}
    digest = hashlib.sha256(b"".join(files.values())).hexdigest()
    for kind, stem in ((graph.entities, "names"), (graph.relations, "relation_names")):
        if kind.labels is not None:
            labels = pl.DataFrame({"name": kind.names, "label": kind.labels}).drop_nulls()
            files[stem] = labels.write_csv(include_header=False, separator="\t", quote_style="never").encode()
    made = replace(graph, sha256=digest, warnings=())
    return Split(made, files, 0, True, str(folder), graph.sha256, graph.warnings, {}, ())


def draw(
    triples: Tensor, num_entities: int, num_relations: int, *, seed: int, allow_unseen: bool, where: str
) -> dict[str, Tensor]:
    """split -> ascending positions among distinct `triples` ([n, 3] int64); `where`: their file, for errors."""
    n = len(triples)
    order = torch.sort(random.bits(seed, Stream.SPLIT, 0, torch.arange(n))).indices
    head, relation, tail = triples[order].unbind(1)
    place = torch.arange(n)
    stays = torch.zeros(n, dtype=torch.bool)
    stays[_first(relation, place, num_relations)] = True
    if not allow_unseen:
        stays[_first(torch.cat([head, tail]), torch.cat([place, place]), num_entities)] = True
    free = order[~stays]
    wanted = min(max(1, round(HELD_OUT * n)), MOST_HELD_OUT)
    if len(free) < 2:
        words = "a relation" if allow_unseen else "an entity or a relation"
        cure = "" if allow_unseen else ", or add --allow-unseen to hold out entities that train lacks"
        raise DataError(
            f"{where}: of {n:,} distinct triples {len(free)} can be held out, and it takes two, for valid and test: "
            f"each of the others is the only one left with {words} of its own; add triples{cure}"
        )
    free = free[: 2 * wanted]
    held = {"valid": free[0::2], "test": free[1::2]}
    train = torch.ones(n, dtype=torch.bool)
    train[free] = False
    return {"train": train.nonzero().flatten(), **{split: part.sort().values for split, part in held.items()}}


def _first(words: Tensor, places: Tensor, number: int) -> Tensor:
    # [number] the lowest of `places` at which each word stands.
    found = torch.full((number,), int(places.max()) + 1)
    return found.scatter_reduce_(0, words, places, "amin")


def _tsv(triples: Tensor, entities: pl.Series, relations: pl.Series) -> bytes:
    frame = words_of(triples, entities, relations)
    return frame.write_csv(include_header=False, separator="\t", quote_style="never").encode()
