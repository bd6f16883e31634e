"""A file of triples as a data set: train, valid and test, drawn by seed, and what of the held-out triples leaks.

A triple is held out only if train keeps one for each of its entities and its relation: in the drawn order, the first
triple of every word stays. The order is drawn over the sorted distinct triples, so that neither the order of the
lines nor doubled lines change the split.

A held-out triple leaks where train says the same in other words: (a, parent_of, b) and (b, child_of, a). Two relations
are twins where most triples of the one are among the other's, as they are or turned round (a relation and itself: it is
symmetric); models look good on such triples without having learnt much (Toutanova & Chen 2015; Dettmers et al. 2018).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from distkgd import random
from distkgd.errors import DataError
from distkgd.graph.one_file import read_triples
from distkgd.graph.triples import COLUMNS, SPLITS, Graph, Vocabulary, assemble_rows, encode, shorten, sorted_unique
from distkgd.paths import AnyPath
from distkgd.random import Stream

HELD_OUT = 0.05  # of the triples for valid, and again for test
MOST_HELD_OUT = 10_000  # for each: more make figures slower, hardly surer
FEW_HELD_OUT = 100
TWINS = 0.8  # of a relation's triples, from which on its twin is told
LEAST_TWINS = 5  # triples of a relation that its twin has: of fewer nothing follows
TWINS_SHOWN = 3
ABOUT = "split.json"


@dataclass(frozen=True)
class Twin:
    """share of the triples of `relation` are triples of `of` too, turned round if `turned`."""

    relation: str
    of: str
    turned: bool
    share: float


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
        sizes = {split: self.files[split].count(b"\n") for split in SPLITS}
        told = {"source": self.source, "source_sha256": self.source_sha256, "sha256": self.graph.sha256}
        how = {"seed": self.seed, "allow_unseen": self.allow_unseen, "triples": sizes, "notes": list(self.notes)}
        return told | how | {"leaks": self.leaks, "twins": [asdict(twin) for twin in self.twins]}


def split_file(path: AnyPath, name: str, *, seed: int = 0, allow_unseen: bool = False) -> Split:
    """Read one file of triples and draw a data set called `name` from it; nothing is written.

    allow_unseen: held-out triples may hold entities that train lacks (never relations).
    Raises DataError for what is no file of triples, and where fewer than two triples can be held out.
    """
    path = Path(path)
    frame, notes = read_triples(path)
    distinct = frame.unique().sort(COLUMNS)
    if doubled := len(frame) - len(distinct):
        notes.append(f"{doubled:,} of {len(frame):,} triples were there before; the repeats were dropped")
    entities = sorted_unique([distinct["head"], distinct["tail"]])
    relations = sorted_unique([distinct["relation"]])
    triples = encode(distinct, entities, relations)
    parts = draw(triples, len(entities), len(relations), seed=seed, allow_unseen=allow_unseen, where=str(path))
    if len(parts["test"]) < FEW_HELD_OUT:
        held = f"{len(parts['valid']):,} and {len(parts['test']):,}"
        notes.append(f"valid and test have {held} triples: figures of so few move by chance")
    files = {split: _tsv(distinct, parts[split]) for split in SPLITS}
    digest = hashlib.sha256(b"".join(files[split] for split in SPLITS)).hexdigest()
    rows = {split: triples[parts[split]] for split in SPLITS}
    found = twins_of(triples, len(relations))
    leaks = {split: int(leaking(rows[split], rows["train"], found).sum()) for split in SPLITS[1:]}
    named = [Twin(relations[a], relations[b], turned, share) for (a, b, turned), share in found.items()]
    named.sort(key=lambda twin: (-twin.share, twin.relation, twin.of))
    notes += told_leaks(leaks, {split: len(rows[split]) for split in SPLITS}, named)
    graph = assemble_rows(name, rows, Vocabulary(entities), Vocabulary(relations), digest)
    with path.open("rb") as file:
        source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Split(graph, files, seed, allow_unseen, str(path), source_sha256, tuple(notes), leaks, tuple(named))


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


def twins_of(triples: Tensor, num_relations: int) -> dict[tuple[int, int, bool], float]:
    """(relation, twin, turned round) -> share of the relation's triples ([n, 3], distinct) that the twin has too."""
    size = torch.bincount(triples[:, 1], minlength=num_relations).tolist()
    frame = pl.DataFrame(triples.numpy(), schema=list(COLUMNS), orient="row")
    found: dict[tuple[int, int, bool], float] = {}
    for turned in (False, True):
        others = (
            frame.select(head="tail", other="relation", tail="head") if turned else frame.rename({"relation": "other"})
        )
        met = frame.filter(pl.col("head") != pl.col("tail")).join(others, on=["head", "tail"])
        if not turned:
            met = met.filter(pl.col("relation") != pl.col("other"))
        for a, b, number in met.group_by("relation", "other").len().iter_rows():
            if number >= max(LEAST_TWINS, TWINS * size[a]):
                found[a, b, turned] = number / size[a]
    return found


def leaking(held_out: Tensor, train: Tensor, twins: dict[tuple[int, int, bool], float]) -> Tensor:
    """[n] bool: whether train ([m, 3]) has the twin of each triple of `held_out` ([n, 3])."""
    leaks = torch.zeros(len(held_out), dtype=torch.bool)
    if not twins:
        return leaks
    schema = list(COLUMNS)
    known = pl.DataFrame(train.numpy(), schema=schema, orient="row")
    mine = pl.DataFrame(held_out.numpy(), schema=schema, orient="row").with_row_index("row")
    pairs = pl.DataFrame(list(twins), schema=["relation", "other", "turned"], orient="row")
    asked = mine.join(pairs, on="relation").select(
        "row",
        pl.when("turned").then("tail").otherwise("head").alias("head"),
        pl.col("other").alias("relation"),
        pl.when("turned").then("head").otherwise("tail").alias("tail"),
    )
    rows = asked.join(known, on=schema, how="semi")["row"].unique()
    leaks[torch.from_numpy(rows.to_numpy().astype("int64"))] = True
    return leaks


def told_leaks(leaks: dict[str, int], sizes: dict[str, int], twins: list[Twin]) -> Iterator[str]:
    """One sentence, where there is anything to tell."""
    if not any(leaks.values()):
        return
    held = ", ".join(f"{split} {number:,} of {sizes[split]:,}" for split, number in leaks.items())
    shown = "; ".join(_told(twin) for twin in twins[:TWINS_SHOWN])
    more = f"; and {len(twins) - TWINS_SHOWN} more in {ABOUT}" if len(twins) > TWINS_SHOWN else ""
    yield (
        f"leakage: held-out triples that train says in other words: {held} ({shown}{more}). "
        "They flatter every model; for a stricter test remove one relation of each pair, and one direction of "
        "symmetric ones"
    )


def _first(words: Tensor, places: Tensor, number: int) -> Tensor:
    # [number] the lowest of `places` at which each word stands.
    found = torch.full((number,), int(places.max()) + 1)
    return found.scatter_reduce_(0, words, places, "amin")


def _tsv(frame: pl.DataFrame, rows: Tensor) -> bytes:
    text = frame[rows.numpy()].write_csv(include_header=False, separator="\t", quote_style="never")
    return text.encode()


def _told(twin: Twin) -> str:
    relation, share = shorten(twin.relation, 40), f"{100 * twin.share:.0f}%"
    if twin.relation == twin.of:
        return f"{relation!r} is symmetric in {share} of its triples"
    return f"{relation!r} is {shorten(twin.of, 40)!r}{' turned round' if twin.turned else ''} in {share} of its triples"
