"""Magnitude pruning on ranks against sorting all numbers in one place."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from distkgd.distributed import pruning
from distkgd.distributed.pruning import Scope, largest, nth_magnitude, num_pruned
from distkgd.distributed.ranks import Ranks
from distkgd.scorers import build_scorer
from tests.ranks import run_on_threads

SCOPES = get_args(Scope)


def tables(dtype: torch.dtype, rows: int = 11, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    entity, relation = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (rows, 4))
    return (entity * torch.logspace(-3, 2, dim)).to(dtype), (0.3 * relation).to(dtype)


def prune_on_ranks(
    ranks: Ranks, entity: Tensor, relation: Tensor, rate: float, scope: Scope, scorer: str, at_once: int
) -> tuple[Tensor, Tensor]:
    lo, hi = ranks.share(len(entity))
    made = build_scorer(scorer, entity.shape[1])
    before, pruning.NUMBERS_AT_ONCE = pruning.NUMBERS_AT_ONCE, at_once
    try:
        mask = largest(entity[lo:hi], relation, rate, scope, ranks, made.dim_multiple, made.relation_columns)
    finally:
        pruning.NUMBERS_AT_ONCE = before
    return mask.entity, mask.relation


def naive(entity: Tensor, relation: Tensor, rate: float, scope: str, unit: int) -> tuple[Tensor, Tensor]:
    def kept(values: list[float], rate: float) -> float:
        return sorted(abs(x) for x in values)[math.floor(rate * len(values) + 1e-9)]

    every = [entity.double(), relation.double()]
    if scope == "row":
        found = [torch.stack([row.abs() >= kept(row.tolist(), rate) for row in table]) for table in every]
        return found[0], found[1]
    if scope == "column":
        norms = entity.double().square().sum(0).reshape(-1, unit).sum(1).tolist()
        stays = torch.tensor([x >= kept(norms, rate) for x in norms]).repeat_interleave(unit)
        return stays.expand_as(entity), stays.expand_as(relation)
    joined = [x for table in every for x in table.flatten().tolist()]
    limits = [kept(joined if scope == "global" else table.flatten().tolist(), rate) for table in every]
    return every[0].abs() >= limits[0], every[1].abs() >= limits[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
def test_any_number_of_ranks_keeps_the_largest_as_sorting_would(scope: Scope, dtype: torch.dtype) -> None:
    entity, relation = tables(dtype)
    for rate in (0.0, 0.34, 0.9):
        for scorer in ("complex", "distmult"):
            unit = build_scorer(scorer, 6).dim_multiple
            wanted = naive(entity, relation, rate, scope, unit)
            for world in (1, 2, 3):
                options: dict[str, Any] = {"rate": rate, "scope": scope, "scorer": scorer}
                for at_once in (1 << 22, 13):
                    found = run_on_threads(
                        world, prune_on_ranks, entity=entity, relation=relation, at_once=at_once, **options
                    )
                    assert torch.equal(torch.cat([one[0] for one in found]), wanted[0])
                    assert all(torch.equal(one[1], wanted[1]) for one in found)


def test_the_share_that_goes_is_the_rate_rounded_down() -> None:
    entity, relation = tables(torch.float32)
    mask = largest(entity, relation, 0.9, "global", Ranks(), 2, lambda kept: kept)
    total = entity.numel() + relation.numel()
    assert int(mask.entity.sum() + mask.relation.sum()) == total - math.floor(0.9 * total)
    assert [num_pruned(r, n) for r, n in ((0.29, 100), (0.3, 10), (0.999, 10), (0.0, 5), (0.57, 100))] == [
        29,
        3,
        9,
        0,
        57,
    ]


def test_equal_magnitudes_stay_together() -> None:
    entity = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    mask = largest(entity, torch.tensor([[1.0, 3.0]]), 0.5, "global", Ranks(), 1, lambda kept: kept)
    assert mask.entity.tolist() == [[True, True], [False, True]] and mask.relation.tolist() == [[True, True]]


def test_magnitudes_of_every_size_have_their_place() -> None:
    values = torch.tensor([5e-324, 0.0, -1e-310, 1e-30, -1e30, 1.7e308, 3.0, -3.0000000000000004], dtype=torch.float64)
    for place, value in enumerate(sorted(values.abs().tolist())):
        assert nth_magnitude([values[:3], values[3:]], lambda _, place=place: place, Ranks()) == value


@pytest.mark.parametrize("scorer", ["complex", "cp", "simple", "distmult", "rescal"])
def test_pruned_columns_are_those_of_a_smaller_model(scorer: str) -> None:
    made = build_scorer(scorer, 8)
    h, t = (torch.randn(5, 8, dtype=torch.float64) for _ in range(2))
    r = torch.randn(5, made.relation_size, dtype=torch.float64)
    mask = largest(h, r, 0.5, "column", Ranks(), made.dim_multiple, made.relation_columns)
    kept, of_relation = mask.entity[0], mask.relation[0]
    assert kept.sum() == 4
    small = made.crop(4)
    masked = made.score(h * kept, r * of_relation, t * kept)
    torch.testing.assert_close(small.score(h[:, kept], r[:, of_relation], t[:, kept]), masked)
