"""Query block by query block: loss and gradient in one visit, where all scores at once would be too many.

A block of queries meets all candidates; its losses are finished, their gradient is taken, and its scores are forgotten
before the next block comes. So nothing is computed twice: a bilinear score costs three products, not the four of
`reduce_over_candidates`, which has to see all candidates before it knows any gradient. What makes this possible is that
the weight of every loss is known in advance. Ranks go through their blocks together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import (
    BLOCK_NUMBERS,
    DEVICE_NUMBERS,
    CandidateLayout,
    PairScores,
    numbers_at_once,
    whole_lanes,
)
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce_over_candidates
from distkgd.kernels.candidates import Candidates, GatheredRows, GradAccumulatingRows, plain
from distkgd.kernels.rows import add, take

# Scores of a block: of each field, and of all its fields together. With fewer queries than the third, matrix products
# lose more than what the second visit costs.
_NUMBERS = {"cpu": 10 * BLOCK_NUMBERS["cpu"]}
_TOGETHER = {"cpu": 20 * BLOCK_NUMBERS["cpu"]}
_FEWEST_QUERIES = 64
# Of a block with many planes: beyond that, candidates are cut too, and visited twice.
_MOST_NUMBERS = 1 << 25


def answer_means(weighted: Mapping[str, tuple[float, LossRequest]], num_queries: int) -> dict[str, Tensor]:
    """[] each: weight * sum of the ask's losses over this rank's queries / num_queries.

    weighted: (weight, ask) by name. num_queries: of the global batch, so that the shares of all ranks add up to its
    weighted mean.
    Each ask's `finish` must make [Q] and may use no [Q] tensors but its `own`. The gradients of the terms must be
    equal: they are to be added up, as the training loop does; second derivatives are not to be had of large batches.
    """
    asks = {name: ask for name, (_, ask) in weighted.items()}
    weights = {name: weight / num_queries for name, (weight, _) in weighted.items()}
    fields = list({id(f): f for ask in asks.values() for f in ask.fields}.values())
    blocks = _number_of_blocks(fields[0], len(fields))
    if blocks == 1 or not torch.is_grad_enabled():
        return {name: _weighted(got, weights[name]) for name, got in reduce_over_candidates(asks).items()}
    batch = _Batch(list(asks.values()), fields, blocks, list(weights.values()))
    terms: Tensor = _Visit.apply(batch, *batch.tensors())  # type: ignore[no-untyped-call]
    return dict(zip(asks, terms.unbind(), strict=True))


def _weighted(losses: Tensor, weight: float) -> Tensor:
    # weight * their sum, on a GPU in one kernel less where that is the mean.
    alone = losses.device.type != "cpu" and weight * losses.numel() == 1.0
    return losses.mean() if alone else weight * losses.sum()


def _number_of_blocks(field: PairScores, num_fields: int) -> int:
    layout, device = field.layout, field.layout.ranks.device
    if layout.groups is not None and field.planes == 1:
        return 1
    met = len(field.queries) if layout.counts is None else sum(layout.counts)
    each = max(1, layout.most_candidates) * field.planes
    if numbers_at_once(met * each, device) >= met * each:
        return 1
    numbers, together = (most.get(device.type, DEVICE_NUMBERS) for most in (_NUMBERS, _TOGETHER))
    limit = min(numbers, together // num_fields)
    if layout.groups is not None:
        # No block is empty on all ranks.
        most = met if layout.counts is None else max(layout.counts)
        return max(1, min(most // layout.group_size(met), -(-met * each // limit)))
    queries = limit // each
    if field.planes > 1 and _FEWEST_QUERIES * each <= _MOST_NUMBERS:
        queries = max(queries, _FEWEST_QUERIES)
    # With a teacher a second visit costs one more product, but the teacher's runs at twice the rate there.
    fewest = _FEWEST_QUERIES * min(2, num_fields)
    return 1 if queries < fewest else -(-met // whole_lanes(queries))


class _Batch:
    """The asks of a step with their tensors laid side by side, and how to cut them.

    rows, sources, numbers: [N, b] tables, [groups, N, b] or, where `lists` has their [groups, N] indices, the tables
    that these point into; [Q, a] queries of each field (or [met, a] if they have moved already); what the asks need
    beside them.
    """

    def __init__(
        self, asks: Sequence[LossRequest], fields: Sequence[PairScores], blocks: int, weights: Sequence[float]
    ) -> None:
        self.asks, self.fields, self.blocks, self.weights = asks, fields, blocks, weights
        self.layout = fields[0].layout
        distinct = {id(f.rows): f.rows for f in fields}
        grouped = self.layout.groups is not None
        self.lists = [x.index if grouped and isinstance(x, GatheredRows) else None for x in distinct.values()]
        self.rows = [x.table if grouped and isinstance(x, GatheredRows) else plain(x) for x in distinct.values()]
        order = list(distinct)
        self._rows_of = [order.index(id(f.rows)) for f in fields]
        self.sources = [f.queries if f.moved is None else f.moved for f in fields]
        self.numbers = [x for ask in asks for x in (*ask.per_query, *ask.local, *ask.parameters)]

    def tensors(self) -> list[Tensor]:
        """All that may take a gradient."""
        return [*self.rows, *self.sources, *self.numbers]

    def terms(
        self, index: int, layout: CandidateLayout, met: Tensor, rows: Sequence[Candidates], tensors: Sequence[Tensor]
    ) -> Tensor:
        """[asks]: the terms of block `index`, whose queries are those at `met` of all that are met here.

        rows, tensors: in place of those of `tensors()`; rows of the block's groups only.
        """
        sources, numbers = tensors[: len(self.sources)], list(tensors[len(self.sources) :])
        cut = {}
        for field, source, which in zip(self.fields, sources, self._rows_of, strict=True):
            mine = self._own(source, index) if field.moved is None else source.index_select(0, met)
            cut[id(field)] = PairScores(layout, field.score_candidates, mine, rows[which], field.planes)
            cut[id(field)].moved = None if field.moved is None else mine
        asks = {}
        for i, ask in enumerate(self.asks):
            per_query = [self._own(numbers.pop(0), index) for _ in ask.per_query]
            own = [self._own(numbers.pop(0), index) for _ in ask.local]
            parameters = [numbers.pop(0) for _ in ask.parameters]
            fields = [cut[id(field)] for field in ask.fields]
            asks[str(i)] = replace(ask, fields=fields, per_query=per_query, local=own, parameters=parameters)
        got = reduce_over_candidates(asks, forget=True)
        return torch.stack([w * loss.sum() for w, loss in zip(self.weights, got.values(), strict=True)])

    def groups_of(self, met: Tensor) -> Tensor | None:
        """[g] int64: the groups of the queries met in a block, ascending; None without groups."""
        if self.layout.groups is None:
            return None
        size = self.layout.group_size(len(self.fields[0].queries))
        return torch.div(met[::size], size, rounding_mode="floor")

    def cut(self, rows: Sequence[Tensor], needed: Sequence[bool], groups: Tensor) -> list[Tensor]:
        """[g, N, b] copies of the candidates of some groups, ready to take a gradient."""
        found = []
        for x, listed, need in zip(rows, self.lists, needed, strict=False):
            mine = x.index_select(0, groups) if listed is None else take(x, listed[groups].flatten())
            mine = mine if listed is None else mine.reshape(len(groups), -1, x.shape[1])
            found.append(mine.requires_grad_(need))
        return found

    def collect(self, cut: Sequence[Tensor], collected: Sequence[Tensor | None], groups: Tensor) -> None:
        """Add the gradients of `cut` to those of the rows they were cut from."""
        for mine, listed, total in zip(cut, self.lists, collected, strict=True):
            if total is None or mine.grad is None:
                continue
            if listed is None:
                total.index_add_(0, groups, mine.grad)
            else:
                add(total, listed[groups].flatten(), mine.grad.reshape(-1, total.shape[1]))

    def _own(self, x: Tensor, index: int) -> Tensor:
        # Of this rank's queries, or of all that are met here: those of block `index`, whole groups together.
        cut = self.layout.block_cuts(len(x), self.blocks)
        return x[cut[index] : cut[index + 1]]


class _Visit(torch.autograd.Function):
    """[asks] terms; gradients are taken in forward and handed out in backward."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *tensors: Tensor) -> Tensor:
        needed, n = ctx.needs_input_grad[1:], len(batch.rows)
        rows = [x.detach() for x in tensors[:n]]
        collected = [torch.zeros_like(x) if need else None for x, need in zip(rows, needed, strict=False)]
        met_here = [GradAccumulatingRows(x, grad) for x, grad in zip(rows, collected, strict=True)]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors[n:], needed[n:], strict=True)]
        total = torch.zeros((), device=batch.layout.ranks.device)
        for index, (layout, met) in enumerate(batch.layout.query_blocks(batch.blocks, len(batch.fields[0].queries))):
            groups = batch.groups_of(met)
            copies = [] if groups is None else batch.cut(rows, needed, groups)
            with torch.enable_grad():
                terms = batch.terms(index, layout, met, copies or met_here, leaves)
                terms.sum().backward()
            if groups is not None:
                batch.collect(copies, collected, groups)
            total = total.to(terms) + terms.detach()
        ctx.found = [*collected, *(x.grad for x in leaves)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale, (found, ctx.found) = grads[0], (ctx.found, None)
        if scale.device.type == "cpu" and not bool((scale == scale[0]).all()):
            raise AssertionError("the terms of one visit are to be added up, not weighted")
        if scale.device.type != "cpu" or scale[0] != 1:
            found = [None if x is None else x.mul_(scale[0]) for x in found]
        return None, *found
