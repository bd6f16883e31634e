"""DualDE's terms of pairs of a student's and a teacher's numbers on a GPU, in one visit; elsewhere they are torch's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distkgd.kernels.triton import dualde as on_gpu
from distkgd.kernels.triton import runtime
from distkgd.kernels.triton.dualde import How

__all__ = ["How", "available", "shapes", "terms"]


def available(fields: Sequence[Tensor]) -> bool:
    """Whether the kernels can work on numbers like these here."""
    return fields[0].device.type != "cpu" and all(runtime.chosen(x.device, x.dtype) for x in fields)


def terms(how: How, alpha: Tensor, beta: Tensor, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """([2 learning, ...], [1 + learning, ...]) of pairs [..., n]: of the student, and of the teacher if it learns, the
    weighed soft and hard terms, summed over pairs; and what takes no gradient: how many pairs count, and the sum of
    the qualities of each one's soft labels.

    alpha, beta: [4]. fields: scores of student and teacher; then, with structure, their cosines, and the logarithms of
    their ratios of lengths. Pairs whose student's score is masked do not count.
    """
    found: tuple[Tensor, Tensor] = _Terms.apply(how, alpha, beta, *fields)  # type: ignore[no-untyped-call]
    return found


def shapes(anchor: Tensor, answer: Tensor, sign: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """([n, dim], [n, 2], [n], [n]) of rows [n, dim]: anchors over their norms, which are `least` at least; (sign · log
    norm, -sign) of anchors; cosines; sign · (log norm of the anchor - that of the answer)."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Shapes.apply(  # type: ignore[no-untyped-call]
        anchor.contiguous(), answer.contiguous(), sign, least
    )
    return found


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: How, alpha: Tensor, beta: Tensor, *fields: Tensor) -> tuple[Tensor, Tensor]:
        fields = tuple(x.contiguous() for x in fields)
        summed, seen = on_gpu.terms(how, alpha, beta, fields).split([2 * how.learning, 1 + how.learning])
        ctx.how = how
        ctx.set_materialize_grads(False)  # nobody pulls at the second
        ctx.save_for_backward(alpha, beta, *fields)
        ctx.mark_non_differentiable(seen)
        return summed, seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        runtime.refuse_second_order()
        alpha, beta, *fields = ctx.saved_tensors
        pulled, evaluators = on_gpu.pulls(ctx.how, alpha, beta, fields, grads[0])
        of_alpha, of_beta = evaluators.sum(-1) if ctx.needs_input_grad[1] else (None, None)
        return None, of_alpha, of_beta, *pulled


class _Shapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, answer: Tensor, sign: Tensor, least: float) -> tuple[Tensor, ...]:
        unit, asked, found = on_gpu.shapes(anchor, answer, sign, least)
        ctx.least = least
        ctx.save_for_backward(anchor, answer, sign, found)
        return unit, asked, found[0], found[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        runtime.refuse_second_order()
        anchor, answer, sign, found = ctx.saved_tensors
        return *on_gpu.unshaped(anchor, answer, sign, found, grads, ctx.least), None, None
