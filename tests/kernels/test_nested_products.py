"""Sums of nested models' scores without their contributions, beside the same sums of contributions that are made."""

import pytest
import torch
from torch import Tensor

from distkgd.kernels import nested_products
from distkgd.kernels.nested_products import MASKED_SCORE, Products
from distkgd.methods.losses.scores import huber

pytestmark = pytest.mark.skipif(not nested_products.available(torch.zeros(1, 1)), reason="no C++ compiler here")
SHAPES = [(1, 1, 2, 2), (5, 64, 3, 6), (37, 150, 5, 10), (16, 700, 16, 8)]  # queries, candidates, planes, width
MARGIN, DELTA = 0.3, 0.7


def spelled_out(
    q: Tensor, c: Tensor, planes: int, skipped: Tensor, w: Tensor | None, weighted: bool, sharp: Tensor
) -> tuple[Tensor, ...]:
    """lse, mean unless w is None, gap, by the formulas, in float64."""
    b = torch.einsum("qpk,npk->pqn", q.unflatten(1, (planes, -1)), c.unflatten(1, (planes, -1)))
    z = (MARGIN + b.cumsum(0)).masked_fill(skipped, MASKED_SCORE)
    gap = huber(b, DELTA).masked_fill(skipped, 0.0).sum(-1)
    gap = torch.cat([0.0 * gap[:1], gap[1:]])
    if w is None:
        return torch.logsumexp(sharp.reshape(-1, 1, 1) * z, -1), gap
    even = torch.zeros_like(z[:1]).masked_fill(skipped, MASKED_SCORE)
    logit = torch.cat([even, w * z[:-1].detach()]) if weighted else even.expand_as(z)
    logit = logit.masked_fill(skipped, MASKED_SCORE)
    mean = (torch.softmax(logit, -1) * torch.nn.functional.softplus(z)).sum(-1)
    return torch.logsumexp(logit, -1), mean, gap


@pytest.mark.parametrize("how", ["listwise", "pointwise", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gradients_are_those_of_the_formulas(shape: tuple[int, int, int, int], how: str) -> None:
    queries, candidates, planes, width = shape
    draw = torch.Generator().manual_seed(0)
    q, c = (torch.randn(n, planes * width, generator=draw) * 0.6 for n in (queries, candidates))
    skipped = torch.rand(queries, candidates, generator=draw) < 0.2
    skipped[:, 0] = False
    sharp = torch.linspace(2.0, 1.0, planes)
    results = []
    for dtype in (torch.float32, torch.float64):
        mine, theirs = (x.clone().to(dtype).requires_grad_() for x in (q, c))
        w = None if how == "listwise" else torch.tensor(0.8, dtype=dtype, requires_grad=True)
        if dtype == torch.float64:
            found = spelled_out(mine, theirs, planes, skipped, w, how == "weighted", sharp)
        else:
            products = Products(mine, theirs, planes)
            pairs = skipped.nonzero()
            products.leave_out(*pairs[torch.sort(pairs[:, 1], stable=True).indices].unbind(1))
            assert products.count().tolist() == (~skipped).sum(1).tolist()
            given = (sharp,) if w is None else (how == "weighted", w)
            found = getattr(products, "listwise" if w is None else "pointwise")(MARGIN, DELTA, True, *given)
        weights = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, x in enumerate(found)
        ]
        sum((x * y).sum() for x, y in zip(found, weights, strict=True)).backward()
        grads = [mine.grad, theirs.grad] + ([w.grad] if w is not None and how == "weighted" else [])
        results.append([x.detach().double() for x in (*found, *grads) if x is not None])
    for fast, exact in zip(*results, strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-5 * max(scale, 1.0))


def test_the_number_of_threads_changes_nothing() -> None:
    q, c = torch.randn(50, 24), torch.randn(700, 24)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mine, theirs = q.clone().requires_grad_(), c.clone().requires_grad_()
            lse, gap = Products(mine, theirs, 4).listwise(0.0, 1.0, True, torch.ones(4))
            (lse.sum() + gap.sum()).backward()
            found.append([lse.detach(), gap.detach(), mine.grad, theirs.grad])
    finally:
        torch.set_num_threads(before)
    assert all(bool((a == b).all()) for a, b in zip(*found, strict=True))


def test_without_candidates_there_is_nothing_but_a_gradient() -> None:
    q, c = torch.randn(3, 8, requires_grad=True), torch.zeros(0, 8, requires_grad=True)
    lse, gap = Products(q, c, 2).listwise(0.0, 1.0, True, torch.ones(2))
    assert lse.shape == gap.shape == (2, 3) and bool((lse <= MASKED_SCORE / 2).all()) and not gap.any()
    (lse.sum() + gap.sum()).backward()
    assert q.grad is not None and not q.grad.any()


def test_a_query_all_of_whose_candidates_are_left_out_takes_no_gradient() -> None:
    q, c = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    products = Products(q, c, 2)
    products.leave_out(torch.zeros(5, dtype=torch.int64), torch.arange(5))
    lse, gap = products.listwise(0.0, 1.0, True, torch.ones(2))
    assert bool((lse[:, 0] <= MASKED_SCORE / 2).all()) and not gap[:, 0].any() and products.count().tolist() == [0, 5]
    (torch.logaddexp(torch.zeros(()), lse).sum() + gap.sum()).backward()
    assert q.grad is not None and not q.grad[0].any() and bool(q.grad[1].any())


def test_what_is_not_a_number_stays_so() -> None:
    q, c = torch.randn(2, 8), torch.randn(300, 8)
    q[0, 0] = torch.nan
    lse, _ = Products(q, c, 2).listwise(0.0, 1.0, True, torch.ones(2))
    assert bool(lse[:, 0].isnan().all()) and not bool(lse[:, 1].isnan().any())
    lse, mean, _ = Products(q, c, 2).pointwise(0.0, 1.0, True, True, torch.tensor(1.0))
    assert bool(mean[:, 0].isnan().all()) and not bool(mean[:, 1].isnan().any())
