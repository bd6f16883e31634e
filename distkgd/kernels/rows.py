"""Whole rows of a table on a CPU: rows.cpp with tensors. Each function has the torch call that it replaces beside it,
for where there is no kernel."""

from collections.abc import Mapping

from torch import Tensor

from distkgd.kernels import build
from distkgd.kernels.build import NAMES, call

_RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3}


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can work on such tensors here: contiguous, on the CPU, of one dtype."""
    first = tensors[0]
    alike = all(t.device == first.device and t.dtype == first.dtype and t.is_contiguous() for t in tensors)
    return alike and build.available("rows", first.device, first.dtype)


def take(table: Tensor, rows: Tensor) -> Tensor:
    """[n, dim]: rows [n] (int64) of a table [m, dim]."""
    if not available(table) or not rows.is_contiguous():
        return table.index_select(0, rows)
    out = table.new_empty(len(rows), table.shape[1])
    call("rows", f"take_{NAMES[table.dtype]}", table, rows, *out.shape, out)
    return out


def add(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [n, dim] to rows [n] (int64) of a table [m, dim], in place; a row may be named more than once."""
    if available(table, values) and rows.is_contiguous():
        call("rows", f"add_{NAMES[table.dtype]}", table, rows, *values.shape, values)
    else:
        table.index_add_(0, rows, values)


def update(
    name: str,
    table: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: float,
    clip: float,
    eps: float,
    betas: tuple[float, float],
    step: int,
) -> None:
    """One step of optimiser `name` on rows [n] of a table, or all, in place; formulas in distributed/optim/rows.py."""
    kinds = [*state.values(), None, None][:2]
    where = None if rows is None else rows.contiguous()
    numbers = map(float, (lr, clip, eps, *betas))
    sizes = len(grad), table.shape[1]
    call("rows", f"update_{NAMES[table.dtype]}", _RULES[name], table, where, *sizes, grad, *kinds, *numbers, step)
