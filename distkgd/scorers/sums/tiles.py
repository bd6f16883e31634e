"""Sums over coordinates that no matrix product can give, in bounded memory.

L1, RotatE and PairRE need Σ_k φ(q_k, c_k) for every (query, candidate) pair. Broadcasting that is a
`[Q, N, k]` tensor, 40 GB for an ordinary batch. Compiled kernels (kernels/pairs.py) sum it pair by pair. Where
there is none, and for second derivatives, the pairs are cut into tiles that fit a cache; a tile is summed and
forgotten, and backward visits the tiles again. Memory is O(Q·N) for the result plus one tile.

Why not `torch.cdist(p=1)`: it has no formula for RotatE and PairRE, no second derivative, its CUDA backward allocates
the very `[N, Q, k]` buffer that must not exist, and on one CPU core it was measured two to three times slower than
these tiles.

Sums run in a fixed order: tiles are visited in order and no kernel adds through atomics. Tile sizes depend on
the shapes and the kind of device only, never on the number of threads.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from distkgd.kernels import pairs
from distkgd.kernels.candidates import Candidates, GatheredRows, GradAccumulatingRows, plain
from distkgd.kernels.packed import PackedRows
from distkgd.kernels.triton import distances, runtime
from distkgd.scorers.sums.terms import pulled, summed

# Elements of one [queries, candidates, coordinates] tile. On a CPU it should stay in the second-level cache;
# on an accelerator it must be large enough to hide the cost of launching a kernel (64 MB in float32).
_CPU_TILE = 2**18
_DEVICE_TILE = 2**24
# Enough queries to reuse each candidate row while it is in cache.
_TILE_QUERIES = 16
# With fewer queries per list of candidates, copying the listed rows costs more than what a matrix product saves.
FEW_QUERIES = 4


def pair_sums(term: pairs.Kind, q: Tensor, c: Candidates) -> Tensor:
    """`[..., Q, N]` Σ_k φ of queries `[..., Q, width]` and candidates `[..., N, dim]`.

    Leading dimensions broadcast. Half precision is summed in float32 and rounded once, at the end.
    """
    dtype = torch.promote_types(q.dtype, c.dtype)
    q, c = q.to(torch.promote_types(dtype, torch.float32)), c.to(torch.promote_types(dtype, torch.float32))
    ordered = None
    if isinstance(c, GatheredRows) and _kernels(q) is not None:
        table, index = c.table, c.index.reshape(-1, c.index.shape[-1]).contiguous()
        candidates, shape = index.shape[1], (*q.shape[:-1], index.shape[1])
        grouped = q.reshape(len(index), *q.shape[-2:])
        if c.segments is not None:
            ordered = c.segments.order, c.segments.offsets, c.first
    else:
        rows, index = plain(c), None
        lead = torch.broadcast_shapes(q.shape[:-2], rows.shape[:-2])
        candidates, shape = rows.shape[-2], (*lead, q.shape[-2], rows.shape[-2])
        if rows.shape[:-2].numel() == 1:
            # All queries meet the same candidates: one long list of queries instead of a batch of short ones.
            grouped = q.reshape(1, -1, q.shape[-1])
        else:
            grouped = q.expand(*lead, *q.shape[-2:]).reshape(lead.numel(), *q.shape[-2:])
            rows = rows.expand(*lead, *rows.shape[-2:])
        table = rows.reshape(-1, rows.shape[-1])
    call: Any = _PairSums.apply
    sums = call(term, candidates, grouped.contiguous(), table.contiguous(), index, ordered)
    return cast(Tensor, sums).reshape(shape).to(dtype)


def inner(q: Tensor, c: Candidates) -> Tensor:
    """`[..., Q, N]` inner products of queries `[..., Q, dim]` and candidates `[..., N, dim]`."""
    if isinstance(c, GatheredRows) and q.shape[-2] < FEW_QUERIES and _kernels(q) is not None:
        return pair_sums("dot", q, c)
    if isinstance(c, PackedRows) and q.dim() == 2:
        return c.products(q)
    if isinstance(c, GradAccumulatingRows) and q.dim() == 2:
        return cast(Tensor, _Product.apply(q, c.table, c.grad))  # type: ignore[no-untyped-call]
    return q @ plain(c).mT


class _Product(torch.autograd.Function):
    """`[Q, N]` inner products; the gradient of the candidates is added where it is collected, by the product itself.

    On a CPU they lie candidate by candidate: with some hundred queries that product is 1.2 to 2 times faster.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, table: Tensor, collected: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, table)
        ctx.collected = collected
        if q.device.type != "cpu":
            return q @ table.T
        scores = q.new_empty_strided((len(q), len(table)), (1, len(q)))
        torch.mm(table, q.T, out=scores.T)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        q, table = ctx.saved_tensors
        if ctx.collected is not None:
            ctx.collected.addmm_(grads[0].T, q)
        return grads[0] @ table if ctx.needs_input_grad[0] else None, None, None


