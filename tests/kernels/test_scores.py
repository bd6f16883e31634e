"""What is made of scores by compiled code, against torch in double precision."""

import pytest
import torch

from distkgd.kernels import scores

SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 15), (5, 16), (7, 1041), (2, 3, 40), (2, 40_003)])


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    if not scores.available(torch.zeros(1, 1)):
        pytest.skip("no C++ compiler here")


@SHAPES
@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0])
def test_log_sum_exp_and_its_gradient(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    z = torch.randn(shape, generator=generator) * scale
    z[..., 0] = -1e30 if shape[-1] > 1 else z[..., 0]
    exact = z.double().requires_grad_()
    grad = torch.randn(shape[:-1], generator=generator)
    expected = torch.logsumexp(exact, -1)
    expected.backward(grad.double())
    leaf = z.clone().requires_grad_()
    found = scores.logsumexp(leaf * 1.0)
    found.backward(grad)
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=2e-6)
    # A score of 300 is known to 3e-5 itself.
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-6 + 3e-7 * scale, atol=1e-7)


def test_a_score_that_is_not_a_number_is_not_hidden() -> None:
    for place in (3, 20, 33):
        z = torch.zeros(1, 34)
        z[0, place] = torch.nan
        assert scores.logsumexp(z).isnan().all()


@SHAPES
def test_scores_up_to_and_below_two_bounds_are_counted_and_a_nan_is_neither(shape: tuple[int, ...]) -> None:
    z = torch.randint(0, 6, shape).float()
    z[z == 5] = torch.nan
    high, low = torch.full(shape[:-1], 3.0), torch.full(shape[:-1], 2.0)
    at_most, below = scores.count(z, high, low)
    assert torch.equal(at_most, (z <= 3).sum(-1)) and torch.equal(below, (z < 2).sum(-1))


@pytest.mark.parametrize("queries", [1, 5, 16, 40])
@pytest.mark.parametrize("candidates", [1, 15, 33, 3000])
def test_scores_that_lie_by_columns_give_what_they_give_by_rows(queries: int, candidates: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    tables = [torch.randn(candidates, queries, generator=generator) * 20 for _ in range(2)]
    for table in tables:
        table[candidates // 2, : queries // 2] = -1e30
    upstream = torch.randn(4, queries, generator=generator)
    found = []
    for columns in (True, False):
        z, t = (table.T if columns else table.T.contiguous() for table in tables)
        assert scores.summable(z, t)
        student, teacher = (x.detach().requires_grad_() for x in (z, t))
        parts = *scores.softmax_gap(student, teacher), scores.logsumexp(student)
        sum((x * u).sum() for x, u in zip(parts, upstream, strict=True)).backward()
        found.append((*(x.detach() for x in parts), student.grad, teacher.grad))
    *most, (mine, theirs) = zip(*found, strict=True)
    for one, other in most:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # What a log-sum-exp of some 60 is rounded by, 4e-6, counts as often as the gap is large.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)
    assert not scores.summable(tables[0].T, tables[1].T.contiguous()) or min(queries, candidates) == 1


def test_columns_are_summed_alike_by_any_number_of_threads() -> None:
    z, t = torch.randn(5000, 20).T, torch.randn(5000, 20).T
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.stack([*scores.softmax_gap(z, t), scores.logsumexp(z)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_double_precision_and_strange_layouts_are_left_to_torch() -> None:
    for z in (torch.zeros(3, 4).double(), torch.zeros(4, 3).T, torch.zeros(3, 0), torch.zeros(3, 4).bfloat16()):
        assert not scores.available(z)
    assert not scores.summable(torch.zeros(6, 8)[::2, ::2])


@SHAPES
@pytest.mark.parametrize(
    ("learns", "teaches", "overwrite"),
    [(True, False, False), (True, False, True), (False, True, False), (True, True, False)],
)
def test_the_gap_between_two_softmaxes_and_its_gradients(
    shape: tuple[int, ...], learns: bool, teaches: bool, overwrite: bool
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    z, t = (torch.randn(shape, generator=generator) * 3 for _ in range(2))
    if shape[-1] > 2:
        z[..., 1] = t[..., 1] = -1e30
    upstream = torch.randn(3, *shape[:-1], generator=generator)
    exact_z, exact_t = (x.double().requires_grad_() for x in (z, t))
    share = torch.softmax(exact_t, -1)
    expected = torch.logsumexp(exact_t, -1), (share * (exact_t - exact_z)).sum(-1), torch.logsumexp(exact_z, -1)
    sum((x * u).sum() for x, u in zip(expected, upstream.double(), strict=True)).backward()
    student, teacher = z.clone().requires_grad_(learns), t.clone().requires_grad_(teaches)
    found = scores.softmax_gap(student * 1.0, teacher, overwrite)
    parts = [(x * u).sum() for x, u in zip(found, upstream, strict=True) if x.requires_grad]
    assert len(parts) == learns + teaches + 1
    sum(parts).backward()
    assert torch.equal(teacher.detach(), t) != overwrite
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-7, atol=2e-6)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=3e-6, atol=2e-6)
    if learns:
        torch.testing.assert_close(student.grad.double(), exact_z.grad, rtol=1e-5, atol=1e-6)
    if teaches:
        torch.testing.assert_close(teacher.grad.double(), exact_t.grad, rtol=1e-5, atol=3e-6)


def test_second_derivatives_are_those_of_the_formula() -> None:
    z, t = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    results = []
    for compiled in (True, False):
        if compiled:
            lse_t, gap, lse = scores.softmax_gap(z, t)
            total = (gap * lse * lse_t + scores.logsumexp(z).square()).sum()
        else:
            lse = torch.logsumexp(z, -1)
            gap = (torch.softmax(t, -1) * (t - z)).sum(-1)
            total = (gap * lse * torch.logsumexp(t, -1) + lse.square()).sum()
        first = torch.autograd.grad(total, (z, t), create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), (z, t)))
    torch.testing.assert_close(*results)
