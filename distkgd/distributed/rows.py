"""Score rows: the scores of Q queries against candidates spread over ranks (design 4.2).

Queries travel, candidates stay, and no score leaves its shard. A loss sees scores only through an `Ask`: it is handed
one block of scores [Q, block] at a time and names the partial sums it wants; these [Q] numbers go home to the rank
that owns the query. All asks of a step are answered in one pass over the candidates and one exchange each way. Blocks
are recomputed in backward once a block of all candidates would be too big, so that no Q x N tensor has to exist. At
world 1 everything below is plain tensor arithmetic.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.kernels import scores as kernels
from distkgd.scorers.base import Candidates, plain

# Scores of a field that are kept for backward, and the size of the blocks that are computed again beyond that. On a CPU
# a block belongs into the cache: on 2e7 scores and more, computing them twice there was measured to be 1.6 times faster
# than writing them to memory once. An accelerator needs large blocks to hide the cost of launching kernels.
KEPT_NUMBERS = {"cpu": 1 << 24}
BLOCK_NUMBERS = {"cpu": 1 << 20}
DEVICE_NUMBERS = 1 << 26


def numbers_at_once(numbers: float, device: torch.device) -> float:
    """How many of a field's `numbers` (queries x candidates) exist at the same time."""
    if numbers <= KEPT_NUMBERS.get(device.type, DEVICE_NUMBERS):
        return numbers
    return BLOCK_NUMBERS.get(device.type, DEVICE_NUMBERS)


_NO_LIMIT = 1 << 62

LANES = 16  # of a vector instruction: matrix products are up to a fifth faster for multiples of it


def whole_lanes(number: int) -> int:
    """The number of rows without those that would leave a vector part empty; a few stay as they are."""
    return number - number % LANES if number >= LANES else number


# Candidates of a block with many planes at least: products with fewer would cost more than what the cache saves.
_NARROWEST = 32

# The score of a pair that does not count, in every field: exp of it is 0, and unlike -inf it makes no NaN in backward.
NEVER = -1e30
_WAITING = 32  # blocks whose columns are merged together


def present(scores: Tensor) -> Tensor:
    """[..., Q, n]: 1 where a candidate counts, 0 where it was left out."""
    return (scores > NEVER / 2).to(scores.dtype)


# A partial's tensors may have planes in front, [P, ..., Q, N]: scores of several models for each pair, as in `Field`.
# What is made of them is then [P, Q].


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
class SoftmaxGap:
    """Mean over candidates of `teacher` - `student` [Q, N] under softmax(`teacher`); gives `name`, and the log-sum-exps
    of both, `name.lse` (the teacher's) and `name.student`."""

    student: Tensor
    teacher: Tensor


Partial = Sum | Count | LogSumExp | SoftmaxMean | SoftmaxGap


