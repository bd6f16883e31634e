"""Score rows: the scores of Q queries against candidates spread over ranks (design 4.2).

Queries travel, candidates stay, and no score leaves its shard. A loss sees scores only inside `reduce`: it is handed
one block of scores [Q, block] at a time and names the partial sums it wants; these [Q] numbers go home to the rank
that owns the query. Blocks are recomputed in backward once a block of all candidates would be too big, so that no
Q x N tensor has to exist. At world 1 everything below is plain tensor arithmetic.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distkgd.distributed.ranks import Ranks

# Scores that are kept for backward without recomputing them: 64 Mi numbers per block of a field.
BLOCK_NUMBERS = 1 << 26
# The score of a pair that does not count, in every field: exp of it is 0, and unlike -inf it makes no NaN in backward.
NEVER = -1e30


def present(scores: Tensor) -> Tensor:
    """[..., Q, n]: 1 where a candidate counts, 0 where it was left out."""
    return (scores > NEVER / 2).to(scores.dtype)


@dataclass(frozen=True)
class Sum:
    """Sum over candidates of `value` [Q, N], which must vanish where the scores are NEVER."""

    value: Tensor


@dataclass(frozen=True)
class LogSumExp:
    """log of the sum over candidates of exp(`logit` [Q, N])."""

    logit: Tensor


@dataclass(frozen=True)
class Count:
    """Number of candidates for which `value` ([Q, N] bool) holds, as float64."""

    value: Tensor


@dataclass(frozen=True)
class SoftmaxMean:
    """Mean over candidates of `value` [Q, N] under softmax(`logit` [Q, N]); gives `name` and `name.lse`, the weights'
    log-sum-exp, so that the mean can be merged with further candidates."""

    logit: Tensor
    value: Tensor


@dataclass(frozen=True)
class Max:
    """Largest `value` [Q, N]."""

    value: Tensor


Partial = Sum | Count | LogSumExp | SoftmaxMean | Max


class Layout:
    """Where the candidates of a batch are and which (query, candidate) pairs do not count.

    shared: all queries meet the same candidates, which stay on their ranks; queries travel.
    grouped: group g of queries meets candidate rows [g] that were looked up to this rank; nothing travels.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        counts: Sequence[int] | None = None,
        groups: int | None = None,
        num_candidates: int,
        excluded: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        block_numbers: int | None = None,
    ) -> None:
        """
        counts: queries per rank (shared), or None.
        groups: number of local groups (grouped), or None.
        num_candidates: N of this rank (shared) or of each group (grouped).
        excluded: ([p] global query, [p] local candidate), sorted by candidate (shared).
        mask: [groups, queries per group, N] bool, True = not a candidate (grouped).
        """
        self.ranks = ranks
        self.counts = counts
        self.groups = groups
        self.num_candidates = num_candidates
        self._excluded = excluded
        self._mask = mask
        self._block_numbers = block_numbers or BLOCK_NUMBERS

    @property
    def shared(self) -> bool:
        """Whether queries travel to shared candidates."""
        return self.counts is not None

    def gather(self, per_query: Tensor) -> Tensor:
        """[Q, ...] of this rank's queries as the blocks see them: all ranks' queries, or [groups, q, ...]."""
        if self.counts is not None:
            return self.ranks.gather(per_query, self.counts)
        assert self.groups is not None
        return per_query.reshape(self.groups, len(per_query) // max(1, self.groups), *per_query.shape[1:])

    def blocks(self, queries: int) -> list[tuple[int, int]]:
        """Ranges of candidates small enough that queries x range stays below the block budget."""
        width = max(1, self._block_numbers // max(1, queries))
        if not self.shared or width >= self.num_candidates:
            return [(0, self.num_candidates)]
        pieces = -(-self.num_candidates // width)
        cuts = [self.num_candidates * i // pieces for i in range(pieces + 1)]
        return list(pairwise(cuts))

    def leave_out(self, scores: Tensor, start: int, stop: int) -> None:
        """Write NEVER, in place, over the pairs of candidates start … stop - 1 that do not count."""
        if self._mask is not None:
            scores.masked_fill_(self._mask, NEVER)
        elif self._excluded is not None:
            query, candidate = self._excluded
            ends = torch.tensor([start, stop], device=scores.device)
            first, last = torch.searchsorted(candidate, ends).tolist()
            scores[query[first:last], candidate[first:last] - start] = NEVER

    def home(self, partials: Tensor) -> Tensor:
        """[P, k, Q_all] partials of this rank's candidates as [P * world, k, Q] partials of this rank's queries."""
        if self.counts is None:
            return partials.reshape(*partials.shape[:2], -1)
        if self.ranks.world == 1:
            return partials
        mine = self.counts[self.ranks.rank]
        pieces, width, _ = partials.shape
        by_query = partials.permute(2, 0, 1).reshape(-1, pieces * width)
        moved = self.ranks.exchange(by_query, self.counts, [mine] * self.ranks.world)
        return (
            moved.reshape(self.ranks.world, mine, pieces, width)
            .permute(0, 2, 3, 1)
            .reshape(self.ranks.world * pieces, width, mine)
        )


class Field:
    """One number per (query, candidate), computed block by block: a model's scores, a cosine, a norm ratio.

    meet: (queries [..., Q, a], rows [..., n, b]) -> [..., Q, n].
    queries: [Q, a] of this rank, moved to the candidates here.
    rows: [N, b] (shared) or [groups, N, b] (grouped).
    """

    def __init__(self, layout: Layout, meet: Callable[[Tensor, Tensor], Tensor], queries: Tensor, rows: Tensor) -> None:
        self.layout = layout
        self.meet = meet
        self.queries = layout.gather(queries)
        self.rows = rows
        self._whole: Tensor | None = None

    def block(self, queries: Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
        """[..., Q, stop - start]: the numbers of candidates start … stop - 1, NEVER where a pair does not count."""
        scores = self.meet(queries, rows)
        with torch.no_grad():
            # Untracked on purpose: what is summed vanishes at NEVER, and so does its gradient.
            self.layout.leave_out(scores, start, stop)
        return scores

    def whole(self) -> Tensor:
        """[..., Q, N]: all numbers at once, computed once however many reductions use them."""
        if self._whole is None:
            self._whole = self.block(self.queries, self.rows, 0, self.layout.num_candidates)
        return self._whole


def reduce(
    fn: Callable[..., Mapping[str, Partial]], *fields: Field, per_query: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """name -> [Q] for this rank's queries: the partial sums that `fn` names, over all candidates of all ranks.

    fn: (block of each field [..., Q, n], then each per_query tensor as [..., Q, 1]) -> {name: Partial}. It must be
        pure: in blocked mode it runs again in backward.
    per_query: [Q] numbers of this rank's queries that `fn` needs beside the scores.
    """
    layout = fields[0].layout
    extra = [layout.gather(x).unsqueeze(-1) for x in per_query]
    num_queries = fields[0].queries.shape[0] if layout.shared else 0
    blocks = layout.blocks(num_queries)
    kinds: dict[str, type[Partial]] = {}

    def columns(scores: Sequence[Tensor], extra: Sequence[Tensor]) -> Tensor:
        partials = fn(*scores, *extra)
        kinds.update({name: type(partial) for name, partial in partials.items()})
        return torch.stack([column for partial in partials.values() for column in _columns(partial)])

    def recomputed(start: int, stop: int, *tensors: Tensor) -> Tensor:
        n = len(fields)
        pairs = zip(fields, tensors[:n], tensors[n : 2 * n], strict=True)
        return columns([f.block(q, r, start, stop) for f, q, r in pairs], tensors[2 * n :])

    if len(blocks) == 1:
        pieces = [columns([f.whole() for f in fields], extra)]
    else:
        # split, not slices: its backward is one concatenation instead of a table of zeros per block.
        sizes = [stop - start for start, stop in blocks]
        rows = [f.rows.split(sizes) for f in fields]
        queries = [f.queries for f in fields]
        pieces = [
            checkpoint(recomputed, *ends, *queries, *(r[i] for r in rows), *extra, use_reentrant=False)
            for i, ends in enumerate(blocks)
        ]
    stacked = torch.stack([p.reshape(p.shape[0], -1) for p in pieces])
    if len(pieces) > 1:
        # One piece per rank goes home, however many blocks each rank has.
        stacked = torch.stack(list(_merge(kinds, stacked).values())).unsqueeze(0)
    return _merge(kinds, layout.home(stacked))


def _columns(partial: Partial) -> list[Tensor]:
    # The [Q] numbers that stand for one block of one partial.
    match partial:
        case Sum(value):
            return [value.sum(-1)]
        case Count(value):
            return [value.sum(-1).double()]
        case LogSumExp(logit):
            return [_logsumexp(logit)]
        case SoftmaxMean(logit, value):
            total = _logsumexp(logit)
            return [total, (torch.exp(logit - total.unsqueeze(-1)) * value).sum(-1)]
        case Max(value):
            return [value.amax(-1) if value.shape[-1] else value.sum(-1) + NEVER]


def _logsumexp(logit: Tensor) -> Tensor:
    if logit.shape[-1] == 0:
        # A sum, not a constant: a rank without candidates has to take part in the exchanges of backward.
        return logit.sum(-1) + NEVER
    return torch.logsumexp(logit, -1)


def _merge(kinds: Mapping[str, type[Partial]], parts: Tensor) -> dict[str, Tensor]:
    # parts: [pieces, columns, Q] -> name: [Q]
    out: dict[str, Tensor] = {}
    at = 0
    for name, kind in kinds.items():
        if kind is SoftmaxMean:
            weight = torch.softmax(parts[:, at], 0)
            # In the order of _columns, so that what was merged can be merged again.
            out[f"{name}.lse"] = torch.logsumexp(parts[:, at], 0)
            out[name] = (weight * parts[:, at + 1]).sum(0)
            at += 2
            continue
        column = parts[:, at]
        if kind is LogSumExp:
            out[name] = torch.logsumexp(column, 0)
        elif kind is Max:
            out[name] = column.amax(0)
        else:
            out[name] = column.sum(0)
        at += 1
    return out