def _kernels(q: Tensor) -> ModuleType | None:
    # What sums pairs of such queries without tiles.
    if pairs.available(q.device, q.dtype):
        return pairs
    return distances if runtime.chosen(q.device, q.dtype) else None


class _PairSums(torch.autograd.Function):
    """`[G, Q, N]` of queries `[G, Q, width]` and rows of a table `[m, dim]`: those `[G, N]` listed, or all in order."""

    @staticmethod
    def forward(
        ctx: Any,
        term: pairs.Kind,
        candidates: int,
        q: Tensor,
        table: Tensor,
        index: Tensor | None,
        ordered: distances.Sorted | None,
    ) -> Tensor:
        ctx.save_for_backward(q, table, index)
        ctx.term, ctx.ordered, kernels = term, ordered, _kernels(q)
        if kernels is not None:
            return cast(Tensor, kernels.forward(term, q, table, index, candidates))
        c = table.view(len(q), candidates, table.shape[-1])
        sums = q.new_empty(*q.shape[:2], candidates)
        for b, rows, columns in _tiles(sums.shape, c.shape[-1], q.device):
            sums[b, rows, columns] = summed(term, q[b, rows], c[b, columns])
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (q, table, index), (grad,) = ctx.saved_tensors, grads
        kernels = _kernels(q)
        if kernels is not None and not torch.is_grad_enabled():
            more = () if kernels is pairs else (ctx.ordered,)
            return None, None, *kernels.backward(ctx.term, q, table, index, grad, *more), None, None
        c = table.view(len(q), grad.shape[2], table.shape[1]) if index is None else plain(GatheredRows(table, index))
        of_q, of_c = _Pulled.apply(ctx.term, q, c, grad)  # type: ignore[no-untyped-call]
        if index is None:
            return None, None, of_q, of_c.view(table.shape), None, None
        of_rows = torch.zeros_like(table).index_add(0, index.flatten(), of_c.flatten(0, 1))
        return None, None, of_q, of_rows, None, None


class _Pulled(torch.autograd.Function):
    """`[G, Q, width]` and `[G, N, dim]`: gradients of the sums of queries and candidates for `[G, Q, N]` of these."""

    @staticmethod
    def forward(ctx: Any, term: pairs.Kind, q: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, c, grad)
        ctx.term = term
        of_q, of_c = torch.zeros_like(q), torch.zeros_like(c)
        for b, rows, columns in _tiles(grad.shape, c.shape[-1], q.device):
            more_q, more_c = pulled(term, q[b, rows], c[b, columns], grad[b, rows, columns])
            of_q[b, rows] += more_q
            of_c[b, columns] += more_c
        return of_q, of_c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        found = [torch.zeros_like(x) for x in given]
        for b, rows, columns in _tiles(given[2].shape, given[1].shape[-1], grads[0].device):
            places = (b, rows), (b, columns), (b, rows, columns)
            with torch.enable_grad():
                cut = [x[at].detach().requires_grad_() for x, at in zip(given, places, strict=True)]
                made = pulled(ctx.term, *cut)
            more = torch.autograd.grad(made, cut, [grad[at] for grad, at in zip(grads, places, strict=False)])
            for total, at, mine in zip(found, places, more, strict=True):
                total[at] += mine
        return None, *found


def _tiles(shape: torch.Size, num_coordinates: int, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts `[B, Q, N]` pairs of `num_coordinates` each into tiles, in order."""
    budget = max(1, (_CPU_TILE if device.type == "cpu" else _DEVICE_TILE) // max(1, num_coordinates))
    batch, queries, candidates = shape
    step_q = max(1, min(queries, _TILE_QUERIES, budget))
    step_n = max(1, min(candidates, budget // step_q))
    step_b = max(1, min(batch, budget // (step_q * step_n)))
    for b in range(0, batch, step_b):
        for q in range(0, queries, step_q):
            for n in range(0, candidates, step_n):
                yield slice(b, b + step_b), slice(q, q + step_q), slice(n, n + step_n)
