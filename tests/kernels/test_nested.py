"""Sums of nested models' scores by the kernel, against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE
from distkgd.kernels import nested
from distkgd.methods.losses.scores import huber

MARGIN, DELTA, W = 3.0, 0.7, 0.8
SIZES = pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 1500])

pytestmark = pytest.mark.skipif(not nested.available(torch.zeros(1, 1, 1)), reason="no C++ compiler here")


class Case:
    """[5, 2, 3, n] contributions, three tenths of the pairs and one whole row left out, and the scores they make."""

    def __init__(self, n: int) -> None:
        made = torch.Generator().manual_seed(n)
        b = torch.randn(5, 2, 3, n, generator=made) * 1.3
        absent = torch.rand(2, 3, n, generator=made) < 0.3
        absent[0, 0] = True
        b[:, absent] = MASKED_SCORE
        self.b = b.requires_grad_()
        self.kept = ~absent.all(-1)
        self.exact = b.detach().double().requires_grad_()
        self.z = MARGIN + self.exact.cumsum(0)
        self.here = (~absent).double()
        self.gap = (huber(self.exact, DELTA) * self.here).sum(-1) * torch.tensor([0.0, 1, 1, 1, 1]).reshape(5, 1, 1)
        self.upstream = torch.randn(3, 5, 2, 3, generator=made) * self.kept

    def same_gradients(self, found: list[Tensor], expected: list[Tensor], w: list[Tensor] | None = None) -> None:
        """Of sums of outputs with the same random weights; nothing is asked of the row without candidates."""
        sums = [
            sum((torch.where(self.kept, x, 0.0) * g).sum() for x, g in zip(side, self.upstream, strict=False))
            for side in (found, expected)
        ]
        inputs = [[self.b], [self.exact]] if w is None else [[self.b, w[0]], [self.exact, w[1]]]
        grads = [torch.autograd.grad(s, i, allow_unused=True) for s, i in zip(sums, inputs, strict=True)]
        for mine, naive in zip(*grads, strict=True):
            theirs = torch.zeros_like(mine) if naive is None else naive
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=3e-5, atol=1e-5)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=3e-6)


@SIZES
def test_log_sum_exps_and_gaps_of_nested_models(n: int) -> None:
    case = Case(n)
    sharp = torch.tensor([2.0, 1.5, 1.2, 1.1, 1.0])
    lse, gap = nested.listwise(case.b, MARGIN, DELTA, True, sharp)
    expected = torch.logsumexp(case.z * sharp.reshape(-1, 1, 1, 1), -1)
    close(lse[:, case.kept], expected[:, case.kept])
    assert (lse[:, ~case.kept] < MASKED_SCORE / 2).all()
    close(gap, case.gap)
    case.same_gradients([lse, gap], [expected, case.gap])


@SIZES
@pytest.mark.parametrize("weighted", [True, False])
def test_means_under_the_weights_of_the_model_before(weighted: bool, n: int) -> None:
    case = Case(n)
    w = torch.tensor(W, requires_grad=True)
    exact = w.detach().double().requires_grad_()
    even = (1.0 - case.here).expand_as(case.z) * MASKED_SCORE
    logit = even
    if weighted:
        logit = torch.cat([even[:1], torch.where(case.here > 0, exact * case.z[:-1].detach(), MASKED_SCORE)])
    lse, mean, gap = nested.pointwise(case.b, MARGIN, DELTA, True, weighted, w)
    expected = torch.logsumexp(logit, -1)
    average = (torch.softmax(logit, -1) * F.softplus(case.z)).sum(-1)
    close(lse[:, case.kept], expected[:, case.kept])
    close(mean, average)
    close(gap, case.gap)
    case.same_gradients([lse, mean, gap], [expected, average, case.gap], [w, exact])


def test_without_gaps_nothing_of_them_is_in_the_gradient() -> None:
    case = Case(40)
    lse, gap = nested.listwise(case.b, MARGIN, DELTA, False, torch.ones(5))
    assert not gap.any()
    case.same_gradients([lse, gap], [torch.logsumexp(case.z, -1), 0.0 * case.gap])


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    b = torch.tensor([[500.0, -500.0, 0.0], [-400.0, 300.0, 80.0]]).unsqueeze(1)
    z = b.double().cumsum(0)
    lse, _ = nested.listwise(b, 0.0, DELTA, True, torch.ones(2))
    close(lse, torch.logsumexp(z, -1))
    lse, mean, _ = nested.pointwise(b, 0.0, DELTA, True, True, torch.tensor(2.0))
    close(lse[1], torch.logsumexp(2.0 * z[0], -1))
    close(mean[1], (torch.softmax(2.0 * z[0], -1) * F.softplus(z[1])).sum(-1))
