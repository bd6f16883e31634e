"""Which held-out triples train says in other words: (a, parent_of, b) and (b, child_of, a).

Two relations are twins where most triples of the one are among the other's, as they are or turned round (a relation and
itself: it is symmetric); models look good on such triples without having learnt much (Toutanova & Chen 2015; Dettmers
et al. 2018). Every graph is looked through when it is read, so nothing here grows with its square: triples are met by
their pair of entities, of which a small table of bits tells most that nobody asked for, and a large relation's share is
that of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from distkgd.errors import shorten

TWINS = 0.8  # of a relation's triples, from which on its twin is told
LEAST_TWINS = 5  # triples of a relation that its twin has: of fewer nothing follows
TWINS_SHOWN = 3
SAMPLED = 2000  # triples of a relation: of so many a share of 0.8 is known to 0.01
SAMPLED_IN_ALL, LEAST_SAMPLED = 200_000, 50
NAME_SHOWN = 40  # letters
_BLOCK = 1 << 20
_BITS = 24  # of a pair's place in the table: it stays in the cache
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # Fibonacci hashing: 2^64 over the golden ratio, as int64


@dataclass(frozen=True)
class Twin:
    """share of the triples of `relation` are triples of `of` too, turned round if `turned`."""

    relation: str
    of: str
    turned: bool
    share: float

    def __str__(self) -> str:
        relation, of = (shorten(name, NAME_SHOWN) for name in (self.relation, self.of))
        share = f"in {100 * self.share:.0f}%"
        if self.relation == self.of:
            return f"{relation!r} is symmetric {share} of its triples"
        return f"{relation!r} is {of!r}{' turned round' if self.turned else ''} {share} of its triples"


@dataclass(frozen=True)
class Leaks:
    """counts: held-out split -> (how many of its triples leak, of how many). twins: the relations behind that."""

    counts: dict[str, tuple[int, int]]
    twins: tuple[Twin, ...]

    def __str__(self) -> str:
        """One sentence; empty where nothing leaks."""
        if not any(number for number, _ in self.counts.values()):
            return ""
        held = ", ".join(f"{split} {number:,} of {size:,}" for split, (number, size) in self.counts.items())
        shown = "; ".join(map(str, self.twins[:TWINS_SHOWN]))
        more = f"; and {len(self.twins) - TWINS_SHOWN} more such pairs" if len(self.twins) > TWINS_SHOWN else ""
        return (
            f"leakage: held-out triples that train says in other words: {held} ({shown}{more}). "
            "They flatter every model; for a stricter test remove one relation of each pair, and one direction of "
            "symmetric ones"
        )


def find_leaks(splits: Mapping[str, Tensor], names: pl.Series) -> Leaks:
    """What of the held-out splits train says in other words.

    splits: train, valid and test, [n, 3] int64 each. names: of the relations.
    """
    held = {split: rows for split, rows in splits.items() if split != "train"}
    met = partners(torch.cat(list(held.values())), [splits["train"]])
    twins = _twin_shares(list(splits.values()), len(names), met["relation"].unique().to_list()) if len(met) else {}
    schema = {"relation": pl.Int64, "other": pl.Int64, "turned": pl.Boolean}
    leaking = met.join(pl.DataFrame(list(twins), schema=schema, orient="row"), on=list(schema), how="semi")["row"]
    counts, first = {}, 0
    for split, rows in held.items():
        here = leaking.is_between(first, first + len(rows), closed="left")
        counts[split] = leaking.filter(here).n_unique(), len(rows)
        first += len(rows)
    named = [Twin(names[a], names[b], turned, share) for (a, b, turned), share in twins.items()]
    return Leaks(counts, tuple(sorted(named, key=lambda twin: (-twin.share, twin.relation, twin.of, twin.turned))))


def partners(asked: Tensor, parts: Sequence[Tensor]) -> pl.DataFrame:
    """Columns row, relation, other, turned: the triples of `parts` that hold the two entities of a triple of `asked`.

    asked: [n, 3]; row: of it. parts: [m, 3] each. No triple is met by itself.
    """
    table = torch.zeros(1 << _BITS, dtype=torch.bool)
    table[_places(asked)] = True
    hits = [block[table[_places(block)]] for part in parts for block in part.split(_BLOCK)]
    mine = _frame(asked, "relation").with_row_index("row").with_columns(loop=pl.col("head") == pl.col("tail"))
    theirs = _frame(torch.cat([asked[:0], *hits]), "other")
    found = []
    for turned, ends in ((False, ["head", "tail"]), (True, ["tail", "head"])):
        met = mine.join(theirs, left_on=["head", "tail"], right_on=ends)
        met = met.filter((pl.col("relation") != pl.col("other")) | (pl.lit(turned) & ~pl.col("loop")))
        found.append(met.select("row", "relation", "other", pl.lit(turned).alias("turned")))
    return pl.concat(found).unique()


def _places(triples: Tensor) -> Tensor:
    # [n]: where a pair of entities stands in the table, whichever of them is the head; below 0: from its end.
    return (triples[:, 0] * triples[:, 2]).mul_(_ODD).bitwise_right_shift_(64 - _BITS)


def _twin_shares(parts: Sequence[Tensor], num_relations: int, of: Sequence[int]) -> dict[tuple[int, int, bool], float]:
    # (relation, twin, turned round) -> share of the triples of each relation in `of` that the twin has too, among all
    # in `parts`, where one may be in several. Of a relation of more than SAMPLED triples it is that of about so many.
    asked = _sampled(parts, num_relations, of)
    size = torch.bincount(asked[:, 1], minlength=num_relations).tolist()
    two = asked[asked[:, 0] != asked[:, 2]]  # of an entity with itself no triple says how relations are related
    met = partners(two, parts).group_by("relation", "other", "turned").len()
    return {
        (a, b, turned): number / size[a]
        for a, b, turned, number in met.iter_rows()
        if number >= max(LEAST_TWINS, TWINS * size[a])
    }


def _sampled(parts: Sequence[Tensor], num_relations: int, of: Sequence[int]) -> Tensor:
    # [n, 3]: the triples of some relations, of large ones about SAMPLED, which depend on the graph alone.
    size = torch.stack([torch.bincount(part[:, 1], minlength=num_relations) for part in parts]).sum(0)
    share = torch.zeros(num_relations)
    share[list(of)] = max(LEAST_SAMPLED, min(SAMPLED, SAMPLED_IN_ALL / max(1, len(of))))
    share /= size.clamp(min=1)
    found = [part[:0] for part in parts]
    for seed, block in enumerate(block for part in parts for block in part.split(_BLOCK)):
        drawn = torch.rand(len(block), generator=torch.Generator().manual_seed(seed))
        found.append(block[drawn < share[block[:, 1]]])
    return torch.cat(found)


def _frame(triples: Tensor, relation: str) -> pl.DataFrame:
    return pl.DataFrame(triples.numpy(), schema=["head", relation, "tail"], orient="row")
