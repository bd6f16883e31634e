"""Sums over the candidates of nested models' scores on a CPU: nested.cpp with tensors, float32 and contiguous only.

Model i scores margin + b_0 + … + b_i of contributions b [P, ..., n]; a pair that does not count has b_0 near NEVER.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from distkgd.kernels.build import address, library
from distkgd.kernels.scores import available as scores_available


def available(b: Tensor) -> bool:
    """Whether the kernels can work on contributions like `b` here."""
    return scores_available(b) and library("nested") is not None


def listwise(b: Tensor, margin: float, delta: float, gaps: bool, sharp: Tensor) -> tuple[Tensor, Tensor]:
    """[P, ...] each: log-sum-exp of each model's scores; sum of Huber's loss of b_i, 0 for i = 0 and without `gaps`.

    sharp: [P], 1 or more, what the scores are multiplied by in the former. No second derivatives.
    """
    found: tuple[Tensor, Tensor] = _Listwise.apply(b, margin, delta, gaps, sharp)  # type: ignore[no-untyped-call]
    return found


def pointwise(
    b: Tensor, margin: float, delta: float, gaps: bool, weighted: bool, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[P, ...] each: log of the sum of weights, mean of softplus under them, and gaps as in `listwise`.

    The weights of model i are exp(w * scores of model i - 1), those scores detached; of the first model, and of all
    unless `weighted`, 1. w: [], may take a gradient. No second derivatives.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Pointwise.apply(b, margin, delta, gaps, weighted, w)  # type: ignore[no-untyped-call]
    return found


class _Listwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, margin: float, delta: float, gaps: bool, sharp: Tensor) -> tuple[Tensor, Tensor]:
        lse, gap = b.new_empty(b.shape[:-1]), b.new_zeros(b.shape[:-1])
        ctx.numbers = [*_sizes(b), ctypes.c_float(margin), ctypes.c_float(delta)]
        ctx.gaps = gaps
        _call("listwise", address(b), *ctx.numbers, address(sharp), address(lse), address(gap) if gaps else None)
        ctx.save_for_backward(b, lse, sharp)
        return lse, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        b, lse, sharp = ctx.saved_tensors
        lse_grad, gap_grad = (g.contiguous() for g in grads)
        out = torch.empty_like(b)
        given = [address(sharp), address(lse), address(lse_grad), address(gap_grad) if ctx.gaps else None]
        _call("listwise_pull", address(b), *ctx.numbers, *given, address(out))
        return out, None, None, None, None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, b: Tensor, margin: float, delta: float, gaps: bool, weighted: bool, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse, mean, gap = b.new_empty(b.shape[:-1]), b.new_empty(b.shape[:-1]), b.new_zeros(b.shape[:-1])
        ctx.numbers = [*_sizes(b), ctypes.c_float(margin), ctypes.c_float(delta)]
        ctx.numbers += [ctypes.c_int64(weighted), ctypes.c_float(float(w))]
        ctx.gaps = gaps
        out = [address(lse), address(mean), address(gap) if gaps else None]
        _call("pointwise", address(b), *ctx.numbers, *out)
        ctx.save_for_backward(b, lse, mean, w)
        return lse, mean, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, Tensor]:
        b, lse, mean, w = ctx.saved_tensors
        lse_grad, mean_grad, gap_grad = (g.contiguous() for g in grads)
        out, slope = torch.empty_like(b), b.new_empty(b.shape[1:-1])
        given = [address(x) for x in (lse, mean, lse_grad, mean_grad)]
        given += [address(gap_grad) if ctx.gaps else None, address(out), address(slope)]
        _call("pointwise_pull", address(b), *ctx.numbers, *given)
        return out, None, None, None, None, slope.sum().reshape(w.shape)


def _sizes(b: Tensor) -> list[ctypes.c_int64]:
    planes, n = b.shape[0], b.shape[-1]
    return [ctypes.c_int64(x) for x in (planes, b[0].numel() // n, n)]


def _call(what: str, *arguments: Any) -> None:
    getattr(library("nested"), f"nested_{what}_float32")(*arguments)
