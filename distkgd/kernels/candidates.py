"""Candidate rows without copies: listed by index, packed, or collecting their own gradient."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.kernels.packed import PackedRows


@dataclass(frozen=True)
class GatheredRows:
    """Candidates that are rows of a table, without a copy of them.

    table: [m, entity_size]. index: [N] int64, the rows that all queries meet, or [groups, N], those of each group of
    queries.
    """

    table: Tensor
    index: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the table."""
        return self.table.dtype

    def to(self, dtype: torch.dtype) -> "GatheredRows":
        """The same rows in another precision."""
        return self if dtype == self.table.dtype else GatheredRows(self.table.to(dtype), self.index)


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
        return F.embedding(candidates.index, candidates.table)
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
