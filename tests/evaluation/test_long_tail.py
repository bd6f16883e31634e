"""The long tail: beside counts made one triple at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.breakdowns import RARE_BELOW, by_answer_degree, by_relation_frequency, in_parts
from distkgd.evaluation.model_metrics import evaluate_model, table
from distkgd.evaluation.ranking import metrics
from distkgd.pipeline.plan import run_plan
from distkgd.reporting.report import markdown
from tests.launches import small_data
from tests.pipeline.test_stages import parsed
from tests.records import report_of
from tests.toys import toy_graph

BUCKETS = {"0": (0, 0), "1-2": (1, 2), "3-9": (3, 9), "10-99": (10, 99), "100+": (100, 10**9)}


def some_ranks(n: int) -> Tensor:
    return torch.randint(1, 40, (n, 2), generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("rare_below", [1, 57, 58, 64, 10_000])
def test_rare_relations_are_those_with_fewer_training_triples(rare_below: int) -> None:
    graph = toy_graph()
    rank = some_ranks(len(graph.test))
    train, test = graph.train.tolist(), graph.test.tolist()
    times = {r: sum(triple[1] == r for triple in train) for r in range(graph.num_relations)}
    assert sorted(times.values()) == [47, 57, 58, 64, 69]
    found = by_relation_frequency(rank, graph.test, graph.train, graph.num_relations, rare_below)
    assert list(found) == [f"<{rare_below}", f">={rare_below}"]
    for name, wanted in ((f"<{rare_below}", True), (f">={rare_below}", False)):
        rows = [i for i, (_, r, _) in enumerate(test) if (times[r] < rare_below) == wanted]
        relations = sum((n < rare_below) == wanted for n in times.values())
        expected = metrics(rank[rows]) | {"num_triples": len(rows), "num_relations": relations}
        assert found[name] == pytest.approx(expected)


def test_a_relation_is_rare_below_the_boundary_and_not_at_it() -> None:
    train = torch.tensor([[0, 0, 1], [0, 0, 2], [1, 1, 2]])
    rank = torch.tensor([[1.0, 1.0], [4.0, 4.0]])
    test = torch.tensor([[2, 0, 0], [2, 1, 0]])
    found = by_relation_frequency(rank, test, train, 3, 2)
    # Relation 2 has no training triple at all: rare, though no test triple has it.
    assert (found["<2"]["mrr"], found["<2"]["num_relations"]) == (0.25, 2)
    assert (found[">=2"]["mrr"], found[">=2"]["num_relations"]) == (1.0, 1)


@pytest.mark.parametrize("entities", [12, 41, 300])
def test_an_answers_degree_is_the_number_of_training_triples_that_hold_it(entities: int) -> None:
    graph = toy_graph(entities=entities, triples=800 if entities == 12 else 400)
    rank = some_ranks(len(graph.test))
    train = graph.train.tolist()
    assert any(h == t for h, _, t in train)  # a triple that holds an entity twice
    of_bucket: dict[str, list[float]] = {}
    for row, (head, _, tail) in enumerate(graph.test.tolist()):
        for side, answer in enumerate((tail, head)):
            degree = sum(answer in (h, t) for h, _, t in train)
            (bucket,) = [name for name, (low, high) in BUCKETS.items() if low <= degree <= high]
            of_bucket.setdefault(bucket, []).append(float(rank[row, side]))
    found = by_answer_degree(rank, graph.test, graph.train, graph.num_entities)
    assert list(found) == [name for name in BUCKETS if name in of_bucket]
    for name, ranks in of_bucket.items():
        assert found[name] == pytest.approx(metrics(torch.tensor(ranks)) | {"num_queries": len(ranks)})
    assert sum(row["num_queries"] for row in found.values()) == 2 * len(graph.test)


@pytest.mark.parametrize(
    ("degree", "bucket"),
    [(0, "0"), (1, "1-2"), (2, "1-2"), (3, "3-9"), (9, "3-9"), (10, "10-99"), (99, "10-99"), (100, "100+")],
)
def test_the_edges_of_the_buckets(degree: int, bucket: str) -> None:
    train = torch.tensor([[0, 0, 2]] * degree).reshape(-1, 3).long()
    loops = torch.tensor([[1, 0, 1]] * degree).reshape(-1, 3).long()
    rank, test = torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 0, 0]])
    found = by_answer_degree(rank, test, torch.cat([train, loops]), 3)
    assert found == {bucket: metrics(rank) | {"num_queries": 2.0}}


def test_all_parts_are_there_and_nothing_is_left_out() -> None:
    graph = toy_graph()
    found = in_parts(some_ranks(len(graph.test)), graph.test, graph)
    assert list(found) == ["direction", "category", "relation", "relation_frequency", "answer_degree"]
    assert list(found["relation_frequency"]) == [f"<{RARE_BELOW}", f">={RARE_BELOW}"] and RARE_BELOW == 1000
    assert found["relation_frequency"][">=1000"]["num_triples"] == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder and its data beside it."""
    place = tmp_path_factory.mktemp("long_tail")
    stage = {"dim": 8, "batch_size": 100, "epochs": 2, "optimizer": {"lr": 0.3}}
    tree = {"mlflow": {"enabled": False}, "data": str(small_data(place / "data")), "student": stage, "baseline": True}
    config = parsed(tree)
    run_plan(config, load_graph(place / "data"), Ranks(), place / "run", resume=False, display=Display(False))
    return place


