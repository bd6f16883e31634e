"""What is made of a block of scores: scores.cpp with tensors on a CPU, Triton on a GPU; float32 and contiguous only."""

from typing import Any

import torch
from torch import Tensor

from distkgd.kernels import build
from distkgd.kernels.build import call
from distkgd.kernels.triton import runtime
from distkgd.kernels.triton import scores as on_gpu


def available(z: Tensor) -> bool:
    """Whether the kernels can work on scores like `z` [..., n] here, on a CPU."""
    whole = z.dtype == torch.float32 and z.is_contiguous() and z.shape[-1] > 0
    return whole and build.available("scores", z.device, z.dtype)


def summable(*scores: Tensor) -> bool:
    """Whether `logsumexp` or, of two, `softmax_gap` can work on scores here: row by row, or [Q, n] by columns."""
    if scores[0].device.type != "cpu":
        return all(map(_on_gpu, scores))
    return all(map(available, scores)) or all(_by_columns(z) and available(z.T) for z in scores)


def softplus_summable(z: Tensor) -> bool:
    """Whether `softplus_sums` can work on scores here."""
    return z.device.type != "cpu" and _on_gpu(z)


def _on_gpu(z: Tensor) -> bool:
    return z.is_contiguous() and z.shape[-1] > 0 and runtime.chosen(z.device, z.dtype)


def logsumexp(z: Tensor, overwrite: bool = False) -> Tensor:
    """[...]: log of the sum of exp(z) of scores [..., n].

    overwrite: the gradient takes the place of the scores; nothing else may need them in backward.
    """
    found: Tensor = _LogSumExp.apply(z, overwrite)  # type: ignore[no-untyped-call]
    return found


def softmax_gap(student: Tensor, teacher: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """[...] each: the teacher's log-sum-exp, the mean of teacher - student under softmax(teacher), the student's lse.

    Scores [..., n]. overwrite: the gradient of the student's takes the place of the teacher's, which then have none.
    """
    found: tuple[Tensor, Tensor, Tensor] = _SoftmaxGap.apply(student, teacher, overwrite)  # type: ignore[no-untyped-call]
    return found


def softplus_sums(z: Tensor) -> tuple[Tensor, Tensor]:
    """[...] each, on a GPU: the sum of softplus(z) of scores [..., n], and how many of these count."""
    found: tuple[Tensor, Tensor] = _SoftplusSums.apply(z)  # type: ignore[no-untyped-call]
    return found


def count(z: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """[...] int64 each: how many scores of [..., n] are at most high [...], and how many are below low [...].

    A NaN is neither.
    """
    at_most, below = torch.empty_like(high, dtype=torch.int64), torch.empty_like(low, dtype=torch.int64)
    n = z.shape[-1]
    call("scores", "count", z, z.numel() // n, n, high.contiguous(), low.contiguous(), at_most, below)
    return at_most, below


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, overwrite: bool) -> Tensor:
        if z.device.type == "cpu":
            lse = z.new_empty(z.shape[:-1])
            _call("logsumexp", z, lse)
        else:
            (lse,) = on_gpu.sums("logsumexp", z)
        ctx.overwrite = overwrite
        ctx.save_for_backward(z, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grads[0].unsqueeze(-1) * torch.softmax(z, -1), None
        if z.device.type != "cpu":
            pulled, _ = on_gpu.pulls("logsumexp", z, None, lse, grads, (True, False))
            assert pulled is not None
            return pulled, None
        out = z.detach() if ctx.overwrite else torch.empty_like(z)
        _call("logsumexp_pull", z, lse, grads[0].contiguous(), _laid_out(out))
        return out, None


class _SoftmaxGap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        if student.device.type == "cpu":
            lse_t, gap, lse_z = (student.new_empty(student.shape[:-1]) for _ in range(3))
            _call("softmax_gap", student, _laid_out(teacher), lse_t, gap, lse_z)
        else:
            ctx.found = on_gpu.sums("gap", student, teacher)
            lse_t, gap, lse_z = ctx.found.unbind()
        ctx.overwrite = overwrite
        ctx.save_for_backward(student, teacher, lse_t, gap, lse_z)
        learns, teaches, _ = ctx.needs_input_grad
        ctx.mark_non_differentiable(*(x for x, needed in ((lse_t, teaches), (lse_z, learns)) if not needed))
        return lse_t, gap, lse_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        student, teacher, lse_t, gap, lse_z = ctx.saved_tensors
        learns, teaches, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            of_lse_t, of_gap, of_lse_z = (x.unsqueeze(-1) for x in grads)
            share = torch.softmax(teacher, -1)
            mean = (share * (teacher - student)).sum(-1, keepdim=True)
            pulled = of_lse_z * torch.softmax(student, -1) - of_gap * share
            pushed = share * (of_lse_t + of_gap * (1 + teacher - student - mean))
            return pulled if learns else None, pushed if teaches else None, None
        if student.device.type != "cpu":
            return *on_gpu.pulls("gap", student, teacher, ctx.found, grads, (learns, teaches)), None
        of_lse_t, of_gap, of_lse_z = (x.contiguous() for x in grads)
        pushed = torch.empty_like(teacher) if teaches else None
        if pushed is not None:
            _call("softmax_gap_teach", student, _laid_out(teacher), lse_t, gap, of_gap, of_lse_t, _laid_out(pushed))
        if not learns:
            return None, pushed, None
        pulled = teacher if ctx.overwrite else torch.empty_like(student)
        _call("softmax_gap_pull", student, _laid_out(teacher), lse_t, lse_z, of_gap, of_lse_z, _laid_out(pulled))
        return pulled, pushed, None


class _SoftplusSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        total, number = on_gpu.sums("softplus", z)
        ctx.save_for_backward(z)
        ctx.mark_non_differentiable(number)
        return total, number

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grads[0].unsqueeze(-1) * torch.sigmoid(z)
        pulled, _ = on_gpu.pulls("softplus", z, None, z, grads[:1], (True, False))
        assert pulled is not None
        return pulled


def _call(what: str, z: Tensor, *rest: Tensor) -> None:
    call("scores", what, _laid_out(z), _by_columns(z), z.numel() // z.shape[-1], z.shape[-1], *rest)


def _by_columns(z: Tensor) -> bool:
    return z.dim() == 2 and not z.is_contiguous() and z.T.is_contiguous()


def _laid_out(z: Tensor) -> Tensor:
    return z.T if _by_columns(z) else z
