"""Whole rows of a table on a CPU: rows.cpp with tensors. Each function has the torch call that it replaces beside it,
for where there is no kernel."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from distkgd.kernels.build import address, library

_NAMES = {torch.float32: "float32", torch.float64: "float64"}
_RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3}


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can work on such tensors here: contiguous, on the CPU, of one dtype."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in _NAMES
        and all(t.device == first.device and t.dtype == first.dtype and t.is_contiguous() for t in tensors)
        and library("rows") is not None
    )


def take(table: Tensor, rows: Tensor) -> Tensor:
    """[n, dim]: rows [n] (int64) of a table [m, dim]."""
    if not available(table) or not rows.is_contiguous():
        return table.index_select(0, rows)
    out = table.new_empty(len(rows), table.shape[1])
    _call("take", table, rows, out)
    return out


def add(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [n, dim] to rows [n] (int64) of a table [m, dim], in place; a row may be named more than once."""
    if available(table, values) and rows.is_contiguous():
        _call("add", table, rows, values)
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
    kinds = [*map(address, state.values()), None, None][:2]
    numbers = [ctypes.c_double(x) for x in (lr, clip, eps, *betas)]
    sizes = [ctypes.c_int64(n) for n in (len(grad), table.shape[1])]
    call = getattr(library("rows"), f"update_{_NAMES[table.dtype]}")
    where = None if rows is None else address(rows.contiguous())
    call(_RULES[name], address(table), where, *sizes, address(grad), *kinds, *numbers, ctypes.c_int64(step))


def _call(what: str, table: Tensor, rows: Tensor, values: Tensor) -> None:
    sizes = [ctypes.c_int64(n) for n in (len(rows), table.shape[1])]
    call = getattr(library("rows"), f"{what}_{_NAMES[table.dtype]}")
    call(address(table), address(rows), *sizes, address(values))
