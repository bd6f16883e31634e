"""Sums over the candidates of nested models' scores on a CPU: nested.cpp with tensors, float32 and contiguous only.

Model i scores margin + b_0 + … + b_i of contributions b [P, ..., n]; a pair that does not count has b_0 near
MASKED_SCORE.
"""

from typing import Any

import torch
from torch import Tensor

from distkgd.kernels.build import call, library
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
        ctx.numbers, ctx.gaps = (*_sizes(b), float(margin), float(delta)), gaps
        _call("listwise", b, *ctx.numbers, sharp, lse, gap if gaps else None)
        ctx.save_for_backward(b, lse, sharp)
        return lse, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        b, lse, sharp = ctx.saved_tensors
        lse_grad, gap_grad = (g.contiguous() for g in grads)
        out = torch.empty_like(b)
        _call("listwise_pull", b, *ctx.numbers, sharp, lse, lse_grad, gap_grad if ctx.gaps else None, out)
        return out, None, None, None, None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, b: Tensor, margin: float, delta: float, gaps: bool, weighted: bool, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse, mean, gap = b.new_empty(b.shape[:-1]), b.new_empty(b.shape[:-1]), b.new_zeros(b.shape[:-1])
        ctx.numbers, ctx.gaps = (*_sizes(b), float(margin), float(delta), weighted, float(w)), gaps
        _call("pointwise", b, *ctx.numbers, lse, mean, gap if gaps else None)
        ctx.save_for_backward(b, lse, mean, w)
        return lse, mean, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, Tensor]:
        b, lse, mean, w = ctx.saved_tensors
        lse_grad, mean_grad, gap_grad = (g.contiguous() for g in grads)
        out, slope = torch.empty_like(b), b.new_empty(b.shape[1:-1])
        given = lse, mean, lse_grad, mean_grad, gap_grad if ctx.gaps else None
        _call("pointwise_pull", b, *ctx.numbers, *given, out, slope)
        return out, None, None, None, None, slope.sum().reshape(w.shape)


def _sizes(b: Tensor) -> tuple[int, int, int]:
    planes, n = b.shape[0], b.shape[-1]
    return planes, b[0].numel() // n, n


def _call(what: str, *arguments: Tensor | float | None) -> None:
    call("nested", f"nested_{what}", *arguments)