def test_the_report_and_a_later_evaluation_find_the_same(finished: Path) -> None:
    report = json.loads((finished / "run/report.json").read_text(encoding="utf-8"))
    for stage in report["stages"]:
        again = evaluate_model(finished / "run/stages" / stage["name"], Ranks(), split="test", source=None)
        for part in ("relation_frequency", "answer_degree", "category"):
            assert again[part] and again[part].keys() == stage["test_by"][part].keys()
            for name, row in again[part].items():
                assert stage["test_by"][part][name] == pytest.approx(row)


def test_one_line_of_the_report_tells_the_long_tail(finished: Path) -> None:
    report: dict[str, Any] = json.loads((finished / "run/report.json").read_text(encoding="utf-8"))
    (line,) = [line for line in markdown(report_of(report)).splitlines() if line.startswith("Long tail")]
    student, direct = (stage["test_by"] for stage in report["stages"])
    rare = [f"{part['relation_frequency']['<1000']['mrr']:.3f}" for part in (student, direct)]
    triples = report["data"]["num_test"]
    assert f"<1000 training triples ({triples} triples) student {rare[0]}, direct {rare[1]}." in line
    for bucket, row in student["answer_degree"].items():
        other = direct["answer_degree"][bucket]["mrr"]
        assert f"{bucket} ({row['num_queries']:.0f} queries) student {row['mrr']:.3f}, direct {other:.3f}" in line


def test_the_boundary_of_an_evaluation_is_an_argument(finished: Path) -> None:
    model = finished / "run/stages/student"
    times = torch.bincount(load_graph(finished / "data").train[:, 1]).sort().values.tolist()
    boundary = times[2]
    found = evaluate_model(model, Ranks(), split="test", source=None, rare_below=boundary)
    rare, frequent = found["relation_frequency"].values()
    assert rare["num_triples"] + frequent["num_triples"] == found["overall"]["num_triples"]
    assert rare["num_relations"] + frequent["num_relations"] == 4
    assert rare["num_relations"] == sum(n < boundary for n in times) and 0 < rare["num_relations"] < 4
    weighed = (rare["mrr"] * rare["num_triples"] + frequent["mrr"] * frequent["num_triples"]) / found["overall"][
        "num_triples"
    ]
    assert weighed == pytest.approx(found["overall"]["mrr"])
    drawn = table(found)
    names = [str(cell) for cell in drawn.columns[0].cells]
    assert f"relations of <{boundary} triples" in names
    shown = dict(zip(names, map(str, drawn.columns[1].cells), strict=True))
    for bucket, row in found["answer_degree"].items():
        assert shown[f"answers of degree {bucket}"] == f"{row['num_queries'] / 2:,.1f}"
