"""Which numbers of a model's tables are small enough to go, found by counting: no weights leave their shard.

A threshold is the k-th smallest magnitude of all ranks' numbers, exact to the last bit: the bits of a magnitude, read
as a whole number, are ordered as magnitudes are, so counting them 16 at a time over all ranks finds it in four rounds.
Norms of columns are sums of whole numbers. So any number of ranks prunes the same numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks

Scope = Literal["global", "table", "row", "column"]
NUMBERS_AT_ONCE = 1 << 22  # what bounds the temporaries of a pass over a table
_DIGIT = 16  # bits per round


@dataclass(frozen=True)
class Mask:
    """What stays of a model: entity [rows of this shard, dim] bool, relation [rows, relation_size] bool.

    columns: [dim] bool, where whole columns go.
    """

    entity: Tensor
    relation: Tensor
    columns: Tensor | None = None


def num_pruned(rate: float, total: int) -> int:
    """How many of `total` go: rate * total rounded down, with 0.29 * 100 = 29."""
    return math.floor(round(rate * total, 6))


def largest(
    entity: Tensor,
    relation: Tensor,
    rate: float,
    scope: Scope,
    ranks: Ranks,
    unit: int,
    relation_columns: Callable[[Tensor], Tensor],
) -> Mask:
    """What is left when the share `rate` of the numbers, those of least magnitude, goes. All ranks call it.

    Equal magnitudes stay or go together; on a tie fewer than asked for go.

    entity: [rows, dim] this shard. relation: [rows, size] the same on all ranks.
    scope: over both tables together, per table, per row, or whole columns of the entity table by their norm, `unit` of
        them at a time; then `relation_columns` says which columns of the relation table ([size] bool) belong to the
        entity columns that stay ([dim] bool).
    """
    entity, relation = entity.detach(), relation.detach()
    mine = [relation] if ranks.first else []
    match scope:
        case "global":
            at = _threshold([entity, *mine], rate, ranks)
            return Mask(_at_least(entity, at), _at_least(relation, at))
        case "table":
            at = _threshold([entity], rate, ranks)
            return Mask(_at_least(entity, at), _at_least(relation, _threshold(mine, rate, ranks)))
        case "row":
            return Mask(_largest_of_rows(entity, rate), _largest_of_rows(relation, rate))
        case "column":
            kept = _largest_columns(entity, rate, ranks, unit)
            return Mask(kept.expand_as(entity).clone(), relation_columns(kept).expand_as(relation).clone(), kept)


def changed(old: Mask, new: Mask, ranks: Ranks) -> tuple[float, float]:
    """Shares of all ranks' numbers: those that `new` hides, those that it hides and `old` does not, or the reverse."""
    pairs = [(old.entity, new.entity), *([(old.relation, new.relation)] if ranks.first else [])]
    counts = [[y.numel(), int((~y).sum()), int((x != y).sum())] for x, y in pairs]
    total, hidden, differ = ranks.all_reduce(torch.tensor(counts, device=ranks.device).sum(0)).tolist()
    return hidden / total, differ / total


def nth_magnitude(parts: Sequence[Tensor], place: Callable[[int], int], ranks: Ranks) -> float:
    """The magnitude of all ranks' numbers that as many lie below, or beside, as `place` makes of how many there are.

    parts: this rank's numbers, any shapes and float dtypes; each number stands on one rank only.
    """
    total = torch.tensor([sum(part.numel() for part in parts)], device=ranks.device)
    below = place(int(ranks.all_reduce(total)))
    prefix, left = 0, [keys for part in parts for keys in _keys(part)]
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=ranks.device)
        for keys in left:
            counts += torch.bincount((keys >> shift) & ((1 << _DIGIT) - 1), minlength=len(counts))
        upto = ranks.all_reduce(counts).cumsum(0)
        digit = int(torch.searchsorted(upto, below, right=True))
        below -= int(upto[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
        left = [keys[keys >> shift == prefix] for keys in left]
    return float(torch.tensor(prefix).view(torch.float64))


def _threshold(parts: Sequence[Tensor], rate: float, ranks: Ranks) -> float:
    # Numbers at least this large stay.
    return nth_magnitude(parts, lambda total: num_pruned(rate, total), ranks)


def _keys(part: Tensor) -> Iterator[Tensor]:
    # int64 of magnitudes, in their order: the bits of a float64, which holds any narrower number exactly.
    for piece in part.reshape(-1).split(NUMBERS_AT_ONCE):
        yield piece.double().abs().view(torch.int64)


def _rows(table: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = table.split(max(1, NUMBERS_AT_ONCE // max(1, table.shape[1])))
    return pieces


def _at_least(table: Tensor, magnitude: float) -> Tensor:
    # In float64: in the table's own precision the magnitude could be rounded.
    return torch.cat([piece.double().abs() >= magnitude for piece in _rows(table)])


def _largest_of_rows(table: Tensor, rate: float) -> Tensor:
    found = []
    for piece in _rows(table):
        size = piece.double().abs()
        found.append(size >= size.sort(1).values[:, num_pruned(rate, table.shape[1])].unsqueeze(1))
    return torch.cat(found)


def _largest_columns(table: Tensor, rate: float, ranks: Ranks, unit: int) -> Tensor:
    # [dim] bool. Squares as shares of the largest, in whole numbers: their sum has no rounding, in whatever order.
    rows = int(ranks.all_reduce(torch.tensor([len(table)], device=ranks.device)))
    peak = nth_magnitude([table], lambda total: total - 1, ranks)
    bits = 61 - (rows * unit).bit_length()
    sums = torch.zeros(table.shape[1], dtype=torch.int64, device=ranks.device)
    for piece in _rows(table):
        sums += (piece.double() / (peak or 1.0)).square().mul_(2.0 ** min(bits, 52)).round_().long().sum(0)
    units = ranks.all_reduce(sums).reshape(-1, unit).sum(1)
    order = torch.sort(units, stable=True).indices
    kept = torch.ones(len(units), dtype=torch.bool, device=ranks.device)
    kept[order[: num_pruned(rate, len(units))]] = False
    return kept.repeat_interleave(unit)
