"""Which size a budget means, and that the figures it is judged by are those of the export and of real queries."""

from pathlib import Path

import pytest

from distkgd.distributed.ranks import Ranks
from distkgd.models.export import export_model
from distkgd.models.model_folder import save_model
from distkgd.pipeline.autoconfig.budget import OTHER_BYTES, Figures, _verdict, export_bytes, nearest, pick, query_ms
from distkgd.pipeline.autoconfig.request import Budget
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
    for dim in (4, 16):
        files = export_model(tmp_path / "model", tmp_path / f"out{dim}", "safetensors", Ranks(), dim)
        real = sum(path.stat().st_size for path in files)
        said = export_bytes(model.crop(dim), graph)
        assert said - OTHER_BYTES < real <= said


def test_a_query_of_more_candidates_takes_longer(tmp_path: Path) -> None:
    small, large = (toy_graph(entities, triples=60) for entities in (50, 300_000))
    times = [query_ms(toy_teacher(toy_run({}, Ranks(), tmp_path, graph), 16), graph) for graph in (small, large)]
    assert 0 < times[0] < times[1]


@pytest.mark.parametrize(("direct", "told"), [(0.41, True), (0.4, False), (None, False)])
def test_a_verdict_says_where_the_direct_model_of_that_size_is_the_better_one(direct: float | None, told: bool) -> None:
    (beside,) = report_of({"stages": [{"name": "direct", "valid": {"mrr": direct}}]}).stages
    found = _verdict(Budget(max_mb=4), SIZES[3], SIZES, "it", beside)
    assert any("directly trained model of that size is the better one" in one for one in found.remarks) == told
