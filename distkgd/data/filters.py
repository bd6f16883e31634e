"""Known answers of queries, as sorted keys: which entities complete (anchor, relation, side) to a true triple."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Queries(NamedTuple):
    """Link-prediction queries: side 0 asks (anchor, relation, ?), side 1 asks (?, relation, anchor). All [Q] int64."""

    anchor: Tensor
    relation: Tensor
    side: Tensor
    answer: Tensor


def both_sides(triples: Tensor) -> Queries:
    """[2n] queries of [n, 3] triples, triple-major: tail query, head query, tail query, …"""
    head, relation, tail = triples.unbind(1)
    return Queries(
        torch.stack([head, tail], 1).reshape(-1),
        relation.repeat_interleave(2),
        _alternating(len(triples), triples.device),
        torch.stack([tail, head], 1).reshape(-1),
    )


@lru_cache(maxsize=4)
def _alternating(num: int, device: torch.device) -> Tensor:
    # [2 num] int64: 0, 1, 0, 1, …; of every batch of one size.
    return torch.arange(2, device=device).repeat(num)


def spread(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """([p] range, [p] position) of each position in the ranges first … last - 1 ([n] int64), range by range."""
    counts = last - first
    which = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    before = torch.cumsum(counts, 0) - counts
    return which, torch.arange(len(which), device=counts.device) + (first - before)[which]


class KnownAnswers:
    """Looks up the answers that `triples` ([n, 3] int64) hold for a query.

    2n numbers of 12 bytes: the queries' sorted keys (int64), the entities beside them (int32 where they fit).
    num_entities: of the graph.
    """

    def __init__(self, triples: Tensor, num_entities: int) -> None:
        self.num_entities = num_entities
        head, relation, tail = triples.unbind(1)
        keys = torch.cat([self._key(head, relation, 0), self._key(tail, relation, 1)])
        answers = torch.cat([tail, head])
        num_keys = 2 * (int(relation.max()) + 1 if len(triples) else 1) * num_entities
        if num_keys * num_entities < 2**63:
            # Key and answer as one number need no order beside them, and numpy sorts in place and with SIMD: 12 times
            # as fast as torch, in half the memory.
            keys.mul_(num_entities).add_(answers)
            if keys.is_cpu:
                keys.numpy().sort()
            else:
                keys = keys.sort().values
            torch.remainder(keys, num_entities, out=answers)
            torch.div(keys, num_entities, rounding_mode="floor", out=keys)
        else:
            keys, order = torch.sort(keys, stable=True)
            answers = answers[order]
        self._keys, self._answers = keys, answers.int() if num_entities <= 2**31 else answers

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_entities: int) -> Self:
        """The same answers from `tensors` of another object, in the same memory."""
        made = cls.__new__(cls)
        made.num_entities = num_entities
        made._keys, made._answers = tensors["keys"], tensors["answers"]
        return made

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All there is to it but the number of entities."""
        return {"keys": self._keys, "answers": self._answers}

    def counts(self, queries: Queries) -> Tensor:
        """[Q] int64: number of known answers of each query."""
        first, last = self._ranges(queries)
        return last - first

    def pairs(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """([p] query position, [p] entity), int64: every known answer of every query, ordered by query."""
        query, position = spread(*self._ranges(queries))
        return query, self._answers[position].long()

    def _key(self, anchor: Tensor, relation: Tensor, side: Tensor | int) -> Tensor:
        return (relation * 2 + side) * self.num_entities + anchor

    def _ranges(self, queries: Queries) -> tuple[Tensor, Tensor]:
        keys = self._key(queries.anchor, queries.relation, queries.side)
        first = torch.searchsorted(self._keys, keys)
        return first, torch.searchsorted(self._keys, keys, right=True)
