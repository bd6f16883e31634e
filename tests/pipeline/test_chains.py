"""Chains, assistants, several teachers and starts as they are run: who is taught by whom, what is not done twice."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from distkgd.config.tree import merge
from distkgd.data import Graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError, ModelError
from distkgd.methods import METHODS
from distkgd.models import init_from_teacher, stage_result
from distkgd.models.model_folder import load_model
from distkgd.models.stage_result import StageResult
from distkgd.pipeline import plan, stage_job
from distkgd.reporting import run_report
from distkgd.reporting.report import markdown
from tests.launches import small_data
from tests.pipeline.test_plan import files_of, ran, run_on_data, trained_stages
from tests.pipeline.test_stages import Several, several
from tests.ranks import run_on_ranks
from tests.records import report_of
from tests.toys import toy_graph

STAGE: dict[str, Any] = {"batch_size": 100, "epochs": 2, "validate_every": 1, "optimizer": {"lr": 0.3}}
TAUGHT: dict[str, Any] = {"teacher": STAGE, "student": STAGE | {"method": "bkd"}}
CHAIN = TAUGHT | {"chain": {"dims": [16, 8, 4], "per_dim": {4: {"epochs": 3}}}, "baseline": True}
ASSISTED = merge(
    TAUGHT,
    {"teacher": {"dim": 16}, "student": {"dim": 2}, "baseline": True, "assistant": {"dims": [12, 8, 4]}},
)


def names(trained: Any) -> list[str]:
    return [call.args[0].name for call in trained.call_args_list]


def entity_rows(folder: Path, stage: str) -> torch.Tensor:
    return load_model(folder / "stages" / stage, Ranks()).model.entity.weight


def stopped_at(folder: Path, tree: dict[str, Any], stage: str) -> None:
    """Run a plan until `stage` would be trained."""
    real = plan.train_stage

    def train(job: Any) -> Any:
        if job.name == stage:
            raise KeyboardInterrupt
        return real(job)

    with mock.patch.object(plan, "train_stage", train), pytest.raises(KeyboardInterrupt):
        ran(folder, tree)


# -- chains -------------------------------------------------------------------------------------------------------


def test_each_student_of_a_chain_imitates_the_one_before(tmp_path: Path) -> None:
    with trained_stages() as trained:
        report = ran(tmp_path, CHAIN)
    jobs = {call.args[0].name: call.args[0] for call in trained.call_args_list}
    assert list(jobs) == ["teacher", "student_8", "student", "direct"]
    for name, teacher in (("student_8", "teacher"), ("student", "student_8")):
        (given,) = jobs[name].method.teachers
        assert torch.equal(given.entity.weight, entity_rows(tmp_path, teacher))
    assert [(s["name"], s["dim"], s["teachers"]) for s in report["stages"]] == [
        ("teacher", 16, []),
        ("student_8", 8, ["teacher"]),
        ("student", 4, ["student_8"]),
        ("direct", 4, []),
    ]
    steps = {s["name"]: s["steps"] for s in report["stages"]}
    assert steps["student"] == steps["direct"] == 1.5 * steps["teacher"]


@pytest.mark.parametrize("method", ["bkd", "dualde"])
def test_a_chain_works_with_every_method_of_one_teacher(method: str, tmp_path: Path) -> None:
    assert 1 in METHODS[method].num_teachers
    report = ran(tmp_path, merge(CHAIN, {"student": {"method": method}, "baseline": False}))
    assert [s["method"] for s in report["stages"]] == ["scratch", method, method]


@pytest.mark.parametrize("stage", ["teacher", "student_8", "student", "direct"])
def test_a_chain_goes_on_at_its_first_unfinished_stage(stage: str, tmp_path: Path) -> None:
    whole = ran(tmp_path / "whole", CHAIN)
    stopped_at(tmp_path / "run", CHAIN, stage)
    order = ["teacher", "student_8", "student", "direct"]
    done = order[: order.index(stage)]
    before = {name: files_of(tmp_path / "run/stages" / name) for name in done}
    with trained_stages() as trained:
        report = ran(tmp_path / "run", CHAIN, resume=True)
    assert names(trained) == order[order.index(stage) :]
    assert {name: files_of(tmp_path / "run/stages" / name) for name in done} == before
    assert [s["test"] for s in report["stages"]] == [s["test"] for s in whole["stages"]]


def test_another_chain_is_refused_on_resume(tmp_path: Path) -> None:
    ran(tmp_path, CHAIN)
    with pytest.raises(ConfigError, match=r"made by another plan \(differs in: chain\)"):
        ran(tmp_path, CHAIN | {"chain": {"dims": [16, 8, 4], "per_dim": {4: {"epochs": 4}}}}, resume=True)


def test_a_chain_of_two_is_the_plain_plan(tmp_path: Path) -> None:
    chain = ran(tmp_path / "chain", TAUGHT | {"chain": {"dims": [16, 4]}})
    plain = ran(tmp_path / "plain", merge(TAUGHT, {"teacher": {"dim": 16}, "student": {"dim": 4}}))
    assert [s["test"] for s in chain["stages"]] == [s["test"] for s in plain["stages"]]


def test_a_chain_may_begin_at_a_finished_model_of_its_first_dim(tmp_path: Path) -> None:
    ran(tmp_path / "first", {"student": STAGE | {"dim": 16}})
    path = str(tmp_path / "first/stages/student")
    report = ran(tmp_path / "run", CHAIN | {"teacher": path, "chain": {"dims": [16, 8, 4]}})
    assert [(s["name"], s["teachers"]) for s in report["stages"]] == [
        ("teacher", []),
        ("student_8", ["teacher"]),
        ("student", ["student_8"]),
        ("direct", []),
    ]
    with trained_stages() as trained, pytest.raises(ConfigError, match=r"chain begins at 12, and the model .* dim 16"):
        ran(tmp_path / "other", CHAIN | {"teacher": path, "chain": {"dims": [12, 8, 4]}})
    assert not trained.called and not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["chain", "assistant"])
def test_two_ranks_train_the_same_plan(name: str, tmp_path: Path) -> None:
    data = str(small_data(tmp_path / "data"))
    tree = merge({"chain": CHAIN, "assistant": ASSISTED}[name], {"dtype": "float64", "student": {"start": "crop"}})
    for world in (1, 2):
        run_on_ranks(world, run_on_data, tree=tree, data=data, folder=str(tmp_path / str(world)))
    reports = [json.loads((tmp_path / world / "report.json").read_text(encoding="utf-8")) for world in ("1", "2")]
    assert [report["world"] for report in reports] == [1, 2]
    assert len(reports[0]["stages"]) == (4 if name == "chain" else 7)
    for mine, theirs in zip(*(report["stages"] for report in reports), strict=True):
        assert (mine["name"], mine["dim"], mine["teachers"]) == (theirs["name"], theirs["dim"], theirs["teachers"])
        one, two = (entity_rows(tmp_path / world, mine["name"]) for world in ("1", "2"))
        torch.testing.assert_close(two, one, rtol=0, atol=1e-8)


# -- assistants ---------------------------------------------------------------------------------------------------

MRRS = {"teacher": 0.9, "direct": 0.3, "assistant_12": 0.8, "assistant_8": 0.55, "assistant_4": 0.35}


def with_mrrs(mrrs: dict[str, float]) -> Any:
    """Finished stages have these valid MRRs, whatever they learned."""
    real = plan.finish_stage

    def finish(run: Any, stage: Any, *rest: Any) -> StageResult:
        result = real(run, stage, *rest)
        if stage.name not in mrrs:
            return result
        return result.model_copy(update={"valid": result.metrics("valid") | {"mrr": mrrs[stage.name]}})

    return mock.patch.object(plan, "finish_stage", finish)


@pytest.mark.parametrize(
    ("changed", "dim"),
    [
        ({}, 8),  # 0.55 is nearest to 0.6
        ({"teacher": 0.5}, 4),  # 0.35 to 0.4
        ({"direct": 0.7}, 12),  # 0.8 to 0.8
    ],
)
def test_the_assistant_is_the_one_nearest_to_halfway(changed: dict[str, float], dim: int, tmp_path: Path) -> None:
    with with_mrrs(MRRS | changed):
        report = ran(tmp_path, ASSISTED)
    rows = {s["name"]: s for s in report["stages"]}
    assert list(rows) == ["teacher", "direct", "assistant_12", "assistant_8", "assistant_4", "assistant", "student"]
    assert (rows["assistant"]["dim"], rows["assistant"]["teachers"], rows["assistant"]["method"]) == (
        dim,
        ["teacher"],
        "bkd",
    )
    assert rows["student"]["teachers"] == ["assistant"]
    chosen = rows["assistant"]["chosen"]
    assert (chosen["dim"], chosen["winner"]) == (dim, f"assistant_{dim}")
    assert chosen["middle"] == pytest.approx((chosen["between"]["teacher"] + chosen["between"]["direct"]) / 2)
    assert entity_rows(tmp_path, "assistant").shape[1] == dim
    (line,) = [line for line in markdown(report_of(report)).splitlines() if line.startswith("assistant: dim")]
    assert (
        f"dim {dim} of assistant_{dim}" in line and f"the middle of teacher {chosen['between']['teacher']:.3f}" in line
    )
    assert f"assistant − assistant_{dim}:" in markdown(report_of(report))


def test_of_equally_near_candidates_the_first_is_taken(tmp_path: Path) -> None:
    equal = {"teacher": 0.75, "direct": 0.25, "assistant_12": 0.625, "assistant_8": 0.375, "assistant_4": 0.125}
    with with_mrrs(equal):
        report = ran(tmp_path, ASSISTED)
    assert report["stages"][5]["chosen"]["dim"] == 12


def test_no_result_and_no_report_is_read_back_by_the_run_that_wrote_it(tmp_path: Path) -> None:
    read = mock.Mock(side_effect=AssertionError("read back"))
    with mock.patch.object(stage_result, "read_json", read), mock.patch.object(run_report, "read_json", read):
        ran(tmp_path / "run", ASSISTED)  # whose assistant is chosen by the results of four others
        with pytest.raises(AssertionError, match="read back"):
            ran(tmp_path / "run", ASSISTED, resume=True)


@pytest.mark.parametrize("stage", ["assistant_8", "assistant", "student"])
def test_a_resumed_run_chooses_the_same_assistant(stage: str, tmp_path: Path) -> None:
    whole = ran(tmp_path / "whole", ASSISTED)
    stopped_at(tmp_path / "run", ASSISTED, stage)
    with trained_stages() as trained:
        report = ran(tmp_path / "run", ASSISTED, resume=True)
    assert names(trained)[0] == stage and "teacher" not in names(trained)
    for mine, theirs in zip(report["stages"], whole["stages"], strict=True):
        assert mine.get("chosen") == theirs.get("chosen") and mine["test"] == theirs["test"]
    with trained_stages() as trained:
        assert ran(tmp_path / "run", ASSISTED, resume=True) == report
    assert not trained.called


def test_an_assistant_between_is_chosen_beside_a_teacher_from_elsewhere(tmp_path: Path) -> None:
    first = ran(tmp_path / "first", {"student": STAGE | {"dim": 16}})
    path = str(tmp_path / "first/stages/student")
    report = ran(tmp_path / "run", ASSISTED | {"teacher": path})
    chosen = next(row["chosen"] for row in report["stages"] if row["name"] == "assistant")
    assert chosen["between"][path] == pytest.approx(first["stages"][0]["valid"]["mrr"], abs=1e-6)
    with pytest.raises(ConfigError, match=r"dims must be below 16"):
        ran(tmp_path / "other", ASSISTED | {"teacher": path, "assistant": 16})


def test_the_plan_on_disk_names_what_is_still_to_be_chosen(tmp_path: Path) -> None:
    ran(tmp_path, ASSISTED)
    stored = yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8"))
    (assistant,) = [stage for stage in stored["stages"] if stage["name"] == "assistant"]
    assert [(name, one["dim"]) for name, one in assistant["one_of"].items()] == [
        ("assistant_12", 12),
        ("assistant_8", 8),
        ("assistant_4", 4),
    ]
    assert assistant["nearest_to_the_middle_of"] == ["teacher", "direct"]


def test_without_validation_triples_no_assistant_can_be_chosen(tmp_path: Path) -> None:
    graph = toy_graph()
    bare = Graph("bare", graph.train, graph.valid[:0], graph.test, graph.entities, graph.relations, "0" * 64, ())
    with trained_stages() as trained, pytest.raises(ConfigError, match=r"bare has no valid triples .* give one dim"):
        ran(tmp_path, ASSISTED, bare)
    assert not trained.called


@pytest.mark.parametrize("mistake", [{"dim": 7}, {"scorer": "transe", "bf16": True}])
def test_a_mistake_in_one_candidate_is_found_before_the_first_stage(mistake: dict[str, Any], tmp_path: Path) -> None:
    dims = [12, 7] if "dim" in mistake else [12, 8]
    per_dim = {} if "dim" in mistake else {8: mistake}
    tree = ASSISTED | {"assistant": {"dims": dims, "per_dim": per_dim}}
    with trained_stages() as trained, pytest.raises(DistkgdError, match="assistant"):
        ran(tmp_path, tree)
    assert not trained.called


# -- several teachers ---------------------------------------------------------------------------------------------


def test_every_teacher_reaches_the_method_in_the_order_of_the_config(tmp_path: Path) -> None:
    ran(tmp_path / "first", {"student": STAGE | {"dim": 10}})
    path = str(tmp_path / "first/stages/student")
    teachers = {"wide": STAGE | {"dim": 12}, "old": path, "slim": STAGE | {"dim": 8, "scorer": "distmult"}}
    tree = {"teachers": teachers, "student": STAGE | {"dim": 4, "method": "several"}, "baseline": True}
    with several(), trained_stages() as trained:
        report = ran(tmp_path / "run", tree)
        jobs = {call.args[0].name: call.args[0] for call in trained.call_args_list}
        assert list(jobs) == ["wide", "slim", "student", "direct"]
        method = jobs["student"].method
        assert isinstance(method, Several)
        assert [(m.scorer.name, m.entity.dim) for m in method.teachers] == [
            ("complex", 12),
            ("complex", 10),
            ("distmult", 8),
        ]
        assert [row["name"] for row in report["stages"]] == ["old", "wide", "slim", "student", "direct"]
        assert report["stages"][3]["teachers"] == ["wide", "old", "slim"]
        with trained_stages() as again:
            assert ran(tmp_path / "run", tree, resume=True) == report
        assert not again.called


def test_a_missing_teacher_is_found_before_its_companions_are_trained(tmp_path: Path) -> None:
    tree = {"teachers": {"a": STAGE, "b": str(tmp_path / "nowhere")}, "student": STAGE | {"method": "several"}}
    with several(), trained_stages() as trained, pytest.raises(ModelError, match="nowhere holds no model"):
        ran(tmp_path / "run", tree)
    assert not trained.called and not (tmp_path / "run").exists()


# -- starts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["random", "crop", "pca"])
def test_the_start_of_a_whole_chain_is_one_word(start: str, tmp_path: Path) -> None:
    tree = merge(CHAIN, {"teacher": {"scorer": "transe"}, "student": {"scorer": "transe", "start": start}})
    begun = []
    real = init_from_teacher.init_from_teacher

    def begin(student: Any, teacher: Any, how: Any) -> None:
        real(student, teacher, how)
        begun.append((teacher.entity.dim, student.entity.dim, how))

    with mock.patch.object(stage_job, "init_from_teacher", begin):
        report = ran(tmp_path, tree)
    assert begun == ([] if start == "random" else [(16, 8, start), (8, 4, start)])
    assert len(report["stages"]) == 4


WRONG_STARTS = {
    "another scorer": ({"teacher": {"scorer": "distmult"}}, "student_8.start: crop needs a teacher of the same scorer"),
    "other relations": (
        {"teacher": {"reciprocal": False}},
        "student_8.start: crop needs a teacher with reciprocal: true",
    ),
    "no turn": ({"student": {"start": "pca"}}, "student_8.start: pca mixes coordinates, which complex keeps apart"),
}


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_a_start_that_cannot_be_is_refused_before_the_first_stage(name: str, tmp_path: Path) -> None:
    change, message = WRONG_STARTS[name]
    tree = merge(merge(CHAIN, {"student": {"start": "crop"}}), change)
    with trained_stages() as trained, pytest.raises(DistkgdError, match=message):
        ran(tmp_path, tree)
    assert not trained.called


def test_a_student_as_large_as_its_teacher_begins_with_all_of_it_and_no_larger_one_may(tmp_path: Path) -> None:
    crop = {"teacher": {"dim": 8}, "student": {"start": "crop"}}
    ran(tmp_path / "same", merge(TAUGHT, merge(crop, {"student": {"dim": 8}})))
    with trained_stages() as trained, pytest.raises(DistkgdError, match=r"student.start: complex: crop to dim=10"):
        ran(tmp_path / "larger", merge(TAUGHT, merge(crop, {"student": {"dim": 10}})))
    assert not trained.called
