"""Known answers of queries, as sorted keys: which entities complete (anchor, relation, side) to a true triple."""

from typing import NamedTuple

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
    side = torch.arange(2, device=triples.device).expand(len(triples), 2)
    return Queries(
        torch.stack([head, tail], 1).reshape(-1),
        relation.repeat_interleave(2),
        side.reshape(-1),
        torch.stack([tail, head], 1).reshape(-1),
    )


class KnownAnswers:
    """Looks up the answers that `triples` ([n, 3] int64) hold for a query, in compressed sparse row form."""

    def __init__(self, triples: Tensor, num_entities: int) -> None:
        queries = both_sides(triples)
        self._num_entities = num_entities
        keys, order = torch.sort(self._keys(queries.anchor, queries.relation, queries.side), stable=True)
        self._keys_sorted, self._answers = keys, queries.answer[order]

    def _keys(self, anchor: Tensor, relation: Tensor, side: Tensor) -> Tensor:
        return (relation * 2 + side) * self._num_entities + anchor

    def counts(self, queries: Queries) -> Tensor:
        """[Q] int64: number of known answers of each query."""
        first, last = self._ranges(queries)
        return last - first

    def pairs(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """([p] query position, [p] entity): every known answer of every query, ordered by query."""
        first, last = self._ranges(queries)
        counts = last - first
        query = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        before = torch.cumsum(counts, 0) - counts
        position = torch.arange(len(query), device=counts.device) - before[query] + first[query]
        return query, self._answers[position]

    def _ranges(self, queries: Queries) -> tuple[Tensor, Tensor]:
        keys = self._keys(queries.anchor, queries.relation, queries.side)
        first = torch.searchsorted(self._keys_sorted, keys)
        return first, torch.searchsorted(self._keys_sorted, keys, right=True)