class Layout:
    """Where the candidates of a batch are and which (query, candidate) pairs do not count.

    Queries travel to all ranks or stay on their own; and all of them meet the same candidates, or group g of them
    meets candidate rows [g].
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        num_candidates: int,
        most_candidates: int | None = None,
        counts: Sequence[int] | None = None,
        groups: int | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        block_numbers: int | None = None,
    ) -> None:
        """
        num_candidates: N of this rank, or of each group. most_candidates: an upper bound that all ranks share.
        counts: queries of each rank when they travel; None: they stay.
        groups: number of groups met on this rank (those of all ranks when queries travel), or None.
        excluded: ([p] query, [p] candidate), sorted by candidate: pairs that do not count (without groups).
        mask: [groups, queries per group, N] bool, True = does not count.
        """
        self.ranks = ranks
        self.counts = counts
        self.groups = groups
        self.num_candidates = num_candidates
        self.most_candidates = num_candidates if most_candidates is None else most_candidates
        self._excluded = excluded
        self._mask = mask
        self._block_numbers = block_numbers

    def gather(self, per_query: Sequence[Tensor]) -> list[Tensor]:
        """Each [Q, k] of this rank's queries as the blocks see it: of all queries met here, [groups, q, k] in groups.

        What takes a gradient travels in one exchange, what takes none in another.
        """
        gathered = list(per_query)
        if self.counts is not None and self.ranks.world > 1:
            for grad in (True, False):
                which = [i for i, x in enumerate(per_query) if x.requires_grad == grad]
                if which:
                    joined = torch.cat([per_query[i] for i in which], 1)
                    moved = self.ranks.gather(joined, self.counts, "queries")
                    parts = moved.split([per_query[i].shape[1] for i in which], 1)
                    for i, part in zip(which, parts, strict=True):
                        gathered[i] = part.to(per_query[i].dtype)
        if self.groups is None:
            return gathered
        return [x.reshape(self.groups, len(x) // max(1, self.groups), x.shape[1]) for x in gathered]

    def blocks(self, queries: int, planes: int = 1) -> list[tuple[int, int]]:
        """Ranges of candidates small enough that queries x range x planes stays below the block budget."""
        budget = self._block_numbers or numbers_at_once(queries * self.num_candidates * planes, self.ranks.device)
        width = max(1 if planes == 1 else _NARROWEST, int(budget) // max(1, queries * planes))
        if width >= self.num_candidates:
            return [(0, self.num_candidates)]
        pieces = -(-self.num_candidates // width)
        cuts = [self.num_candidates * i // pieces for i in range(pieces + 1)]
        return list(pairwise(cuts))

    def group_size(self, queries: int) -> int:
        """Queries of each group, of `queries` on this rank; 1 without groups."""
        if not self.groups:
            return 1
        return (queries if self.counts is None else sum(self.counts)) // self.groups

    def block_cuts(self, queries: int, blocks: int) -> list[int]:
        """[blocks + 1]: where one rank's `queries` are cut into blocks; groups stay whole."""
        size = self.group_size(queries)
        if self.groups is None:
            width = -(-queries // blocks)
            width = whole_lanes(width + LANES - 1) if width >= LANES else width
            return [min(queries, width * i) for i in range(blocks + 1)]
        return [queries // size * i // blocks * size for i in range(blocks + 1)] if size else [0] * (blocks + 1)

    def query_blocks(self, blocks: int, queries: int) -> list[tuple["Layout", Tensor]]:
        """The layout of each of `blocks` parts of this rank's `queries`, groups kept whole, and which of the queries
        met here belong to it: ([met in the part] positions, ascending)."""
        counts = [queries] if self.counts is None else list(self.counts)
        device = self.ranks.device
        starts = torch.tensor([0, *counts], device=device).cumsum(0).tolist()
        found, place = [], torch.zeros(sum(counts), dtype=torch.int64, device=device)
        part = torch.zeros_like(place)
        every_cut = [self.block_cuts(n, blocks) for n in counts]
        for i in range(blocks):
            cuts = [(cut[i], cut[i + 1]) for cut in every_cut]
            pieces = [torch.arange(at + lo, at + hi, device=device) for at, (lo, hi) in zip(starts, cuts, strict=False)]
            met = torch.cat(pieces)
            part[met], place[met] = i, torch.arange(len(met), device=device)
            found.append(([hi - lo for lo, hi in cuts], met))
        excluded: list[tuple[Tensor, Tensor] | None] = [None] * blocks
        if self._excluded is not None:
            query, candidate = self._excluded
            order = torch.sort(part[query], stable=True).indices
            sizes = torch.bincount(part[query], minlength=blocks).tolist()
            pairs = zip(place[query[order]].split(sizes), candidate[order].split(sizes), strict=True)
            excluded = list(pairs)
        size = self.group_size(queries)

        def masked(met: Tensor) -> Tensor | None:
            return None if self._mask is None else self._mask[torch.div(met[::size], size, rounding_mode="floor")]

        return [
            (
                Layout(
                    self.ranks,
                    num_candidates=self.num_candidates,
                    counts=None if self.counts is None else sizes,
                    groups=None if self.groups is None else len(met) // max(1, size),
                    excluded=pairs,
                    mask=masked(met),
                    block_numbers=_NO_LIMIT,
                ),
                met,
            )
            for (sizes, met), pairs in zip(found, excluded, strict=True)
        ]

    def leave_out(self, scores: "Tensor | Unmade", start: int, stop: int) -> None:
        """Write NEVER, in place, over the pairs of candidates start … stop - 1 that do not count."""
        if self._mask is not None:
            assert isinstance(scores, Tensor), "scores of groups are made"
            scores.masked_fill_(self._mask[..., start:stop], NEVER)
        elif self._excluded is not None:
            query, candidate = self._excluded
            ends = torch.tensor([start, stop], device=candidate.device)
            first, last = torch.searchsorted(candidate, ends).tolist()
            if isinstance(scores, Tensor):
                scores[..., query[first:last], candidate[first:last] - start] = NEVER
            else:
                scores.leave_out(query[first:last], candidate[first:last] - start)

    def home(self, partials: Tensor) -> Tensor:
        """[k, queries met here] partials of this rank's candidates as [pieces, k, Q] of this rank's queries."""
        width = len(partials)
        if self.counts is None or self.ranks.world == 1:
            return partials.reshape(1, width, -1)
        mine = self.counts[self.ranks.rank]
        by_query = partials.reshape(width, -1).T
        moved = self.ranks.exchange(by_query, self.counts, [mine] * self.ranks.world, "partials")
        return moved.reshape(self.ranks.world, mine, width).transpose(1, 2)


class Unmade(Protocol):
    """Scores that are never in memory: whoever made the field knows what they are, and its asks how to sum them."""

    def leave_out(self, query: Tensor, candidate: Tensor) -> None:
        """These pairs ([p], [p]) do not count."""


class Field:
    """One number per (query, candidate), computed block by block: a model's scores, a cosine, a norm ratio.

    meet: (queries [..., Q, a], rows [..., n, b], copied or listed) -> [..., Q, n], or what stands for it.
    queries: [Q, a] of this rank, moved to the candidates when the first ask is answered.
    rows: [N, b], or [groups, N, b], copied or listed; narrower numbers than the queries' are widened block by block.
    planes: how many numbers there are for each pair if `meet` puts them in front: [planes, ..., Q, n].
    """

    def __init__(
        self,
        layout: Layout,
        meet: Callable[[Tensor, Candidates], Any],
        queries: Tensor,
        rows: Candidates,
        planes: int = 1,
    ) -> None:
        self.layout = layout
        self.meet = meet
        self.queries = queries
        self.rows = rows
        self.planes = planes
        self.moved: Tensor | None = None
        self._whole: Any = None

    def block(self, queries: Tensor, rows: Candidates, start: int, stop: int) -> Any:
        """[..., Q, stop - start]: the numbers of candidates start … stop - 1, NEVER where a pair does not count."""
        scores = self.meet(queries, rows.to(queries.dtype))
        with torch.no_grad():
            # Untracked on purpose: what is summed vanishes at NEVER, and so does its gradient.
            self.layout.leave_out(scores, start, stop)
        return scores

    def whole(self) -> Any:
        """[..., Q, N]: all numbers at once, computed once however many asks use them."""
        if self._whole is None:
            assert self.moved is not None
            self._whole = self.block(self.moved, self.rows, 0, self.layout.num_candidates)
        return self._whole


@dataclass(frozen=True)
class Ask:
    """What a loss wants to know about the candidates of each query.

    partials: (block of each field [..., Q, n], each per_query as [..., Q, 1], each parameter) -> {name: Partial}.
        It must be pure: in blocked mode it runs again in backward.
    finish: ({name: [Q] or [P, Q]} of this rank's queries, each own) -> the loss, or whatever is made of them.
    per_query: [Q] numbers of this rank's queries needed beside the scores.
    own: [Q, ...] numbers of this rank's queries that only finish needs; they stay here.
    parameters: other tensors that partials uses and that may need a gradient.
    """

    partials: Callable[..., Mapping[str, Partial]]
    fields: Sequence[Field]
    finish: Callable[..., Any] = lambda got: got
    per_query: Sequence[Tensor] = ()
    own: Sequence[Tensor] = ()
    parameters: Sequence[Tensor] = ()


def answer(asks: Mapping[str, Ask], *, forget: bool = False) -> dict[str, Any]:
    """What each ask's `finish` makes of its sums over all candidates of all ranks; one pass over the candidates.

    forget: nobody will use these fields again, so that their scores may be written over in backward.
    """
    run = _Pass(list(asks.values()), forget)
    layout = run.fields[0].layout
    met = [*(f for f in run.fields if f.moved is None)]
    extra = [x.unsqueeze(-1) for x in run.per_query]
    gathered = layout.gather([*(f.queries for f in met), *extra])
    for field, moved in zip(met, gathered, strict=False):
        field.moved = moved
    extra = gathered[len(met) :]
    queries = [f.moved for f in run.fields if f.moved is not None]
    blocks = layout.blocks(queries[0].shape[:-1].numel(), max(f.planes for f in run.fields))
    if len(blocks) == 1:
        columns = run.columns([f.whole() for f in run.fields], [*extra, *run.parameters])
    else:
        tensors = [*map(plain, run.rows), *queries, *extra, *run.parameters]
        columns = _Blocked.apply(run, blocks, *tensors)  # type: ignore[no-untyped-call]
    merged = _merge(run.kinds, layout.home(columns))
    return dict(zip(asks, run.finish(merged), strict=True))


def reduce(
    fn: Callable[..., Mapping[str, Partial]], *fields: Field, per_query: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """name -> [Q]: the partial sums that `fn` names (see `Ask`)."""
    found: dict[str, Tensor] = answer({"": Ask(fn, fields, per_query=per_query)})[""]
    return found


Kind = tuple[int, str, type[Partial], int]


class _Pass:
    """Several asks over the same candidates, each field and row table counted once.

    kinds: (which ask, name of its partial, kind, planes or 0 for none) in the order of the columns; known once a block
        has been computed.
    """

    def __init__(self, asks: Sequence[Ask], forget: bool = False) -> None:
        self.asks = asks
        self.forget = forget
        self.fields = _distinct([f for ask in asks for f in ask.fields])
        self.per_query = [x for ask in asks for x in ask.per_query]
        self.parameters = [x for ask in asks for x in ask.parameters]
        self.rows = _distinct([f.rows for f in self.fields])
        self._rows_of = [next(i for i, r in enumerate(self.rows) if r is f.rows) for f in self.fields]
        self.kinds: list[Kind] = []
        self._query_dims = 1 if self.fields[0].layout.groups is None else 2
        if any(f.layout is not self.fields[0].layout for f in self.fields):
            raise AssertionError("asks that are answered together must meet the same candidates")

    def columns(self, scores: Sequence[Tensor], extra: Sequence[Tensor]) -> Tensor:
        """[k, Q] from the block of each distinct field, each ask's per_query numbers, each ask's parameters."""
        per_query, parameters = list(extra[: len(self.per_query)]), list(extra[len(self.per_query) :])
        kinds, columns = [], []
        known = _Known({}, {})
        for i, ask in enumerate(self.asks):
            mine = [scores[next(j for j, f in enumerate(self.fields) if f is field)] for field in ask.fields]
            mine += [per_query.pop(0) for _ in ask.per_query] + [parameters.pop(0) for _ in ask.parameters]
            found = ask.partials(*mine)
            others = [field for other in self.asks if other is not ask for field in other.fields]
            alone = [z for z, field in zip(mine, ask.fields, strict=False) if all(field is not f for f in others)]
            last = self.forget and len(found) == 1 and (only_logsumexp(found, alone) or only_gap(found, alone))
            for name, partial in found.items():
                made = _columns(partial, last, known)
                planes = made[0].dim() - self._query_dims
                kinds.append((i, name, type(partial), len(made[0]) if planes else 0))
                columns += [x.flatten(1) if planes else x.reshape(1, -1) for x in made]
        self.kinds = kinds
        wide = columns[0].dtype
        for column in columns:
            wide = torch.promote_types(wide, column.dtype)
        return torch.cat([column.to(wide) for column in columns])

    def block(self, start: int, stop: int, rows: Sequence[Tensor], rest: Sequence[Tensor]) -> Tensor:
        """[k, Q] of candidates start … stop - 1. rows: of each distinct table, these candidates only."""
        n = len(self.fields)
        pairs = zip(self.fields, rest[:n], self._rows_of, strict=True)
        return self.columns([f.block(q, rows[i], start, stop) for f, q, i in pairs], rest[n:])

    def finish(self, merged: Tensor) -> list[Any]:
        """What each ask makes of its merged columns ([k, Q])."""
        got: list[dict[str, Tensor]] = [{} for _ in self.asks]
        at = 0
        for i, name, kind, planes in self.kinds:
            for part in _PARTS.get(kind, ("",)):
                got[i][name + part] = merged[at : at + planes] if planes else merged[at]
                at += planes or 1
        return [ask.finish(found, *ask.own) for ask, found in zip(self.asks, got, strict=True)]


class _Blocked(torch.autograd.Function):
    """[k, Q] columns merged over all blocks; backward computes the blocks again, one at a time.

    The gradient of a row table is written block by block into one tensor of its size: beside it, nothing here grows
    with the number of candidates.
    """

    @staticmethod
    def forward(ctx: Any, run: _Pass, blocks: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
        n = len(run.rows)
        rows, rest = tensors[:n], tensors[n:]
        # Found columns wait in a tensor made once: small ones that stay, made between large ones that go, would leave
        # gaps into which the next large one does not fit.
        waiting: Any = None
        for i, (lo, hi) in enumerate(blocks):
            columns = run.block(lo, hi, [r[..., lo:hi, :] for r in rows], rest)
            if waiting is None:
                waiting = columns.new_empty(min(_WAITING, len(blocks)) + 1, *columns.shape)
            at = i % _WAITING + 1
            waiting[at] = columns
            if at == _WAITING or i + 1 == len(blocks):
                waiting[0] = _merge(run.kinds, waiting[(i < _WAITING) : at + 1])
        merged: Tensor = waiting[0].clone()
        ctx.run, ctx.blocks = run, blocks
        ctx.save_for_backward(merged, *tensors)
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (merged, *tensors), run = ctx.saved_tensors, ctx.run
        need = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_again(run, ctx.blocks, tensors, need, grads[0])
        n = len(run.rows)
        rest = [x.detach().requires_grad_(g) for x, g in zip(tensors[n:], need[n:], strict=True)]
        totals: list[Tensor | None] = [None] * len(tensors)
        for lo, hi in ctx.blocks:
            with torch.enable_grad():
                cut = [r[..., lo:hi, :].detach().requires_grad_(g) for r, g in zip(tensors[:n], need, strict=False)]
                columns = run.block(lo, hi, cut, rest)
            wanted = [x for x, g in zip([*cut, *rest], need, strict=True) if g]
            pulled = _unmerge(run.kinds, columns.detach(), merged, grads[0])
            found = iter(torch.autograd.grad(columns, wanted, pulled, allow_unused=True))
            for i, g in enumerate(need):
                piece = next(found) if g else None
                if piece is None:
                    continue
                total = totals[i]
                if total is None:
                    total = totals[i] = torch.zeros_like(tensors[i])
                (total[..., lo:hi, :] if i < n else total).add_(piece)
        return None, None, *totals


def _again(
    run: _Pass, blocks: list[tuple[int, int]], tensors: Sequence[Tensor], need: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    # The gradients with a graph of their own, for second derivatives: all blocks at once.
    n = len(run.rows)
    rows, rest = tensors[:n], tensors[n:]
    merged = _merge(run.kinds, torch.stack([run.block(a, b, [r[..., a:b, :] for r in rows], rest) for a, b in blocks]))
    wanted = [x for x, g in zip(tensors, need, strict=True) if g]
    found = iter(torch.autograd.grad(merged, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if g else None for g in need]


# What a kind's columns are called, after the name of the partial.
_PARTS: Mapping[type[Partial], tuple[str, ...]] = {SoftmaxMean: (".lse", ""), SoftmaxGap: (".lse", "", ".student")}


def _distinct(items: Sequence[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())


def only_logsumexp(found: Mapping[str, Partial], scores: Sequence[Tensor]) -> bool:
    """Whether all that is asked of these scores is the log-sum-exp of the scores themselves."""
    (first, *more) = found.values()
    return not more and isinstance(first, LogSumExp) and any(first.logit is z for z in scores)


def only_gap(found: Mapping[str, Partial], alone: Sequence[Tensor]) -> bool:
    """Whether all that is asked is a gap, and the teacher's scores in it are among those that nobody else needs."""
    (first, *more) = found.values()
    return not more and isinstance(first, SoftmaxGap) and any(first.teacher is z for z in alone)


class _Known(NamedTuple):
    """What was computed already of logits, by their identity: (logits, their log-sum-exp), and their softmax."""

    sums: dict[int, tuple[Tensor, Tensor]]
    shares: dict[int, Tensor]


def _columns(partial: Partial, last: bool, known: _Known) -> list[Tensor]:
    # The [Q] numbers that stand for one block of one partial. last: nothing else needs its scores (of a gap: the
    # teacher's).
    match partial:
        case Sum(value):
            return [value.sum(-1)]
        case Count(value):
            return [value.sum(-1).double()]
        case LogSumExp(logit):
            if id(logit) not in known.sums:
                known.sums[id(logit)] = logit, _logsumexp(logit, last)
            return [known.sums[id(logit)][1]]
        case SoftmaxMean(logit, value):
            (total,) = _columns(LogSumExp(logit), False, known)
            if id(logit) not in known.shares:
                known.shares[id(logit)] = torch.exp(logit - total.unsqueeze(-1))
            return [total, (known.shares[id(logit)] * value).sum(-1)]
        case SoftmaxGap(student, teacher):
            if kernels.summable(student, teacher):
                found = kernels.softmax_gap(student, teacher, last and not teacher.requires_grad)
            else:
                total = _logsumexp(teacher)
                mean = (torch.exp(teacher - total.unsqueeze(-1)) * (teacher - student)).sum(-1)
                found = total, mean, _logsumexp(student)
            known.sums[id(student)] = student, found[2]
            return list(found)


def _logsumexp(logit: Tensor, last: bool = False) -> Tensor:
    if logit.shape[-1] == 0:
        # A sum, not a constant: a rank without candidates has to take part in the exchanges of backward.
        return logit.sum(-1) + NEVER
    return kernels.logsumexp(logit, last) if kernels.summable(logit) else torch.logsumexp(logit, -1)


def _merge(kinds: Sequence[Kind], parts: Tensor) -> Tensor:
    # [pieces, columns, Q] -> [columns, Q], in the order of _columns, so that what was merged can be merged again.
    if len(parts) == 1:
        return parts[0]
    out: list[Tensor] = []
    at = 0
    for _, _, kind, planes in kinds:
        width = planes or 1
        first, *others = parts[:, at : at + width * len(_PARTS.get(kind, ("",)))].split(width, 1)
        at += width * (1 + len(others))
        if kind in (SoftmaxMean, SoftmaxGap):
            weight = torch.softmax(first, 0)
            out += [torch.logsumexp(first, 0), (weight * others[0]).sum(0)]
            out += [torch.logsumexp(log_sum, 0) for log_sum in others[1:]]
        elif kind is LogSumExp:
            out.append(torch.logsumexp(first, 0))
        else:
            out.append(first.sum(0))
    return torch.cat(out)


def _unmerge(kinds: Sequence[Kind], part: Tensor, merged: Tensor, grad: Tensor) -> Tensor:
    # The gradient [columns, Q] of one of the parts that were merged, given that of what they were merged to.
    out: list[Tensor] = []
    at = 0
    for _, _, kind, planes in kinds:
        width = planes or 1
        stop = at + width * len(_PARTS.get(kind, ("",)))
        mine, whole, pulled = (x[at:stop].split(width) for x in (part, merged, grad))
        at = stop
        if kind in (SoftmaxMean, SoftmaxGap):
            weight = torch.exp(mine[0] - whole[0])
            out += [weight * (pulled[0] + pulled[1] * (mine[1] - whole[1])), weight * pulled[1]]
            out += [torch.exp(mine[2] - whole[2]) * pulled[2]] if kind is SoftmaxGap else []
        elif kind is LogSumExp:
            out.append(torch.exp(mine[0] - whole[0]) * pulled[0])
        else:
            out.append(pulled[0])
    return torch.cat(out)
