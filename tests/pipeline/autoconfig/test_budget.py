"""Which size a budget means, and that the figures it is judged by are those of the export and of real queries."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import ranks_of
from distkgd.models.export import export_model
from distkgd.models.model import packed_in_memory
from distkgd.models.model_folder import load_model, save_model
from distkgd.pipeline.autoconfig.budget import _verdict
from distkgd.pipeline.autoconfig.request import Budget
from distkgd.pipeline.autoconfig.rules import FEW_BITS
from distkgd.pipeline.autoconfig.sizes import (
    OTHER_BYTES,
    WHOLE,
    Figures,
    Size,
    measured,
    most_ranked,
    nearest,
    pick,
    query_ms,
    search,
)
from distkgd.pipeline.stages import usual_rounding
from tests.records import report_of
from tests.toys import toy_graph, toy_run, toy_teacher

SIZES = [
    Figures(8, 1_000_000, 0.1, 0.20, 0.19, 0.50),
    Figures(16, 2_000_000, 0.2, 0.36, 0.30, 0.90),
    Figures(24, 3_000_000, 0.3, 0.35, 0.34, 0.875),
    Figures(32, 4_000_000, 0.4, 0.40, 0.39, 1.00),
]


@pytest.mark.parametrize(
    ("budget", "dim"),
    [
        (Budget(min_retained=0.5), 8),
        (Budget(min_retained=0.88), 16),
        (Budget(min_retained=0.95), 32),
        (Budget(max_mb=3.5), 16),  # not 24, which is larger and worse
        (Budget(max_mb=4), 32),
        (Budget(max_ms=0.15), 8),
        (Budget(max_mb=3.5, min_retained=0.87), 16),
        (Budget(max_mb=1.5, min_retained=0.87), None),
        (Budget(max_mb=0.5), None),
        (Budget(max_mb=10, max_ms=0.35, min_retained=0.95), None),
    ],
)
def test_a_budget_means_the_smallest_size_that_meets_it(budget: Budget, dim: int | None) -> None:
    chosen = pick(SIZES, budget)
    assert (None if chosen is None else chosen.dim) == dim


def test_the_choice_reads_validation_only() -> None:
    turned = [Figures(one.dim, one.bytes, one.ms, one.valid, 1.0 - (one.test or 0), one.retained) for one in SIZES]
    for budget in (Budget(max_mb=3.5), Budget(min_retained=0.88)):
        one, other = pick(SIZES, budget), pick(turned, budget)
        assert one is not None and other is not None and one.dim == other.dim


def test_where_nothing_meets_the_budget_the_nearest_is_named() -> None:
    assert nearest(SIZES, Budget(max_mb=3.5, min_retained=0.95)).dim == 16
    assert nearest(SIZES, Budget(max_mb=0.5, min_retained=0.95)).dim == 8


@pytest.mark.parametrize("entities", [7, 10, 11, 99, 1234])
def test_bytes_are_those_that_export_writes(tmp_path: Path, entities: int) -> None:
    graph = toy_graph(entities, triples=60)
    model = toy_teacher(toy_run({}, Ranks(), tmp_path / "run", graph), 16)
    about = {"data": graph.summary(), "source": str(tmp_path), "stage": "student", "method": "med"}
    save_model(tmp_path / "model", model, graph, about)
    for dim, rounding in ((dim, how) for dim in (4, 16) for how in (WHOLE, usual_rounding(8), usual_rounding(1))):
        kind = ("safetensors", None) if rounding is WHOLE else ("packed", rounding)
        out = tmp_path / f"out{dim}_{rounding.bits}"
        files = export_model(tmp_path / "model", out, kind[0], Ranks(), dim, kind[1])
        real = sum(path.stat().st_size for path in files)
        said = measured(packed_in_memory(model.crop(dim), rounding), graph, rounding)
        assert said.bytes - OTHER_BYTES < real <= said.bytes and said.bits == rounding.bits
        assert said.tables is not None and said.tables < sum(path.stat().st_size for path in out.glob("*.safetensors"))


@pytest.mark.parametrize("bits", [16, *FEW_BITS])
def test_what_is_ranked_in_memory_is_what_is_exported(tmp_path: Path, bits: int) -> None:
    graph = toy_graph()
    model = toy_teacher(toy_run({}, Ranks(), tmp_path / "run", graph), 16)
    save_model(tmp_path / "model", model, graph, {"data": graph.summary(), "source": "x"})
    export_model(tmp_path / "model", tmp_path / "out", "packed", Ranks(), 12, usual_rounding(bits))
    mine, exported = packed_in_memory(model.crop(12), usual_rounding(bits)), load_model(tmp_path / "out", Ranks()).model
    assert type(mine.entity.shard) is type(exported.entity.shard)
    assert torch.equal(mine.entity.weight, exported.entity.weight.float())
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    ranks = [ranks_of(one, graph.valid, known, Ranks()) for one in (mine, exported)]
    assert torch.equal(*ranks)


def made_up(random: Random) -> tuple[list[Figures], list[Figures]]:
    """Crops in full precision, and their rounded forms, of which none ranks better with fewer numbers or bits."""
    valid: dict[tuple[int, int], float] = {}
    dims = [8 * (i + 1) for i in range(random.randint(2, 16))]
    for bits in (32, *FEW_BITS):
        before = 0.0
        for dim in dims:
            room = valid.get((dim, {8: 32, 4: 8, 2: 4, 1: 2}.get(bits, 0)), 1.0)
            before = valid[dim, bits] = before + (room - before) * random.random() ** random.choice((0.1, 1))
    whole = valid[dims[-1], 32]
    every = [
        Figures(dim, dim * bits, random.random(), mrr, None, mrr / whole, bits=bits)
        for (dim, bits), mrr in valid.items()
    ]
    return every[: len(dims)], every[len(dims) :]


@pytest.mark.parametrize("seed", range(60))
def test_the_few_sizes_that_are_ranked_hold_the_one_that_is_the_best_of_all(seed: int) -> None:
    random = Random(seed)
    crops, rounded = made_up(random)
    for kept, small, ms in ((1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1), (0, 0, 1)):
        mb = random.uniform(8, 128 * 32) / 1e6
        limits = mb if small else None, random.uniform(0.3, 1) if ms else None, random.random() if kept else None
        budget, found = Budget(*limits), list(crops)

        def look(size: Size) -> Figures:
            one = next(one for one in rounded if (one.dim, one.bits) == (size.dim, size.bits))
            slow = limits[1] is not None and one.ms > limits[1]  # noqa: B023
            found.append(replace(one, valid=None, retained=None) if slow else one)  # noqa: B023
            return found[-1]  # noqa: B023

        sizes = [Size(one.dim, one.bits, one.bytes) for one in rounded if not small or one.bytes <= 1e6 * mb]
        assert search(crops, sizes, budget, look) == len(found) - len(crops)
        assert sum(one.valid is not None for one in found) - len(crops) <= most_ranked(len(crops))
        mine, best = pick(found, budget), pick([*crops, *rounded], budget)
        assert (mine is None) == (best is None)
        if mine is not None and best is not None:
            assert mine.bytes == best.bytes if kept else mine.valid == best.valid


def test_a_query_of_more_candidates_takes_longer(tmp_path: Path) -> None:
    small, large = (toy_graph(entities, triples=60) for entities in (50, 300_000))
    times = [query_ms(toy_teacher(toy_run({}, Ranks(), tmp_path, graph), 16), graph) for graph in (small, large)]
    assert 0 < times[0] < times[1]


@pytest.mark.parametrize(("direct", "told"), [(0.41, True), (0.4, False), (None, False)])
def test_a_verdict_says_where_the_direct_model_of_that_size_is_the_better_one(direct: float | None, told: bool) -> None:
    (beside,) = report_of({"stages": [{"name": "direct", "valid": {"mrr": direct}}]}).stages
    found = _verdict(Budget(max_mb=4), SIZES[3], SIZES, "student", "it", beside)
    assert any("directly trained model of that size is the better one" in one for one in found.remarks) == told
