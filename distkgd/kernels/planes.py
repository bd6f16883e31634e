"""Sums of φ(q_k, c_k) over each of P equal blocks of coordinates on a CPU, and gradients: planes.cpp with tensors.

All sums are times `factor`. Shapes as there: q [groups, queries, dim], c [groups, candidates, dim], sums and their
gradient [P, groups, queries, candidates]. All contiguous, of one dtype, float32 or float64. Not scaled_manhattan.
"""

import torch
from torch import Tensor

from distkgd.kernels import build
from distkgd.kernels.build import NAMES, call
from distkgd.kernels.pairs import KINDS, Kind


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can work on such tensors here."""
    return build.available("planes", device, dtype)


def forward(kind: Kind, planes: int, factor: float, q: Tensor, c: Tensor) -> Tensor:
    """[planes, groups, queries, candidates]: the sums."""
    out = q.new_empty(planes, q.shape[0], q.shape[1], c.shape[1])
    _run(kind, planes, factor, q, c, None, out, None, None)
    return out


def backward(kind: Kind, factor: float, q: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and c for `grad`."""
    dq, dc = torch.empty_like(q), torch.empty_like(c)
    _run(kind, len(grad), factor, q, c, grad.contiguous(), None, dq, dc)
    return dq, dc


def _run(kind: Kind, planes: int, factor: float, q: Tensor, c: Tensor, *rest: Tensor | None) -> None:
    if kind == "scaled_manhattan":
        raise AssertionError(kind)
    groups, queries, dim = q.shape
    sizes = groups, queries, c.shape[1], planes, dim // planes
    call("planes", f"planes_{NAMES[q.dtype]}", KINDS.index(kind), q, c, float(factor), *sizes, *rest)
