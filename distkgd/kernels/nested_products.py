"""Sums over the candidates of nested models' scores on a CPU, their contributions never in memory: nested_products.cpp
with tensors, float32 only.

Model i scores margin + b_0 + … + b_i, b_i the inner product of the i-th of P equal blocks of columns.
"""

from typing import Any

import torch
from torch import Tensor

from distkgd.kernels import build
from distkgd.kernels.build import call

MASKED_SCORE = -1e30  # as in distributed/reductions/candidate_layout.py
_TILE, _SLABS = 256, 8  # kTile and kSlabs there


def available(queries: Tensor) -> bool:
    """Whether the kernels can work on queries like these here."""
    return queries.dtype == torch.float32 and build.available("nested_products", queries.device, queries.dtype)


class Products:
    """The contributions of all pairs of queries [Q, dim] and candidates [N, dim], not made but summed: P planes.

    What is summed first is kept: whoever asks again asks for the same. No second derivatives.
    """

    def __init__(self, queries: Tensor, rows: Tensor, planes: int) -> None:
        self.queries, self.rows, self.planes = queries.contiguous(), rows.contiguous(), planes
        self._skipped: tuple[Tensor | None, Tensor | None] = None, None
        self._found: tuple[Tensor, ...] = ()

    def leave_out(self, query: Tensor, candidate: Tensor) -> None:
        """These pairs ([p], [p] int64) do not count."""
        pairs = torch.unique(query * len(self.rows) + candidate)
        query = torch.div(pairs, max(1, len(self.rows)), rounding_mode="floor")
        stops = torch.bincount(query, minlength=len(self.queries)).cumsum(0)
        self._skipped = torch.cat([stops.new_zeros(1), stops]), pairs - query * len(self.rows)

    def count(self) -> Tensor:
        """[Q]: candidates that count."""
        starts, _ = self._skipped
        all_of_them = self.queries.new_full((len(self.queries),), len(self.rows))
        return all_of_them if starts is None else all_of_them - starts.diff()

    def listwise(self, margin: float, delta: float, gaps: bool, sharp: Tensor) -> tuple[Tensor, ...]:
        """As `nested.listwise`: [P, Q] each."""
        return self._found or self._sum(None, margin, delta, gaps, False, sharp)

    def pointwise(self, margin: float, delta: float, gaps: bool, weighted: bool, w: Tensor) -> tuple[Tensor, ...]:
        """As `nested.pointwise`: [P, Q] each."""
        return self._found or self._sum(w, margin, delta, gaps, weighted, None)

    def _sum(self, w: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        if len(self.rows):
            where = self.planes, *self._skipped
            self._found = _Sums.apply(self.queries, self.rows, w, *where, *given)  # type: ignore[no-untyped-call]
        else:
            # Sums, not constants: a rank without candidates has to take part in the exchanges of backward.
            nothing = (0.0 * self.queries.sum(1) + 0.0 * self.rows.sum()).expand(self.planes, -1)
            self._found = (nothing + MASKED_SCORE, *([nothing] if w is None else [nothing, nothing]))
        return self._found


class _Sums(torch.autograd.Function):
    """lse, mean unless w is None, and gap."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, rows: Tensor, w: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        planes, starts, skipped, margin, delta, gaps, weighted, sharp = given
        (num, dim), n = queries.shape, len(rows)
        turned = rows.new_empty(-(-n // _TILE), dim, _TILE)
        _call("_turn", rows, n, dim, turned)
        lse, gap, *of_w = queries.new_empty(2 if w is None else 5, planes, num)
        power = 0.0 if w is None else float(w.detach())
        sizes = num, n, planes, dim // planes
        ctx.given = *sizes, float(margin), float(delta), gaps, starts, skipped, weighted, power, sharp
        mean, mean_w, lse_w = of_w or (None, None, None)
        # The largest model's scores, unless nobody will go back.
        z = queries.new_empty(num, len(turned), _TILE) if any(ctx.needs_input_grad) else None
        _call("", queries, turned, *ctx.given, lse, gap, mean, mean_w, lse_w, z)
        ctx.save_for_backward(queries, turned, lse, mean_w, lse_w, z)
        ctx.shape = None if w is None else w.shape
        return (lse, gap) if mean is None else (lse, mean, gap)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, turned, lse, mean_w, lse_w, z = ctx.saved_tensors
        of_lse, *of_mean, of_gap = (g.contiguous() for g in grads)
        parts = queries.new_empty(_SLABS, *queries.shape)
        of_queries, of_rows = torch.empty_like(queries), queries.new_empty(ctx.given[1], queries.shape[1])
        mean = of_mean[0] if of_mean else None
        _call("_pull", queries, turned, *ctx.given, lse, z, of_lse, of_gap, mean, parts, of_queries, of_rows)
        slope = None if mean is None else (of_lse * lse_w + mean * mean_w).sum().reshape(ctx.shape)
        return of_queries, of_rows, slope, *[None] * 8


def _call(what: str, *arguments: Tensor | float | None) -> None:
    call("nested_products", f"nested_products{what}", *arguments)
