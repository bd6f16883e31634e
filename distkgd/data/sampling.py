"""Batches and negatives as pure functions of (seed, step): any rank, any world size, any restart sees the same ones.

Step s trains on positions s*B … (s+1)*B - 1 of the stream of shuffled passes over the training triples, so every
batch is full and every pass visits each triple once, but for those that it leaves out for a method's quizzes.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.data.filters import KnownAnswers, Queries, both_sides, spread
from distkgd.data.relations import per_relation
from distkgd.errors import ConfigError
from distkgd.kernels.triton import draws, runtime

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


@dataclass(frozen=True)
class LeftOut:
    """Triples that a pass over the training triples leaves out.

    share: of all, rounded up; one always stays. anew: others in every pass; else always the same ones.
    """

    share: float = 0.0
    anew: bool = False


class Shuffled:
    """Passes over items in a new order each, put into one endless stream.

    total: all items; num: those of one pass. key: tells streams of one seed apart.
    """

    def __init__(self, total: int, seed: int, key: int, device: torch.device, left_out: LeftOut = LeftOut()) -> None:
        self._total, self._seed, self._key, self._device = total, seed, key, device
        self._anew = left_out.anew
        self.num = max(total - math.ceil(left_out.share * total), min(1, total))
        self._turns: dict[int, Tensor] = {}

    def take(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64: items at positions start … stop - 1."""
        n = self.num
        first, last = start // n, (stop - 1) // n
        self._turns = {k: v for k, v in self._turns.items() if first <= k <= last}
        parts = [self._turn(k)[:n][max(start - k * n, 0) : stop - k * n] for k in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def left(self, turn: int) -> Tensor:
        """[total - num] int64: items that pass number `turn` leaves out."""
        return self._turn(turn)[self.num :]

    def _turn(self, turn: int) -> Tensor:
        # [total] int64: one pass, then what it leaves out.
        if turn not in self._turns:
            if self._anew or self.num == self._total:
                order = self._order(turn, self._total)
            else:
                fixed = random.bits(self._seed, Stream.QUIZ, self._key, torch.arange(self._total, device=self._device))
                kept, left = torch.sort(fixed, stable=True).indices.split([self.num, self._total - self.num])
                order = torch.cat([kept[self._order(turn, self.num)], left])
            self._turns[turn] = order
        return self._turns[turn]

    def _order(self, turn: int, num: int) -> Tensor:
        return random.permutation(self._seed, turn, num, self._device, key=self._key)


class Balanced:
    """Batches with equally many triples from each (shard of the head, shard of the tail) pair (BESS, arXiv 2211.12281).

    A batch is laid out by the rank of the head, then by that of the tail: each rank gets the triples whose heads it
    owns, and asks every other rank for the same number of tails. The effect on the sampling: every pair of shards is
    visited equally often, so that a triple's frequency is inversely proportional to how many triples share its pair.

    cuts: [world + 1] first entity of each shard. parts: into which a batch is cut, each of them balanced.
    batch_size: a multiple of parts x world x world (`stages.check_balanced` refuses others).
    """

    def __init__(self, train: Tensor, cuts: list[int], batch_size: int, parts: int, seed: int) -> None:
        world = len(cuts) - 1
        self.world, self.parts = world, parts
        self.per_pair, rest = divmod(batch_size, parts * world * world)
        assert self.per_pair and not rest, batch_size
        edges = torch.tensor(cuts[1:-1], device=train.device)
        shards = torch.searchsorted(edges, train[:, [0, 2]].contiguous(), right=True)
        pair = shards[:, 0] * world + shards[:, 1]
        self.sizes: list[int] = torch.bincount(pair, minlength=world * world).tolist()
        if not all(self.sizes):
            head, tail = divmod(self.sizes.index(0), world)
            raise ConfigError(
                f"balanced: no training triple has its head on rank {head} and its tail on rank {tail}; "
                "use fewer ranks or balanced=false."
            )
        self._members = torch.sort(pair, stable=True).indices.split(self.sizes)
        self._streams = [Shuffled(n, seed, i + 1, train.device) for i, n in enumerate(self.sizes)]

    def rows(self, step: int) -> Tensor:
        """[batch_size] int64: the triples of `step`: part by part, in each by shard of the head, then of the tail."""
        k = self.per_pair
        found = [
            members[stream.take(step * k * self.parts, (step + 1) * k * self.parts)]
            for members, stream in zip(self._members, self._streams, strict=True)
        ]
        return torch.stack(found).reshape(-1, self.parts, k).transpose(0, 1).reshape(-1)


class Sampler:
    """Draws batches and negatives.

    train: [n, 3] int64.
    sides: "both" asks for tail and head of every triple; "uniform" draws one of them evenly; "bernoulli" corrupts
        the head with probability tph / (tph + hpt) (Wang et al., AAAI 2014, sec. 3).
    balanced: which triples make a batch, in place of shuffled passes. left_out: what passes leave for `quizzes`.
    """

    def __init__(
        self,
        train: Tensor,
        num_entities: int,
        num_relations: int,
        *,
        batch_size: int,
        sides: Sides,
        seed: int,
        balanced: Balanced | None = None,
        left_out: LeftOut = LeftOut(),
    ) -> None:
        stream = Shuffled(len(train), seed, 0, train.device, left_out)
        if batch_size < 1 or batch_size > max(1, stream.num):
            raise ConfigError(
                f"batch_size={batch_size} does not fit {stream.num} training triples; choose 1 … {stream.num}."
            )
        self.train = train
        self.num_entities = num_entities
        self.batch_size = batch_size
        self.sides = sides
        self.seed = seed
        self.balanced = balanced
        self._stream = stream
        self._pass_batch: int | None = None  # of quizzes: size of the batches beside them
        self._head_probability: Tensor | None = None
        if sides == "bernoulli":
            heads, tails = per_relation(train, num_relations)
            self._head_probability = tails / (tails + heads).clamp(min=1e-12)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training triples, rounded up."""
        return -(-self._stream.num // self.batch_size)

    @property
    def num_left_out(self) -> int:
        """Triples that each pass leaves out."""
        return len(self.train) - self._stream.num

    def quizzes(self, batch_size: int) -> "Sampler":
        """Batches of triples that are left out of the pass in which a step begins: over and over, in their order."""
        if not 1 <= batch_size <= self.num_left_out:
            raise ConfigError(
                f"quizzes of {batch_size} triples: passes leave out {self.num_left_out}; choose at most that."
            )
        quizzes = copy(self)
        quizzes._pass_batch, quizzes.batch_size = self.batch_size, batch_size
        return quizzes

    def batch(self, step: int) -> Batch:
        """The whole global batch of `step`."""
        triples = self.train[self._rows(step)]
        sides = 2 if self.sides == "both" else 1
        return Batch(step, self.batch_size, 0, triples, sides, self._queries(triples, step))

    def _rows(self, step: int) -> Tensor:
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        if self._pass_batch is not None:
            left = self._stream.left(step * self._pass_batch // self._stream.num)
            return left[torch.arange(start, stop, device=left.device) % len(left)]
        return self._stream.take(start, stop) if self.balanced is None else self.balanced.rows(step)

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

    def negatives(
        self,
        step: int,
        num: int,
        first_group: int = 0,
        groups: int = 1,
        cuts: Sequence[int] | None = None,
        stream: Stream = Stream.NEGATIVES,
    ) -> Tensor:
        """[groups, num] int64: a uniform sample (with replacement) for each group of queries, numbered globally.

        cuts: equally many entities cuts[i] … cuts[i + 1] - 1 for each i, in this order; None: of all.
        stream: what they are drawn for.
        """
        cuts, device = cuts or (0, self.num_entities), self.train.device
        if len(cuts) == 2 and runtime.chosen(device, torch.float32):
            key, first = random.key_of(self.seed, stream, step), first_group * num
            drawn = draws.integers(key, random.FACTORS, first, groups * num, cuts[0], cuts[1], device)
            return drawn.reshape(groups, num)
        index = torch.arange(first_group * num, (first_group + groups) * num, device=device)
        index = index.reshape(groups, len(cuts) - 1, num // (len(cuts) - 1))
        each = [
            random.integers(self.seed, stream, step, index[:, i], hi - lo) for i, (lo, hi) in enumerate(pairwise(cuts))
        ]
        moved = [ids + lo if lo else ids for ids, lo in zip(each, cuts, strict=False)]
        return moved[0] if len(moved) == 1 else torch.cat(moved, 1)


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
    if candidates is None and known is not None and (lo, hi) == (0, known.num_entities):
        slot = entity
    elif candidates is None:
        inside = (entity >= lo) & (entity < hi)
        query, slot = query[inside], entity[inside] - lo
    else:
        # A candidate drawn twice stands in two slots: expand each pair over all of them.
        first, last = (torch.searchsorted(candidates, entity, right=right) for right in (False, True))
        which, slot = spread(first, last)
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
    code = code + negatives.unsqueeze(1)
    query, entity = known.pairs(queries)
    # Looked for among the sorted ones, below which -1 stands: torch.isin would make the host of a GPU wait.
    listed = torch.cat([query.new_full((1,), -1), query * num_entities + entity]).sort().values
    return own | (listed[torch.searchsorted(listed, code, right=True) - 1] == code)
