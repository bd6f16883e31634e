"""Compiled sums over coordinates against the plain formula, value and gradient."""

import pytest
import torch
from torch import Tensor

from distkgd.kernels import build, pairs
from distkgd.kernels.candidates import GatheredRows, plain
from distkgd.kernels.pairs import KINDS
from distkgd.scorers import SCORERS, build_scorer

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not pairs.available(CPU, torch.float64), reason="no C++ compiler here")

# groups, queries, candidates, dim, rows of the table, whether candidates are listed
SHAPES = [
    (3, 5, 7, 20, 30, True),
    (2, 1, 9, 34, 11, True),
    (1, 70, 130, 66, 130, False),
    (2, 9, 3, 6, 6, False),
    (4, 2, 5, 128, 9, True),
    (1, 3, 300, 136, 300, False),
    (2, 67, 261, 18, 40, True),
    (5, 1, 1, 2, 1, True),
]
EMPTY = [
    (0, 3, 4, 20, 5, True),
    (2, 0, 4, 20, 5, True),
    (2, 3, 0, 20, 5, True),
    (0, 1, 4, 20, 5, True),
    (2, 3, 0, 20, 0, False),
]


def naive(kind: str, q: Tensor, c: Tensor) -> Tensor:
    """[G, Q, N] of queries [G, Q, width] and candidates [G, N, dim], spelled out."""
    dim = c.shape[-1]
    q, c = q.unsqueeze(2), c.unsqueeze(1)
    match kind:
        case "dot":
            return (q * c).sum(-1)
        case "square":
            return (q - c).square().sum(-1)
        case "manhattan":
            return (q - c).abs().sum(-1)
        case "scaled_manhattan":
            return (q[..., :dim] - q[..., dim:] * c).abs().sum(-1)
        case _:
            apart = (q - c).unflatten(-1, (-1, 2))
            return torch.linalg.vector_norm(apart, dim=-1).sum(-1)


def case(kind: str, shape: tuple[int, int, int, int, int, bool], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, table, index (or empty), upstream gradient; the first query lies on its first candidate."""
    groups, queries, candidates, dim, rows, listed = shape
    generator = torch.Generator().manual_seed(sum(shape))
    width = 2 * dim if kind == "scaled_manhattan" else dim
    q = torch.randn(groups, queries, width, generator=generator, dtype=dtype)
    table = torch.randn(rows, dim, generator=generator, dtype=dtype)
    index = torch.randint(0, rows, (groups, candidates), generator=generator) if listed else None
    if kind != "scaled_manhattan" and groups and queries and candidates:
        q[0, 0] = table[0 if index is None else int(index[0, 0])]
    grad = torch.randn(groups, queries, candidates, generator=generator, dtype=dtype)
    return q, table, torch.empty(0) if index is None else index, grad


def _soil_memory() -> None:
    """What is not written must not pass for zeros by chance."""
    for size in (8, 64, 512, 4096):
        torch.full((size,), 7.0, dtype=torch.float64)


def rows_of(table: Tensor, index: Tensor | None, groups: int) -> Tensor:
    return table.reshape(groups, -1, table.shape[1]) if index is None else table[index]


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_sums_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, near: float, kind: pairs.Kind, shape: tuple[int, int, int, int, int, bool]
) -> None:
    q, table, listed, grad = case(kind, shape, dtype)
    index = listed if shape[-1] else None
    leaves = [x.clone().requires_grad_() for x in (q, table)]
    expected = naive(kind, leaves[0], rows_of(leaves[1], index, shape[0]))
    gradients = torch.autograd.grad(expected, leaves, grad)
    _soil_memory()
    found = pairs.forward(kind, q, table, index, shape[2])
    for mine, theirs in zip((found, *pairs.backward(kind, q, table, index, grad)), (expected, *gradients), strict=True):
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=near * max(scale, 1.0))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_threads_changes_no_bit(kind: pairs.Kind, shape: tuple[int, int, int, int, int, bool]) -> None:
    q, table, listed, grad = case(kind, shape, torch.float32)
    index = listed if shape[-1] else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            sums = pairs.forward(kind, q, table, index, shape[2])
            found.append([sums, *pairs.backward(kind, q, table, index, grad)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_not_one_reaches_the_sum(kind: pairs.Kind) -> None:
    q, table, index, _ = case(kind, SHAPES[0], torch.float32)
    table[int(index[0, 0]), 3] = torch.nan
    sums = pairs.forward(kind, q, table, index, index.shape[1])
    assert sums[0, :, 0].isnan().all()


@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize(("name", "norm"), [*((name, None) for name in SCORERS), ("transe", 2), ("rotate", 2)])
def test_listed_candidates_score_as_copies_do_to_the_second_derivative(
    name: str, norm: int | None, queries: int
) -> None:
    scorer = build_scorer(name, 4, norm=norm)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, queries, scorer.query_size, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(6, scorer.entity_size, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 6, (3, 5), generator=generator)
    results = []
    for candidates in (GatheredRows(table, index), plain(GatheredRows(table, index))):
        scores = scorer.score_candidates(q, candidates)
        first = torch.autograd.grad(scores.sigmoid().sum(), (q, table), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, table))
        results.append([scores.detach(), *(g.detach() for g in first), *second])
    for listed, copied in zip(*results, strict=True):
        torch.testing.assert_close(listed, copied, rtol=1e-7, atol=1e-9)


def test_without_a_compiler_the_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, table = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    index = torch.randint(0, 9, (2, 4))
    scorer = build_scorer("rotate", 8)
    compiled = scorer.score_candidates(q, GatheredRows(table, index))
    monkeypatch.setattr(build, "library", lambda name: None)
    assert not pairs.available(CPU, torch.float64)
    torch.testing.assert_close(scorer.score_candidates(q, GatheredRows(table, index)), compiled)
