"""Sums over each of P equal blocks of coordinates, for croppable models: `pair_sums` plane by plane, in one visit.

A plane of ten numbers fills no vector, and a product of ten coordinates costs more to write than to compute. Compiled
kernels (kernels/planes.py) let their lanes hold candidates, or sum a whole row and then its planes.
"""

from typing import Any, cast

import torch
from torch import Tensor

from distkgd.kernels import planes as kernels
from distkgd.kernels.pairs import Kind
from distkgd.scorers.sums.tiles import FEW_QUERIES, pair_sums


def plane_sums(term: Kind, factor: float, q: Tensor, c: Tensor, planes: int) -> Tensor:
    """`[planes, ..., Q, N]` factor · Σ_k φ of each plane of queries `[..., Q, dim]` and candidates `[..., N, dim]`.

    Leading dimensions are equal, or there are none of the candidates'. A result of its own, to be written over.
    """
    by_product = term == "dot" and (c.dim() == 2 or q.shape[-2] >= FEW_QUERIES)
    if not by_product and q.dtype == c.dtype and kernels.available(q.device, q.dtype):
        rows = c.reshape(-1, *c.shape[-2:]).contiguous()
        grouped = q.reshape(len(rows), -1, q.shape[-1]).contiguous()
        sums = cast(Tensor, _Compiled.apply(term, factor, planes, grouped, rows))  # type: ignore[no-untyped-call]
        return sums.reshape(planes, *q.shape[:-1], c.shape[-2])
    return _plane_by_plane(term, factor, q, c, planes)


def _plane_by_plane(term: Kind, factor: float, q: Tensor, c: Tensor, planes: int) -> Tensor:
    c = c.reshape(*[1] * (q.dim() - c.dim()), *c.shape)
    q, c = (x.unflatten(-1, (planes, -1)).movedim(-2, 0) for x in (q, c))
    if term == "dot":
        return q @ (c.mT if factor == 1 else factor * c.mT)
    return factor * pair_sums(term, q, c)


class _Compiled(torch.autograd.Function):
    """`[P, G, Q, N]` of queries `[G, Q, dim]` and candidates `[G, N, dim]`."""

    @staticmethod
    def forward(ctx: Any, term: Kind, factor: float, planes: int, q: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(q, c)
        ctx.term, ctx.factor = term, factor
        return kernels.forward(term, planes, factor, q, c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted
            sums = _plane_by_plane(ctx.term, ctx.factor, q, c, len(grads[0]))
            found = torch.autograd.grad(sums, (q, c), grads[0], create_graph=True)
        else:
            found = kernels.backward(ctx.term, ctx.factor, q, c, grads[0])
        return None, None, None, *found
