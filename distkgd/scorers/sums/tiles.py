"""Sums over coordinates that no matrix product can give, in bounded memory.

L1, RotatE and PairRE need Σ_k φ(q_k, c_k) for every (query, candidate) pair. Broadcasting that is a
`[Q, N, k]` tensor, 40 GB for an ordinary batch. Compiled kernels (kernels/pairs.py) sum it pair by pair. Where
there is none, the pairs are cut into tiles that fit a cache; a tile is summed and forgotten, and backward
visits the tiles again. Memory is O(Q·N) for the result plus one tile.

Why not `torch.cdist(p=1)`: it has no formula for RotatE and PairRE, no second derivative (MetaSD needs one),
its CUDA backward allocates the very `[N, Q, k]` buffer that must not exist, and on one CPU core it was
measured two to three times slower than these tiles.

Sums run in a fixed order: tiles are visited in order and no kernel adds through atomics. Tile sizes depend on
the shapes and the kind of device only, never on the number of threads.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distkgd.kernels import pairs
from distkgd.kernels.candidates import Candidates, GatheredRows, GradAccumulatingRows, plain
from distkgd.kernels.packed import PackedRows
from distkgd.kernels.triton import distances, runtime
from distkgd.scorers.sums.terms import Dot, Parts, Term

# Elements of one [queries, candidates, coordinates] tile. On a CPU it should stay in the second-level cache;
# on an accelerator it must be large enough to hide the cost of launching a kernel (64 MB in float32).
_CPU_TILE = 2**18
_DEVICE_TILE = 2**24
# Enough queries to reuse each candidate row while it is in cache.
_TILE_QUERIES = 16
# With fewer queries per list of candidates, copying the listed rows costs more than what a matrix product saves.
FEW_QUERIES = 4


def pair_sums(term: Term, q: Tensor, c: Candidates) -> Tensor:
    """`[..., Q, N]` Σ_k φ of queries `[..., Q, width]` and candidates `[..., N, dim]`.

    Leading dimensions broadcast. Half precision is summed in float32 and rounded once, at the end.
    """
    dtype = torch.promote_types(q.dtype, c.dtype)
    q, c = q.to(torch.promote_types(dtype, torch.float32)), c.to(torch.promote_types(dtype, torch.float32))
    if not _has_kernels(q):
        return _tiled(term, q, plain(c)).to(dtype)
    return _compiled(term, q, c).to(dtype)


def _has_kernels(q: Tensor) -> bool:
    return pairs.available(q.device, q.dtype) or runtime.chosen(q.device)


def inner(q: Tensor, c: Candidates) -> Tensor:
    """`[..., Q, N]` inner products of queries `[..., Q, dim]` and candidates `[..., N, dim]`."""
    if isinstance(c, GatheredRows) and q.shape[-2] < FEW_QUERIES and _has_kernels(q):
        return _compiled(Dot(), q, c)
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


def _compiled(term: Term, q: Tensor, c: Candidates) -> Tensor:
    if isinstance(c, GatheredRows):
        index = c.index.reshape(-1, c.index.shape[-1]).contiguous()
        grouped = q.reshape(len(index), q.shape[-2], q.shape[-1]).contiguous()
        listed = _Compiled.apply(term, index.shape[1], grouped, c.table.contiguous(), index)  # type: ignore[no-untyped-call]
        return cast(Tensor, listed).reshape(*q.shape[:-1], index.shape[1])
    c = plain(c)
    lead = torch.broadcast_shapes(q.shape[:-2], c.shape[:-2])
    queries, candidates = q.shape[-2], c.shape[-2]
    if c.shape[:-2].numel() == 1:
        # All queries meet the same candidates: one long list of queries instead of a batch of short ones.
        grouped = q.reshape(1, -1, q.shape[-1])
    else:
        grouped = q.expand(*lead, *q.shape[-2:]).reshape(lead.numel(), *q.shape[-2:])
        c = c.expand(*lead, *c.shape[-2:])
    table = c.reshape(-1, c.shape[-1]).contiguous()
    sums = cast(Tensor, _Compiled.apply(term, candidates, grouped.contiguous(), table, None))  # type: ignore[no-untyped-call]
    return sums.reshape(*lead, queries, candidates)


class _Compiled(torch.autograd.Function):
    """`[G, Q, N]` of queries `[G, Q, width]` and rows of a table `[m, dim]`: those `[G, N]` listed, or all in order."""

    @staticmethod
    def forward(ctx: Any, term: Term, candidates: int, q: Tensor, table: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, table, index)
        ctx.term = term
        on = distances if q.is_cuda else pairs
        sums: Tensor = on.forward(term.kind, q, table, index, candidates)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, table, index = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted: by the formula in plain torch
            rows = table.reshape(len(q), -1, table.shape[-1]) if index is None else plain(GatheredRows(table, index))
            found = torch.autograd.grad(_tiled(ctx.term, q, rows), (q, table), grads[0], create_graph=True)
        else:
            on = distances if q.is_cuda else pairs
            found = on.backward(ctx.term.kind, q, table, index, grads[0])
        return None, None, *found, None


def _tiled(term: Term, q: Tensor, c: Tensor) -> Tensor:
    lead = torch.broadcast_shapes(q.shape[:-2], c.shape[:-2])
    queries, candidates = q.shape[-2], c.shape[-2]
    shared = c.shape[:-2].numel() == 1
    query_parts, candidate_parts = term.query_parts(q), term.candidate_parts(c)
    if not shared:
        query_parts = tuple(part.expand(*lead, *part.shape[-2:]) for part in query_parts)
        candidate_parts = tuple(part.expand(*lead, *part.shape[-2:]) for part in candidate_parts)
    groups = 1 if shared else lead.numel()
    parts = [part.reshape(groups, -1, part.shape[-1]).contiguous() for part in query_parts + candidate_parts]
    sums = cast(Tensor, _PairSums.apply(term, len(query_parts), *parts))  # type: ignore[no-untyped-call]
    return sums.reshape(*lead, queries, candidates)


class _PairSums(torch.autograd.Function):
    """`_tiled` on parts `[B, Q, k]` and `[B, N, k]` of one dtype."""

    @staticmethod
    def forward(ctx: Any, term: Term, num_query_parts: int, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.term, ctx.num_query_parts = term, num_query_parts
        q, c = parts[:num_query_parts], parts[num_query_parts:]
        sums = q[0].new_empty(q[0].shape[0], q[0].shape[1], c[0].shape[1])
        for tile in _tiles(sums.shape, q[0].shape[2], q[0].device):
            sums[tile] = term.value(*_cut(q, c, tile))
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts: Parts = ctx.saved_tensors
        q, c = parts[: ctx.num_query_parts], parts[ctx.num_query_parts :]
        (g,) = grads
        pulled = _Gathered(len(q), len(c))
        for tile in _tiles(g.shape, q[0].shape[2], g.device):
            arguments = (*_cut(q, c, tile), g[tile].unsqueeze(-1))
            if torch.is_grad_enabled():
                # Second derivatives: keep the tile's inputs, not its intermediates.
                found = checkpoint(ctx.term.pull, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                found = ctx.term.pull(*arguments)
            pulled.add(tile, *found)
        return None, None, *pulled.finish(parts)


Tile = tuple[slice, slice, slice]


class _Gathered:
    """Gradients of the parts, summed tile by tile without writing in place (autograd may be watching)."""

    def __init__(self, num_query_parts: int, num_candidate_parts: int) -> None:
        self._num_query_parts = num_query_parts
        self._rows: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(num_query_parts + num_candidate_parts)]

    def add(self, tile: Tile, q: Parts, c: Parts) -> None:
        for index, part in enumerate(q + c):
            rows = self._rows[index]
            key = (tile[0].start, tile[1 if index < self._num_query_parts else 2].start)
            rows[key] = rows[key] + part if key in rows else part

    def finish(self, parts: Parts) -> Iterator[Tensor]:
        """One gradient per part, in the shape of that part."""
        for part, rows in zip(parts, self._rows, strict=True):
            if not rows:
                yield torch.zeros_like(part)
                continue
            batches: dict[int, list[Tensor]] = {}
            for (batch, _), row in rows.items():
                batches.setdefault(batch, []).append(row)
            yield torch.cat([torch.cat(blocks, dim=1) for blocks in batches.values()])


def _tiles(shape: torch.Size, num_coordinates: int, device: torch.device) -> Iterator[Tile]:
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


def _cut(q: Parts, c: Parts, tile: Tile) -> tuple[Parts, Parts]:
    b, rows, columns = tile
    return (
        tuple(part[b, rows].unsqueeze(2) for part in q),
        tuple(part[b, columns].unsqueeze(1) for part in c),
    )
