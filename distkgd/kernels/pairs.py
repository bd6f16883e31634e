"""Σ_k φ(q_k, c_k) of (query, candidate) pairs on a CPU, and its gradients: pairs.cpp with tensors.

Shapes as there: q [groups, queries, width], table [rows, dim], index [groups, candidates] int64 or None, sums and
their gradient [groups, queries, candidates]. All contiguous, of one dtype, float32 or float64.
"""

from typing import Literal

import torch
from torch import Tensor

from distkgd.kernels import build
from distkgd.kernels.build import NAMES, call

Kind = Literal["dot", "square", "manhattan", "scaled_manhattan", "modulus"]
KINDS: tuple[Kind, ...] = ("dot", "square", "manhattan", "scaled_manhattan", "modulus")


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can work on such tensors here."""
    return build.available("pairs", device, dtype)


def forward(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, candidates: int) -> Tensor:
    """[groups, queries, candidates]: the sums."""
    out = q.new_empty(q.shape[0], q.shape[1], candidates)
    _run(kind, q, table, index, candidates, None, out, None, None)
    return out


def backward(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and of the table for `grad`; a row that the index names often has its gradients added up."""
    dq, dtable = torch.empty_like(q), torch.empty_like(table)
    _run(kind, q, table, index, grad.shape[2], grad.contiguous(), None, dq, dtable)
    return dq, dtable


def _run(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, candidates: int, *rest: Tensor | None) -> None:
    sizes = q.shape[0], q.shape[1], candidates, table.shape[1], q.shape[2], table.shape[0]
    call("pairs", f"pairs_{NAMES[q.dtype]}", KINDS.index(kind), q, table, index, *sizes, *rest)
