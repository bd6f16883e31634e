"""Tiled sums over coordinates: bounded memory, whatever the shapes."""

import resource
import sys

import pytest
import torch

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
