"""Candidate rows without copies: listed by index, packed, or collecting their own gradient."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.kernels.packed import PackedRows
from distkgd.kernels.rows import Segments, add, take
from distkgd.kernels.triton import distances, runtime


@dataclass(frozen=True)
class GatheredRows:
    """Candidates that are rows of a table, without a copy of them.

    table: [m, entity_size]. index: [N] int64, the rows that all queries meet, or [groups, N], those of each group of
    queries. segments: of the ids of which the index holds those from place `first` on; the table has a row for each.
    """

    table: Tensor
    index: Tensor
    segments: Segments | None = None
    first: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the table."""
        return self.table.dtype

    def to(self, dtype: torch.dtype) -> "GatheredRows":
        """The same rows in another precision."""
        return self if dtype == self.table.dtype else replace(self, table=self.table.to(dtype))


@dataclass(frozen=True)
class GradAccumulatingRows:
    """Candidates whose gradient is added to `grad`, in place, by whatever scores them; autograd does not see them.

    table, grad: [N, entity_size], without gradient; no `grad` where none is wanted.
    """

    table: Tensor
    grad: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the table."""
        return self.table.dtype

    def to(self, dtype: torch.dtype) -> "GradAccumulatingRows | Tensor":
        """The same rows in another precision."""
        return self if dtype == self.table.dtype else plain(self).to(dtype)


# Rows [..., N, entity_size] that queries meet.
Candidates = Tensor | GatheredRows | GradAccumulatingRows | PackedRows


def plain(candidates: Candidates) -> Tensor:
    """`[..., N, entity_size]`: the rows themselves."""
    if isinstance(candidates, GatheredRows):
        if candidates.segments is not None:
            listed: Tensor = _Listed.apply(candidates.table, candidates)  # type: ignore[no-untyped-call]
            return listed
        return embedded(candidates.table, candidates.index)
    if isinstance(candidates, PackedRows):
        return candidates.take(slice(None))
    if isinstance(candidates, GradAccumulatingRows):
        if candidates.grad is None:
            return candidates.table
        rows: Tensor = _Collected.apply(candidates.table.detach().requires_grad_(), candidates.grad)  # type: ignore[no-untyped-call]
        return rows
    return candidates


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return table.view_as(table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.grad.add_(grads[0])
        return None, None


class _Listed(torch.autograd.Function):
    """The rows of a table that were sorted by their ids before: so are their gradients."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: GatheredRows) -> Tensor:
        ctx.rows, ctx.shape = rows, table.shape
        return take(table, rows.index.reshape(-1)).reshape(*rows.index.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        listed, segments = ctx.rows, ctx.rows.segments
        grad = grads[0].reshape(-1, ctx.shape[1])
        if torch.is_grad_enabled() or not runtime.chosen(grad.device, grad.dtype):
            return grad.new_zeros(ctx.shape).index_add(0, listed.index.reshape(-1), grad), None
        ordered = segments.order, segments.offsets, listed.first
        return distances.row_sums(grad.contiguous(), ordered, grad.new_empty(ctx.shape)), None


class Looked(torch.autograd.Function):
    """(rows [n, dim] of a table, the table): in backward the gradient of the few joins that of the table in place.

    The table's gradient must belong to nobody else: it may only be used for `GatheredRows` candidates, and whatever
    scores those makes a gradient of its own.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return take(table, ids), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        rows, table = grads
        if rows is None:
            return table, None
        if torch.is_grad_enabled():
            start = rows.new_zeros(ctx.shape) if table is None else table
            return start.index_add(0, ids, rows), None
        if table is None:
            table = rows.new_empty(ctx.shape).zero_()
        add(table, ids, rows.contiguous())
        return table, None


def looked_up(table: Tensor, ids: Tensor) -> Tensor:
    """[n, dim]: rows [n] of a table [m, dim]; differentiable any number of times."""
    rows: Tensor = Looked.apply(table, ids)[0]  # type: ignore[no-untyped-call]
    return rows


def embedded(table: Tensor, ids: Tensor) -> Tensor:
    """[..., dim]: rows [...] of a table [m, dim], as torch's own look-up has them, whose gradient on a GPU sorts."""
    if table.device.type == "cpu":
        return F.embedding(ids, table)
    return looked_up(table, ids.reshape(-1)).reshape(*ids.shape, table.shape[1])
