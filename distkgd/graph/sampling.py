"""Batches and negatives as pure functions of (seed, step): any rank, any world size, any restart sees the same ones.

Step s trains on positions s*B … (s+1)*B - 1 of the stream of shuffled passes over the training triples, so every
batch is full and every pass visits each triple once.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distkgd import random
from distkgd.errors import ConfigError
from distkgd.graph.filters import KnownAnswers, Queries, both_sides
from distkgd.random import Stream

Kind = Literal["all", "batch", "chunk", "triple"]
Sides = Literal["both", "uniform", "bernoulli"]


@dataclass(frozen=True)
class Batch:
    """A contiguous part of the global batch of one step.

    step: training step.
    size: triples in the global batch; offset: position of our first one in it.
    triples: [b, 3] int64.
    sides: queries per triple, 2 (tail and head) or 1 (a drawn side).
    queries: [b * sides], triple-major.
    answers: [b * sides] number of training answers of each query, or None when not needed.
    """

    step: int
    size: int
    offset: int
    triples: Tensor
    sides: int
    queries: Queries

    @property
    def num_queries(self) -> int:
        """Queries of the *global* batch: what losses are averaged over."""
        return self.size * self.sides

    def query_index(self) -> Tensor:
        """[b * sides] int64: position of each query in the global batch."""
        first = self.offset * self.sides
        return torch.arange(first, first + len(self.queries.anchor), device=self.triples.device)

    def part(self, start: int, stop: int) -> "Batch":
        """The triples start … stop - 1 of this part."""
        lo, hi = start * self.sides, stop * self.sides
        queries = Queries(*(column[lo:hi] for column in self.queries))
        return replace(self, offset=self.offset + start, triples=self.triples[start:stop], queries=queries)


class Sampler:
    """Draws batches and negatives.

    train: [n, 3] int64.
    sides: "both" asks for tail and head of every triple; "uniform" draws one of them evenly; "bernoulli" corrupts
        the head with probability tph / (tph + hpt) (Wang et al., AAAI 2014, sec. 3).
    """

    def __init__(
        self, train: Tensor, num_entities: int, num_relations: int, *, batch_size: int, sides: Sides, seed: int
    ) -> None:
        if batch_size < 1 or batch_size > max(1, len(train)):
            raise ConfigError(
                f"batch_size={batch_size} does not fit {len(train)} training triples; choose 1 … {len(train)}."
            )
        self.train = train
        self.num_entities = num_entities
        self.batch_size = batch_size
        self.sides = sides
        self.seed = seed
        self._order: dict[int, Tensor] = {}
        self._head_probability = _bernoulli(train, num_relations) if sides == "bernoulli" else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training triples, rounded up."""
        return -(-len(self.train) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The whole global batch of `step`."""
        n, size = len(self.train), self.batch_size
        position = torch.arange(step * size, (step + 1) * size, device=self.train.device)
        first, last = step * size // n, ((step + 1) * size - 1) // n
        self._order = {k: v for k, v in self._order.items() if first <= k <= last}
        rows = torch.empty_like(position)
        for epoch in range(first, last + 1):
            if epoch not in self._order:
                self._order[epoch] = random.permutation(self.seed, epoch, n, self.train.device)
            here = (position // n) == epoch
            rows[here] = self._order[epoch][position[here] % n]
        triples = self.train[rows]
        sides = 2 if self.sides == "both" else 1
        return Batch(step, size, 0, triples, sides, self._queries(triples, step))

    def _queries(self, triples: Tensor, step: int) -> Queries:
        if self.sides == "both":
            return both_sides(triples)
        head, relation, tail = triples.unbind(1)
        index = torch.arange(len(triples), device=triples.device)
        draw = random.uniform(self.seed, Stream.SIDE, step, index)
        threshold = 0.5 if self._head_probability is None else self._head_probability[relation]
        side = (draw < threshold).long()
        ask_head = side == 1
        return Queries(torch.where(ask_head, tail, head), relation, side, torch.where(ask_head, head, tail))

    def shared_negatives(self, step: int, num: int) -> Tensor:
        """[num] int64: one uniform sample (with replacement) for the whole global batch."""
        index = torch.arange(num, device=self.train.device)
        return random.integers(self.seed, Stream.NEGATIVES, step, index, self.num_entities)

    def group_negatives(self, step: int, first_group: int, groups: int, num: int) -> Tensor:
        """[groups, num] int64: a uniform sample for each group of queries, numbered globally."""
        group = torch.arange(first_group, first_group + groups, device=self.train.device)
        index = group.unsqueeze(1) * num + torch.arange(num, device=self.train.device)
        return random.integers(self.seed, Stream.NEGATIVES, step, index, self.num_entities)


def excluded_from_shared(
    queries: Queries, candidates: Tensor | None, lo: int, hi: int, known: KnownAnswers | None
) -> tuple[Tensor, Tensor]:
    """([p] query, [p] candidate), by candidate: pairs that are the query's own answer or a known one.

    candidates: [k] int64 global ids of this rank's candidates, ascending; None: entities lo … hi - 1.
    known: answers to leave out beside the query's own.
    """
    query = torch.arange(len(queries.answer), device=queries.answer.device)
    entity = queries.answer
    if known is not None:
        known_query, known_entity = known.pairs(queries)
        query, entity = torch.cat([query, known_query]), torch.cat([entity, known_entity])
    if candidates is None:
        inside = (entity >= lo) & (entity < hi)
        query, slot = query[inside], entity[inside] - lo
    else:
        # A candidate drawn twice stands in two slots: expand each pair over all of them.
        first = torch.searchsorted(candidates, entity)
        counts = torch.searchsorted(candidates, entity, right=True) - first
        before = torch.cumsum(counts, 0) - counts
        which = torch.repeat_interleave(torch.arange(len(entity), device=entity.device), counts)
        slot = torch.arange(len(which), device=entity.device) - before[which] + first[which]
        query = query[which]
    order = torch.sort(slot, stable=True).indices
    return query[order], slot[order]


def excluded_from_groups(queries: Queries, negatives: Tensor, num_entities: int, known: KnownAnswers | None) -> Tensor:
    """[groups, q, N] bool: negatives ([groups, N]) that are the query's own answer or a known one."""
    groups = len(negatives)
    per_group = len(queries.answer) // max(1, groups)
    own = queries.answer.reshape(groups, per_group, 1) == negatives.unsqueeze(1)
    if known is None:
        return own
    code = torch.arange(len(queries.answer), device=negatives.device).reshape(groups, per_group, 1) * num_entities
    query, entity = known.pairs(queries)
    return own | torch.isin(code + negatives.unsqueeze(1), query * num_entities + entity)


def _bernoulli(train: Tensor, num_relations: int) -> Tensor:
    # [num_relations] float64: tph / (tph + hpt), the chance that the head is corrupted.
    def distinct(column: int) -> Tensor:
        pairs = torch.unique(train[:, [1, column]], dim=0)[:, 0]
        return torch.bincount(pairs, minlength=num_relations).double()

    triples = torch.bincount(train[:, 1], minlength=num_relations).double()
    tails_per_head = triples / distinct(0).clamp(min=1)
    heads_per_tail = triples / distinct(2).clamp(min=1)
    return tails_per_head / (tails_per_head + heads_per_tail).clamp(min=1e-12)
