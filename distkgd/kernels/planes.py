"""Sums of φ(q_k, c_k) over each of P equal blocks of coordinates on a CPU, and gradients: planes.cpp with tensors.

All sums are times `factor`. Shapes as there: q [groups, queries, dim], c [groups, candidates, dim], sums and their
gradient [P, groups, queries, candidates]. All contiguous, of one dtype, float32 or float64.
"""

import ctypes

import torch
from torch import Tensor

from distkgd.kernels.build import address, library
from distkgd.kernels.pairs import KINDS, Kind

_CALLS = {
    torch.float32: ("planes_float32", ctypes.c_float),
    torch.float64: ("planes_float64", ctypes.c_double),
}


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can work on such tensors here."""
    return device.type == "cpu" and dtype in _CALLS and library("planes") is not None


def forward(kind: Kind, planes: int, factor: float, q: Tensor, c: Tensor) -> Tensor:
    """[planes, groups, queries, candidates]: the sums."""
    out = q.new_empty(planes, q.shape[0], q.shape[1], c.shape[1])
    _run(kind, planes, factor, q, c, out=out)
    return out


def backward(kind: Kind, factor: float, q: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and c for `grad`."""
    dq, dc = torch.empty_like(q), torch.empty_like(c)
    _run(kind, len(grad), factor, q, c, grad=grad.contiguous(), dq=dq, dc=dc)
    return dq, dc


def _run(kind: Kind, planes: int, factor: float, q: Tensor, c: Tensor, **more: Tensor) -> None:
    name, real = _CALLS[q.dtype]
    groups, queries, dim = q.shape
    sizes = [ctypes.c_int64(n) for n in (groups, queries, c.shape[1], planes, dim // planes)]
    rest = [address(more.get(name)) for name in ("grad", "out", "dq", "dc")]
    if getattr(library("planes"), name)(KINDS.index(kind), address(q), address(c), real(factor), *sizes, *rest):
        raise AssertionError(kind)
