"""Whole rows of a table: rows.cpp with tensors on a CPU, Triton on a GPU. Each function has the torch call that it
replaces beside it, for where there is no kernel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distkgd.kernels import build
from distkgd.kernels.build import NAMES, call
from distkgd.kernels.triton import rows as on_gpu
from distkgd.kernels.triton import runtime
from distkgd.kernels.triton.rows import Segments, StepNumbers, segments

__all__ = ["Segments", "StepNumbers", "add", "available", "directions", "segments", "sortable", "take", "update"]

_RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3}


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can work on such tensors here: contiguous, on one device, of one dtype."""
    first = tensors[0]
    alike = all(t.device == first.device and t.dtype == first.dtype and t.is_contiguous() for t in tensors)
    return alike and (build.available("rows", first.device, first.dtype) or runtime.chosen(first.device, first.dtype))


def directions(rows: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """([n, dim], [n]): rows over their norms, and the logarithms of these; norms are `least` at least."""
    if rows.device.type != "cpu" and runtime.chosen(rows.device, rows.dtype):
        found: tuple[Tensor, Tensor] = _Directions.apply(rows.contiguous(), least)  # type: ignore[no-untyped-call]
        return found
    norms = torch.linalg.vector_norm(rows, dim=-1).clamp(min=least)
    return rows / norms.unsqueeze(-1), norms.log()


class _Directions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, least: float) -> tuple[Tensor, Tensor]:
        unit, length = on_gpu.directions(rows, least)
        ctx.save_for_backward(unit, length)
        ctx.least = least
        return unit, length

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        runtime.refuse_second_order()
        unit, length = ctx.saved_tensors
        return on_gpu.undirected(unit, length, grads[0], grads[1], ctx.least), None


def sortable(ids: Tensor) -> bool:
    """Whether `segments` can work on ids here: on a GPU."""
    return 0 < len(ids) <= on_gpu.MOST and runtime.chosen(ids.device, torch.float32)


def take(table: Tensor, rows: Tensor) -> Tensor:
    """[n, dim]: rows [n] (int64) of a table [m, dim]."""
    if table.device.type != "cpu" or not available(table) or not rows.is_contiguous():
        return table.index_select(0, rows)
    out = table.new_empty(len(rows), table.shape[1])
    call("rows", f"take_{NAMES[table.dtype]}", table, rows, *out.shape, out)
    return out


def add(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [n, dim] to rows [n] (int64) of a table [m, dim], in place; a row may be named more than once."""
    if not available(table, values) or not rows.is_contiguous():
        table.index_add_(0, rows, values)
    elif table.device.type == "cpu":
        call("rows", f"add_{NAMES[table.dtype]}", table, rows, *values.shape, values)
    else:
        on_gpu.add(table, rows, values)


def update(
    name: str,
    table: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    state: Mapping[str, Tensor],
    numbers: StepNumbers,
) -> None:
    """One step of optimiser `name` on rows [n] of a table, or all, in place; formulas in distributed/optim/rows.py.

    On a GPU a row may be repeated, without others between: the first gradient counts.
    """
    where = None if rows is None else rows.contiguous()
    if table.device.type != "cpu":
        on_gpu.update(name, table, where, grad, state, numbers)
        return
    kinds = [*state.values(), None, None][:2]
    lr, clip, eps, betas, step = numbers
    rates = map(float, (lr, clip, eps, *betas))
    sizes = len(grad), table.shape[1]
    call("rows", f"update_{NAMES[table.dtype]}", _RULES[name], table, where, *sizes, grad, *kinds, *rates, step)
