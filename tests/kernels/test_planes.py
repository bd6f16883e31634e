"""Sums over blocks of coordinates against the plain formula, block by block, value and gradients."""

import pytest
import torch
from torch import Tensor

from distkgd.kernels import planes as kernels
from distkgd.kernels.pairs import Kind
from distkgd.scorers.sums import planes as module
from distkgd.scorers.sums.planes import plane_sums
from tests.kernels.test_pairs import naive

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not kernels.available(CPU, torch.float64), reason="no C++ compiler here")
TERMS: list[Kind] = ["dot", "square", "manhattan", "modulus"]

# groups, queries, candidates, planes, width
SHAPES = [
    (1, 37, 101, 5, 10),
    (1, 5, 64, 1, 40),
    (6, 3, 70, 3, 6),  # few queries a group: rows are not turned
    (4, 1, 9, 2, 34),
    (2, 9, 16, 4, 2),
    (0, 3, 4, 2, 4),
    (2, 0, 4, 2, 4),
    (2, 3, 0, 2, 4),
    (2, 6, 0, 2, 4),
]


def case(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, candidates and an upstream gradient; the first query is its first candidate."""
    groups, queries, candidates, planes, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(groups, queries, planes * width, generator=generator, dtype=dtype)
    c = torch.randn(groups, candidates, planes * width, generator=generator, dtype=dtype)
    if q.numel() and c.numel():
        q[0, 0] = c[0, 0]
    grad = torch.randn(planes, groups, queries, candidates, generator=generator, dtype=dtype)
    return q.requires_grad_(), c.requires_grad_(), grad


def by_formula(term: Kind, factor: float, q: Tensor, c: Tensor, planes: int) -> Tensor:
    cut = zip(q.chunk(planes, -1), c.chunk(planes, -1), strict=True)
    return factor * torch.stack([naive(term, a, b) for a, b in cut])


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_equals_the_formula(term: Kind, shape: tuple[int, int, int, int, int], dtype: torch.dtype, near: float) -> None:
    q, c, grad = case(shape, dtype)
    want = by_formula(term, -1.5, q, c, shape[3])
    found = kernels.forward(term, shape[3], -1.5, q.detach(), c.detach())
    torch.testing.assert_close(found, want.detach(), rtol=near, atol=near)
    pulled = kernels.backward(term, -1.5, q.detach(), c.detach(), grad)
    for mine, right in zip(pulled, torch.autograd.grad(want, (q, c), grad), strict=True):
        torch.testing.assert_close(mine, right, rtol=near, atol=near)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["shared", "grouped"])
@pytest.mark.parametrize("queries", [2, 7])
@pytest.mark.parametrize("term", TERMS)
def test_candidates_are_shared_or_a_groups_own(
    term: Kind, queries: int, lead: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(module.kernels, "available", lambda *_: False)
    q, c, grad = case((3, queries, 11, 4, 6), torch.float64)
    rows = c if lead else c[0]
    found = plane_sums(term, 0.5, q, rows, 4)
    want = by_formula(term, 0.5, q, c if lead else c[:1].expand(3, -1, -1), 4)
    with torch.no_grad():
        found[..., 0] += 0  # whoever leaves pairs out writes over it
    torch.testing.assert_close(found, want)
    pairs = zip(torch.autograd.grad(found, (q, c), grad), torch.autograd.grad(want, (q, c), grad), strict=True)
    for mine, right in pairs:
        torch.testing.assert_close(mine, right)


@needs_kernels
@pytest.mark.parametrize("term", ["square", "modulus"])
def test_has_second_derivatives(term: Kind) -> None:
    q, c, _ = case((2, 3, 5, 2, 4), torch.float64)
    with torch.no_grad():
        q[0, 0] += 1.0  # at distance 0 a root has none
    assert torch.autograd.gradgradcheck(lambda a, b: plane_sums(term, -1.0, a, b, 2), (q, c))
