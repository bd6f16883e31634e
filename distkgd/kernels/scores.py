"""What is made of a block of scores on a CPU: scores.cpp with tensors, float32 and contiguous only."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from distkgd.kernels.build import address, library


def available(z: Tensor) -> bool:
    """Whether the kernels can work on scores like `z` [..., n] here."""
    return (
        z.device.type == "cpu"
        and z.dtype == torch.float32
        and z.is_contiguous()
        and z.shape[-1] > 0
        and library("scores") is not None
    )


def logsumexp(z: Tensor) -> Tensor:
    """[...]: log of the sum of exp(z) of scores [..., n]; its gradient takes the place of the scores.

    So nothing else may need these scores in backward.
    """
    found: Tensor = _LogSumExp.apply(z)  # type: ignore[no-untyped-call]
    return found


def count(z: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """[...] int64 each: how many scores of [..., n] are above high [...], and how many are at least low [...]."""
    better, no_worse = torch.empty_like(high, dtype=torch.int64), torch.empty_like(low, dtype=torch.int64)
    high, low = high.contiguous(), low.contiguous()
    _call("count", z, address(high), address(low), address(better), address(no_worse))
    return better, no_worse


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        lse = z.new_empty(z.shape[:-1])
        _call("logsumexp", z, address(lse))
        ctx.z, ctx.lse = z.detach(), lse
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        z: Tensor = ctx.z
        ctx.z = None
        grad = grads[0].contiguous()
        _call("logsumexp_pull", z, address(ctx.lse), address(grad))
        return z


def _call(what: str, z: Tensor, *rest: Any) -> None:
    sizes = [ctypes.c_int64(n) for n in (z.numel() // z.shape[-1], z.shape[-1])]
    getattr(library("scores"), f"{what}_float32")(address(z), *sizes, *rest)
