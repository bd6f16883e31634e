"""Score rows: the scores of Q queries against candidates spread over ranks (design 4.2).

Queries travel, candidates stay, and no score leaves its shard. A loss sees scores only through a `LossRequest`: it is
handed one block of scores [Q, block] at a time and names the partial sums it wants; these [Q] numbers go home to the
rank that owns the query. All asks of a step are answered in one pass over the candidates and one exchange each way.
Blocks are recomputed in backward once a block of all candidates would be too big, so that no Q x N tensor has to exist.
At world 1 everything below is plain tensor arithmetic.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import PairScores
from distkgd.distributed.reductions.partials import (
    PARTS,
    Kind,
    Known,
    Partial,
    columns_of,
    merge,
    only_gap,
    only_logsumexp,
    unmerge,
)
from distkgd.kernels.candidates import Candidates, plain
from distkgd.kernels.packed import PackedRows

_WAITING = 32  # blocks whose columns are merged together


@dataclass(frozen=True)
class LossRequest:
    """What a loss wants to know about the candidates of each query.

    partials: (block of each field [..., Q, n], each per_query as [..., Q, 1], each parameter) -> {name: Partial}.
        It must be pure: in blocked mode it runs again in backward.
    finish: ({name: [Q] or [P, Q]} of this rank's queries, each local) -> the loss, or whatever is made of them.
    per_query: [Q] numbers of this rank's queries needed beside the scores.
    local: [Q, ...] numbers of this rank's queries that only finish needs; they stay here.
    parameters: other tensors that partials uses and that may need a gradient.
    """

    partials: Callable[..., Mapping[str, Partial]]
    fields: Sequence[PairScores]
    finish: Callable[..., Any] = lambda got: got
    per_query: Sequence[Tensor] = ()
    local: Sequence[Tensor] = ()
    parameters: Sequence[Tensor] = ()


def reduce_over_candidates(asks: Mapping[str, LossRequest], *, forget: bool = False) -> dict[str, Any]:
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
    elif any(isinstance(rows, PackedRows) for rows in run.rows):  # for reading only
        columns = _over_blocks(run, blocks, run.rows, [*queries, *extra, *run.parameters])
    else:
        tensors = [*map(plain, run.rows), *queries, *extra, *run.parameters]
        columns = _Blocked.apply(run, blocks, *tensors)  # type: ignore[no-untyped-call]
    merged = merge(run.kinds, layout.return_to_owner(columns))
    return dict(zip(asks, run.finish(merged), strict=True))


def reduce(
    fn: Callable[..., Mapping[str, Partial]], *fields: PairScores, per_query: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """name -> [Q]: the partial sums that `fn` names (see `LossRequest`)."""
    found: dict[str, Tensor] = reduce_over_candidates({"": LossRequest(fn, fields, per_query=per_query)})[""]
    return found


class _Pass:
    """Several asks over the same candidates, each field and row table counted once.

    kinds: (which ask, name of its partial, kind, planes or 0 for none) in the order of the columns; known once a block
        has been computed.
    """

    def __init__(self, asks: Sequence[LossRequest], forget: bool = False) -> None:
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
        known = Known({}, {})
        for i, ask in enumerate(self.asks):
            mine = [scores[next(j for j, f in enumerate(self.fields) if f is field)] for field in ask.fields]
            mine += [per_query.pop(0) for _ in ask.per_query] + [parameters.pop(0) for _ in ask.parameters]
            found = ask.partials(*mine)
            others = [field for other in self.asks if other is not ask for field in other.fields]
            alone = [z for z, field in zip(mine, ask.fields, strict=False) if all(field is not f for f in others)]
            last = self.forget and len(found) == 1 and (only_logsumexp(found, alone) or only_gap(found, alone))
            for name, partial in found.items():
                made = columns_of(partial, last, known)
                planes = made[0].dim() - self._query_dims
                kinds.append((i, name, type(partial), len(made[0]) if planes else 0))
                columns += [x.flatten(1) if planes else x.reshape(1, -1) for x in made]
        self.kinds = kinds
        wide = columns[0].dtype
        for column in columns:
            wide = torch.promote_types(wide, column.dtype)
        return torch.cat([column.to(wide) for column in columns])

    def block(self, start: int, stop: int, rows: Sequence[Candidates], rest: Sequence[Tensor]) -> Tensor:
        """[k, Q] of candidates start … stop - 1. rows: of each distinct table, these candidates only."""
        n = len(self.fields)
        pairs = zip(self.fields, rest[:n], self._rows_of, strict=True)
        return self.columns([f.block(q, rows[i], start, stop) for f, q, i in pairs], rest[n:])

    def finish(self, merged: Tensor) -> list[Any]:
        """What each ask makes of its merged columns ([k, Q])."""
        got: list[dict[str, Tensor]] = [{} for _ in self.asks]
        at = 0
        # The gradient of all rows at once is one launch on a GPU, that of each by itself is a table of zeros.
        at_once = merged.device.type != "cpu" and len(merged) > 2
        rows: Tensor | Sequence[Tensor] = merged.unbind() if at_once else merged
        for i, name, kind, planes in self.kinds:
            for part in PARTS.get(kind, ("",)):
                got[i][name + part] = merged[at : at + planes] if planes else rows[at]
                at += planes or 1
        return [ask.finish(found, *ask.local) for ask, found in zip(self.asks, got, strict=True)]


def _over_blocks(
    run: _Pass, blocks: list[tuple[int, int]], rows: Sequence[Candidates], rest: Sequence[Tensor]
) -> Tensor:
    # [k, Q] columns merged over all blocks.
    # Found columns wait in a tensor made once: small ones that stay, made between large ones that go, would leave
    # gaps into which the next large one does not fit.
    waiting: Any = None
    for i, (lo, hi) in enumerate(blocks):
        columns = run.block(lo, hi, [_cut(r, lo, hi) for r in rows], rest)
        if waiting is None:
            waiting = columns.new_empty(min(_WAITING, len(blocks)) + 1, *columns.shape)
        at = i % _WAITING + 1
        waiting[at] = columns
        if at == _WAITING or i + 1 == len(blocks):
            waiting[0] = merge(run.kinds, waiting[(i < _WAITING) : at + 1])
    merged: Tensor = waiting[0].clone()
    return merged


def _cut(rows: Candidates, lo: int, hi: int) -> Candidates:
    return rows[lo:hi] if isinstance(rows, PackedRows) else plain(rows)[..., lo:hi, :]


class _Blocked(torch.autograd.Function):
    """[k, Q] columns merged over all blocks; backward computes the blocks again, one at a time.

    The gradient of a row table is written block by block into one tensor of its size: beside it, nothing here grows
    with the number of candidates.
    """

    @staticmethod
    def forward(ctx: Any, run: _Pass, blocks: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
        n = len(run.rows)
        rows, rest = tensors[:n], tensors[n:]
        merged = _over_blocks(run, blocks, rows, rest)
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
            pulled = unmerge(run.kinds, columns.detach(), merged, grads[0])
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
    merged = merge(run.kinds, torch.stack([run.block(a, b, [r[..., a:b, :] for r in rows], rest) for a, b in blocks]))
    wanted = [x for x, g in zip(tensors, need, strict=True) if g]
    found = iter(torch.autograd.grad(merged, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if g else None for g in need]


def _distinct(items: Sequence[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())
