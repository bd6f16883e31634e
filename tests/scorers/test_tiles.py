"""Tiled sums over coordinates: bounded memory, whatever the shapes."""

import resource
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distkgd.scorers import build_scorer
from distkgd.scorers.sums.tiles import _CPU_TILE, _DEVICE_TILE, _tiles


@pytest.mark.parametrize("name", ["transe", "rotate", "pairre"])
def test_many_candidates_need_no_tensor_of_all_coordinates(name: str) -> None:
    queries, candidates, dim = 64, 6_000, 512
    scorer = build_scorer(name, dim)
    q = torch.rand(queries, scorer.query_size).requires_grad_()
    c = torch.rand(candidates, dim).requires_grad_()
    before = _peak_bytes()
    scorer.score_candidates(q, c).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    assert c.grad is not None and c.grad.isfinite().all()
    # Copies of the candidates and their gradient are allowed (12 MB each); all pairs would take 790 MB.
    assert _peak_bytes() - before < 180e6


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("name", ["transe", "rotate", "pairre"])
def test_second_derivatives_need_no_tensor_of_all_coordinates_either(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distkgd.scorers.sums.tiles._CPU_TILE", 2**12)
    queries, candidates, dim = 40, 100, 64
    scorer = build_scorer(name, dim)
    q = torch.rand(queries, scorer.query_size).requires_grad_()
    c = torch.rand(candidates, dim).requires_grad_()
    with Largest() as largest:
        first = torch.autograd.grad(scorer.score_candidates(q, c).sigmoid().sum(), (q, c), create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].square().sum(), (q, c))
    assert all(x.isfinite().all() and x.any() for x in second)
    # All pairs would have 256,000 numbers.
    assert largest.numbers <= 2 * candidates * dim


@pytest.mark.parametrize("shape", [(1, 64, 3000), (40, 1, 64), (3, 100, 100), (1, 1, 1), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("coordinates", [1, 50, 512, 10_000_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_cover_every_pair_once_within_their_budget(
    shape: tuple[int, int, int], coordinates: int, device: str
) -> None:
    if coordinates > 1000:
        shape = (min(shape[0], 3), min(shape[1], 10), min(shape[2], 30))  # one tile per pair is slow to count
    visits = torch.zeros(shape, dtype=torch.int64)
    budget = _CPU_TILE if device == "cpu" else _DEVICE_TILE
    for tile in _tiles(torch.Size(shape), coordinates, torch.device(device)):
        pairs = visits[tile].numel()
        assert pairs == 1 or pairs * coordinates <= budget
        visits[tile] += 1
    assert (visits == 1).all()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
