"""A plan: who teaches whom, what is on disk when it is done, and what is not done twice."""

import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.data import Graph, Vocabulary, load_graph
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError, ModelError
from distkgd.evaluation.ranking import metrics, ranks_of
from distkgd.methods import MethodSettings
from distkgd.models.model_folder import load_model
from distkgd.pipeline import plan
from distkgd.pipeline.config import RunConfig, load_config, parse_config, resolved
from distkgd.pipeline.plan import REPORTS, run_plan
from distkgd.pipeline.stages import build_plan
from distkgd.reporting.report import rows
from distkgd.reporting.run_report import read_report
from tests.launches import small_data
from tests.ranks import run_on_ranks
from tests.toys import toy_graph

SMALL: dict[str, Any] = {"batch_size": 100, "epochs": 3, "validate_every": 1, "optimizer": {"lr": 0.3}}
TEACHER: dict[str, Any] = {**SMALL, "dim": 12}
STUDENT: dict[str, Any] = {**SMALL, "dim": 6, "method": "bkd"}
TAUGHT = {"teacher": TEACHER, "student": STUDENT}


def parsed(tree: dict[str, Any]) -> RunConfig:
    return parse_config({"mlflow": {"enabled": False}} | tree, "test")


def ran(folder: Path, tree: dict[str, Any], graph: Graph | None = None, resume: bool = False) -> dict[str, Any]:
    """Run a plan on one rank; returns report.json as it is on disk."""
    run_plan(parsed(tree), graph or toy_graph(), Ranks(), folder, resume=resume, display=Display(False))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def run_on_data(ranks: Ranks, tree: dict[str, Any], data: str, folder: str) -> None:
    """Run a plan on a folder of data; for rank processes."""
    run_plan(parsed(tree), load_graph(Path(data)), ranks, Path(folder), resume=False, display=Display(False))


def trained_stages() -> Any:
    """Patches the plan's training loop; the mock knows which jobs it was given."""
    return mock.patch.object(plan, "train_stage", side_effect=plan.train_stage)


# -- stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "stages"),
    [
        ({}, [("student", "scratch", ())]),
        (TAUGHT, [("teacher", "scratch", ()), ("student", "bkd", ("teacher",))]),
        (
            {**TAUGHT, "baseline": True},
            [("teacher", "scratch", ()), ("student", "bkd", ("teacher",)), ("direct", "scratch", ())],
        ),
        ({"teacher": "a/b", "student": STUDENT}, [("student", "bkd", ("a/b",))]),
        (
            {"teacher": "a/b", "student": STUDENT, "baseline": {"epochs": 9}},
            [("student", "bkd", ("a/b",)), ("direct", "scratch", ())],
        ),
        ({"baseline": True}, [("student", "scratch", ()), ("direct", "scratch", ())]),
    ],
)
def test_every_teacher_comes_before_its_student(tree: dict[str, Any], stages: list[Any]) -> None:
    assert [(s.name, s.config.method, s.teachers) for s in build_plan(parsed(tree))] == stages


def test_the_baseline_is_the_student_without_its_teacher() -> None:
    *_, student, direct = build_plan(parsed({**TAUGHT, "baseline": True}))
    assert direct.config == student.config.model_copy(update={"method": "scratch", "distill": MethodSettings()})


def test_a_baseline_mapping_changes_keys_of_the_student() -> None:
    *_, student, direct = build_plan(parsed({**TAUGHT, "baseline": {"epochs": 9, "optimizer": {"clip": 2}}}))
    assert (direct.config.epochs, direct.config.dim) == (9, student.config.dim)
    assert (direct.config.optimizer.clip, direct.config.optimizer.lr) == (2.0, 0.3)


# -- the run folder -----------------------------------------------------------------------------------------------


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def share(value: Any) -> bool:
    return number(value) and 0 <= value <= 1


def count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


METRICS = dict.fromkeys(("mrr", "hits_at_1", "hits_at_3", "hits_at_10"), share)
DATA = {"name": text, "sha256": text} | dict.fromkeys(
    ("num_entities", "num_relations", "num_train", "num_valid", "num_test"), count
)
STAGE: dict[str, Any] = {
    "name": text,
    "method": text,
    "scorer": text,
    "dim": count,
    "bytes": count,
    "num_parameters": count,
    "teachers": lambda value: isinstance(value, list) and all(map(text, value)),
    "seconds": number,
    "steps": count,
    "triples_per_second": number,
    "valid": METRICS,
    "test": METRICS,
}
REPORT: dict[str, Any] = {
    "data": DATA,
    "protocol": lambda value: isinstance(value, dict) and bool(value),
    "world": count,
    "device": text,
    "stages": lambda value: isinstance(value, list) and bool(value),
}


def assert_follows(schema: dict[str, Any], value: dict[str, Any], where: str = "report") -> None:
    for key, check in schema.items():
        assert key in value, f"{where} lacks {key}"
        if isinstance(check, dict):
            assert_follows(check, value[key], f"{where}.{key}")
        else:
            assert check(value[key]), f"{where}.{key} is {value[key]!r}"


def test_the_report_has_every_key_it_promises(tmp_path: Path) -> None:
    graph = toy_graph()
    report = ran(tmp_path, {**TAUGHT, "baseline": True}, graph)
    assert_follows(REPORT, report)
    for stage in report["stages"]:
        assert_follows(STAGE, stage, stage["name"])
    assert [s["name"] for s in report["stages"]] == ["teacher", "student", "direct"]
    assert [s["teachers"] for s in report["stages"]] == [[], ["teacher"], []]
    assert [s["dim"] for s in report["stages"]] == [12, 6, 6]
    per_epoch = -(-len(graph.train) // 100)
    assert [s["steps"] for s in report["stages"]] == [3 * per_epoch] * 3
    assert report["data"] == graph.summary()
    assert (report["world"], report["device"]) == (1, "cpu")
    expected = {"filter": "filtered", "candidates": "all", "ties": "realistic", "directions": "both", "unseen": "kept"}
    assert expected.items() <= report["protocol"].items()
    for stage in report["stages"]:
        entity, relation = graph.num_entities * stage["dim"], 2 * graph.num_relations * stage["dim"]
        assert stage["num_parameters"] == entity + relation
        files = (tmp_path / "stages" / stage["name"] / "model").glob("*.safetensors")
        assert stage["bytes"] == sum(file.stat().st_size for file in files)
        assert stage["bytes"] >= 4 * stage["num_parameters"]


def test_the_run_folder_holds_what_the_documentation_names(tmp_path: Path) -> None:
    tree = {**TAUGHT, "baseline": True}
    ran(tmp_path, tree)
    stages = {"teacher", "student", "direct"}
    files = {"plan.yaml", *REPORTS, "examples.json", "run.log"}
    assert {"report.json", "report.md", "report.html", "frontier.html"} == {*REPORTS}  # what MLflow gets
    assert {path.name for path in tmp_path.iterdir()} == {*files, "stages"}
    assert {path.name for path in (tmp_path / "stages").iterdir()} == stages
    for stage in stages:
        folder = tmp_path / "stages" / stage
        assert {path.name for path in folder.iterdir()} == {"checkpoint", "model", "metrics.jsonl", "result.json"}
        config = json.loads((folder / "model/config.json").read_text(encoding="utf-8"))
        names = {
            "config.json",
            "entities.tsv",
            "relations.tsv",
            *config["files"]["entity"],
            *config["files"]["relation"],
        }
        assert {path.name for path in (folder / "model").iterdir()} == names


def test_the_plan_on_disk_is_the_resolved_config_and_can_be_run_again(tmp_path: Path) -> None:
    tree = {**TAUGHT, "baseline": {"epochs": 2}}
    ran(tmp_path / "run", tree)
    stored = yaml.safe_load((tmp_path / "run/plan.yaml").read_text(encoding="utf-8"))
    assert stored["config"] == resolved(parsed(tree))
    assert [(s["name"], s["teachers"]) for s in stored["stages"]] == [
        ("teacher", []),
        ("student", ["teacher"]),
        ("direct", []),
    ]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(stored["config"]), encoding="utf-8")
    assert load_config(again) == parsed(tree)


# -- a teacher that exists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["stages/teacher", "stages/teacher/model"])
def test_a_teacher_can_be_a_finished_model_and_stays_as_it_was(where: str, tmp_path: Path) -> None:
    whole = ran(tmp_path / "whole", TAUGHT)
    path = tmp_path / "whole" / where
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    student = {**STUDENT, "method": "dualde", "distill": {"stage_two": {"start": 1, "epochs": 1}}}
    for method in (STUDENT, student):
        name = method["method"]
        with trained_stages() as trained:
            report = ran(tmp_path / name, {"teacher": str(path), "student": method})
        assert [call.args[0].name for call in trained.call_args_list] == ["student"]
        assert [(s["name"], s["teachers"]) for s in report["stages"]] == [("teacher", []), ("student", ["teacher"])]
        assert report["stages"][0]["source"] == str(path)
        assert report["stages"][0]["test"] == pytest.approx(whole["stages"][0]["test"])
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    assert after == before
    bkd = json.loads((tmp_path / "bkd/report.json").read_text(encoding="utf-8"))
    assert bkd["stages"][1]["test"] == whole["stages"][1]["test"]


def test_bfloat16_rows_halve_the_model_folder_and_score_there_as_in_training(tmp_path: Path) -> None:
    rows = {"row_dtype": "bfloat16"}
    tree = {"teacher": {**TEACHER, **rows}, "student": {**STUDENT, **rows, "epochs": 6}}
    half, full = ran(tmp_path / "half", tree), ran(tmp_path / "full", TAUGHT)
    for name, stage in (("teacher", half["stages"][0]), ("student", half["stages"][1])):
        loaded = load_model(tmp_path / "half/stages" / name, Ranks()).model
        assert loaded.entity.weight.dtype == torch.bfloat16 and loaded.relation.dtype == torch.float32
        graph = toy_graph()
        answers = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
        assert metrics(ranks_of(loaded, graph.test, answers, Ranks())) == pytest.approx(stage["test"])
    models = [tmp_path / run / "stages/teacher/model" for run in ("half", "full")]
    sizes = [sum(file.stat().st_size for file in model.glob("entity-*")) for model in models]
    assert sizes[0] < 0.6 * sizes[1]
    assert half["stages"][1]["valid"]["mrr"] == pytest.approx(full["stages"][1]["valid"]["mrr"], abs=0.1)


def renamed(graph: Graph, kind: str) -> Graph:
    """The same triples over other names."""
    names = {"entities": graph.entities, "relations": graph.relations}
    names[kind] = Vocabulary(pl.Series([f"x{name}" for name in names[kind].names]))
    splits = (graph.train, graph.valid, graph.test)
    return Graph("renamed", *splits, names["entities"], names["relations"], graph.sha256, ())


@pytest.mark.parametrize("kind", ["entities", "relations"])
def test_a_teacher_of_other_names_is_refused(kind: str, tmp_path: Path) -> None:
    ran(tmp_path / "run", {"student": TEACHER})
    path = tmp_path / "run/stages/student"
    with pytest.raises(ModelError, match=rf"stages/student was trained on other {kind}.*renamed"):
        ran(tmp_path / "other", {"teacher": str(path), "student": STUDENT}, renamed(toy_graph(), kind))


def test_a_teacher_of_another_number_of_entities_is_refused(tmp_path: Path) -> None:
    ran(tmp_path / "run", {"student": TEACHER})
    path = tmp_path / "run/stages/student"
    with pytest.raises(ModelError, match=r"other entities \(41\) than toy \(43\)"):
        ran(tmp_path / "other", {"teacher": str(path), "student": STUDENT}, toy_graph(entities=43))


@pytest.mark.parametrize("path", ["nowhere", "runs", "stages/student"])
def test_a_teacher_that_is_no_model_is_refused_by_its_path(path: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match=rf"{path} holds no model"):
        ran(tmp_path / "run", {"teacher": str(tmp_path / path), "student": STUDENT})


# -- resume -------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_run_folder_is_not_used_twice_without_resume(tmp_path: Path) -> None:
    ran(tmp_path, {"student": STUDENT | {"method": "scratch"}})
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run; add --resume .* --out"):
        ran(tmp_path, {"student": STUDENT | {"method": "scratch"}})
    assert files_of(tmp_path) == before


def test_a_finished_run_is_reported_again_and_nothing_is_trained(tmp_path: Path) -> None:
    first = ran(tmp_path, {**TAUGHT, "baseline": True})
    before = files_of(tmp_path / "stages")
    with trained_stages() as trained:
        assert ran(tmp_path, {**TAUGHT, "baseline": True}, resume=True) == first
    assert not trained.called
    assert files_of(tmp_path / "stages") == before


def test_resume_starts_at_the_first_unfinished_stage(tmp_path: Path) -> None:
    tree = {**TAUGHT, "baseline": True}
    whole = ran(tmp_path / "whole", tree)
    real = plan.train_stage

    def stop_at_student(job: Any) -> Any:
        if job.name == "student":
            raise KeyboardInterrupt
        return real(job)

    folder = tmp_path / "run"
    with mock.patch.object(plan, "train_stage", stop_at_student), pytest.raises(KeyboardInterrupt):
        ran(folder, tree)
    assert not (folder / "report.json").exists()
    teacher = files_of(folder / "stages/teacher")
    with trained_stages() as trained:
        report = ran(folder, tree, resume=True)
    assert [call.args[0].name for call in trained.call_args_list] == ["student", "direct"]
    assert files_of(folder / "stages/teacher") == teacher
    assert [s["test"] for s in report["stages"]] == [s["test"] for s in whole["stages"]]


def test_a_stage_that_was_trained_but_not_saved_is_saved_on_resume(tmp_path: Path) -> None:
    whole = ran(tmp_path / "whole", {"student": TEACHER})
    folder = tmp_path / "run"
    with mock.patch.object(plan, "save_model", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ran(folder, {"student": TEACHER})
    report = ran(folder, {"student": TEACHER}, resume=True)
    assert report["stages"][0]["test"] == whole["stages"][0]["test"]
    name = "stages/student/model/entity-00001-of-00001.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"dtype": "float64"}, {"teacher": {"epochs": 4}}, {"student": {"dim": 8}}], ids=str
)
def test_a_run_of_another_config_is_refused_by_what_differs(change: dict[str, Any], tmp_path: Path) -> None:
    ran(tmp_path, TAUGHT)
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"made by another .*--out") as info:
        ran(tmp_path, merge(TAUGHT, change), resume=True)
    assert next(iter(change)) in str(info.value)
    assert files_of(tmp_path) == before


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    ran(tmp_path, TAUGHT)
    with pytest.raises(ConfigError, match=r"made by another .*data"):
        ran(tmp_path, TAUGHT, toy_graph(seed=1), resume=True)


@pytest.mark.parametrize("change", [{"threads": 1}, {"keep": 3}, {"device": "cpu"}], ids=str)
def test_how_a_run_is_run_may_change_on_resume(change: dict[str, Any], tmp_path: Path) -> None:
    first = ran(tmp_path, TAUGHT)
    assert ran(tmp_path, {**TAUGHT, **change}, resume=True)["stages"] == first["stages"]


@pytest.mark.parametrize("content", ["", "{", "config: 5", "config: {}", "- 1"])
def test_a_damaged_plan_is_named(content: str, tmp_path: Path) -> None:
    ran(tmp_path, {"student": TEACHER})
    (tmp_path / "plan.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"plan\.yaml"):
        ran(tmp_path, {"student": TEACHER}, resume=True)


def test_a_stage_with_the_result_of_another_config_is_refused(tmp_path: Path) -> None:
    """A stage folder that was copied in from another run."""
    ran(tmp_path / "run", TAUGHT)
    ran(tmp_path / "other", {"student": STUDENT | {"method": "scratch"}})
    shutil.rmtree(tmp_path / "run/stages/student")
    shutil.copytree(tmp_path / "other/stages/student", tmp_path / "run/stages/student")
    with pytest.raises(ConfigError, match=r"stages/student was made by another config, data set or teacher.*--out"):
        ran(tmp_path / "run", TAUGHT, resume=True)


@pytest.mark.parametrize("change", [{"ties": "optimistic"}, {"filter": "raw"}], ids=str)
def test_a_report_never_gives_finished_figures_another_protocol(change: dict[str, Any], tmp_path: Path) -> None:
    ran(tmp_path / "run", {"student": TEACHER})
    try:
        report = ran(tmp_path / "run", {"student": TEACHER, **change}, resume=True)
    except ConfigError:
        return
    fresh = ran(tmp_path / "fresh", {"student": TEACHER, **change})
    assert report["protocol"] == fresh["protocol"]
    assert report["stages"][0]["test"] == fresh["stages"][0]["test"]


def test_a_student_of_other_teacher_rows_is_refused_on_resume(tmp_path: Path) -> None:
    ran(tmp_path / "first", {"student": TEACHER})
    ran(tmp_path / "second", {"student": TEACHER, "seed": 1})
    path = tmp_path / "teacher"
    shutil.copytree(tmp_path / "first/stages/student/model", path)
    ran(tmp_path / "run", {"teacher": str(path), "student": STUDENT})
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "second/stages/student/model", path)
    with pytest.raises(ConfigError, match=r"stages/student was made by another .*teacher"):
        ran(tmp_path / "run", {"teacher": str(path), "student": STUDENT}, resume=True)


# -- mistakes in a later stage ------------------------------------------------------------------------------------

LATE: dict[str, dict[str, Any]] = {
    "unknown scorer": {"scorer": "complexx"},
    "odd dim": {"dim": 7},
    "margin of a scorer without": {"margin": 3.0},
    "bf16 distances": {"scorer": "transe", "bf16": True},
    "dualde with a hinge": {"method": "dualde", "loss": {"name": "margin"}},
    "dura with a distance": {"scorer": "transe", "regulariser": {"name": "dura", "weight": 0.1}},
    "heads without a formula": {"scorer": "roth", "reciprocal": False},
    "batch above the data": {"batch_size": 10_000},
}


# A baseline has no method of its own to be wrong with.
LATE_CASES = [
    (name, stage)
    for name, tree in LATE.items()
    for stage in ("student", "baseline")
    if stage == "student" or "method" not in tree
]


@pytest.mark.parametrize(("mistake", "stage"), LATE_CASES)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_one_is_trained(
    mistake: str, stage: str, tmp_path: Path
) -> None:
    tree = merge({**TAUGHT, "baseline": {"epochs": 2}}, {stage: LATE[mistake]})
    with trained_stages() as trained, pytest.raises(DistkgdError):
        ran(tmp_path, tree)
    assert [call.args[0].name for call in trained.call_args_list] == []


# -- a model folder that others can read --------------------------------------------------------------------------


def names_of(file: Path) -> dict[str, int]:
    with file.open(encoding="utf-8", newline="") as lines:
        return {name: int(row) for row, name in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)}


def triples_of(data: Path, split: str) -> list[tuple[str, str, str]]:
    lines = (data / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    return [(h, r, t) for h, r, t in (line.split("\t") for line in lines)]


def reranked_mrr(model: Path, data: Path) -> float:
    """Filtered, realistic MRR of a ComplEx model on the test split: NumPy, the files, and nothing of ours."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    entity, relation = (
        np.concatenate([load_file(model / f)[k] for f in config["files"][k]]).astype(np.float64)
        for k in ("entity", "relation")
    )
    fixed = np.arange(min(1024, len(entity))) * len(entity) // min(1024, len(entity))
    ulp = np.spacing if config["dtype"] == "float64" else lambda score: np.spacing(np.float32(score))
    e, r = entity[:, 0::2] + 1j * entity[:, 1::2], relation[:, 0::2] + 1j * relation[:, 1::2]
    ids, kinds = names_of(model / "entities.tsv"), names_of(model / "relations.tsv")
    known = {(ids[h], kinds[k], ids[t]) for s in ("train", "valid", "test") for h, k, t in triples_of(data, s)}
    reciprocal = []
    for h, k, t in [(ids[h], kinds[k], ids[t]) for h, k, t in triples_of(data, "test")]:
        inverse = (
            (e[t] * r[k + len(kinds)] * e.conj()).sum(1) if config["reciprocal"] else (e * r[k] * e[t].conj()).sum(1)
        )
        for answer, scores, others in (
            (t, (e[h] * r[k] * e.conj()).sum(1).real, [x for x in range(len(e)) if (h, k, x) in known]),
            (h, inverse.real, [x for x in range(len(e)) if (x, k, t) in known]),
        ):
            rivals = np.delete(scores, others)
            near = max(1e-5 * np.ptp(scores[fixed]), 16 * ulp(abs(scores[answer])))
            better, equal = (rivals > scores[answer] + near).sum(), (abs(rivals - scores[answer]) <= near).sum()
            reciprocal.append(1.0 / (1.0 + better + equal / 2))
    return float(np.mean(reciprocal))


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_anyone_can_re_rank_a_finished_model_with_numpy(world: int, reciprocal: bool, tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    more = {"reciprocal": reciprocal, "epochs": 8}
    tree = merge(TAUGHT, {"teacher": more, "student": more})
    folder = tmp_path / "run"
    run_on_ranks(world, run_on_data, tree=tree, data=str(data), folder=str(folder))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["world"] == world
    for stage in report["stages"]:
        model = folder / "stages" / stage["name"] / "model"
        assert len(list(model.glob("entity-*.safetensors"))) == world
        assert reranked_mrr(model, data) == pytest.approx(stage["test"]["mrr"], abs=1e-6)


def test_equal_scores_count_half_in_report_and_numpy_alike(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    tied = {**TEACHER, "init_scale": 1e-120, "optimizer": {"lr": 1e-12}}  # too small for its rows: all are 0
    report = ran(tmp_path / "run", {"student": tied}, load_graph(data))
    mrr = report["stages"][0]["test"]["mrr"]
    assert reranked_mrr(tmp_path / "run/stages/student/model", data) == pytest.approx(mrr, abs=1e-9)
    assert 1 / 26 < mrr < 1 / 20


@pytest.fixture(scope="module")
def labelled_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model whose entities and relations have labels."""
    place = tmp_path_factory.mktemp("model")
    data = small_data(place / "data")
    (data / "names.tsv").write_text('e01\ta "quoted" name\ne02\t it\'s two\n', encoding="utf-8")
    (data / "relation_names.tsv").write_text("r0\tgoes to\n", encoding="utf-8")
    ran(place / "run", {"student": TEACHER}, load_graph(data))
    return place / "run/stages/student/model"


def test_a_loaded_model_is_the_saved_one(labelled_model: Path) -> None:
    loaded = load_model(labelled_model, Ranks())
    assert len(loaded.entities) == loaded.model.entity.total == loaded.config["num_entities"]
    assert loaded.entities.label(loaded.entities.id("e01")) == 'a "quoted" name'
    assert loaded.entities.label(loaded.entities.id("e05")) == "e05"
    assert loaded.relations.label(0) == "goes to"
    stored = load_file(labelled_model / loaded.config["files"]["entity"][0])["entity"]
    assert np.array_equal(loaded.model.entity.weight.numpy(), stored)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_last_line(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def junk(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00\x01\t\t\t\x80\n" * 9)


TABLES, LABELS = ["entities.tsv", "relations.tsv"], ["entity_labels.tsv", "relation_labels.tsv"]
DAMAGED = [
    *itertools.product(["entity-*", "relation-*", "config.json", *TABLES], [cut_in_half, emptied, junk, Path.unlink]),
    *itertools.product(LABELS, [cut_in_half, emptied, junk]),  # labels may be missing
    *itertools.product([*TABLES, *LABELS], [without_last_line]),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGED, ids=[f"{p}-{d.__name__}" for p, d in DAMAGED])
def test_a_damaged_model_file_is_named(
    pattern: str, damage: Callable[[Path], None], labelled_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(labelled_model, copy)
    (file,) = copy.glob(pattern)
    damage(file)
    with pytest.raises(DistkgdError) as info:
        load_model(copy, Ranks())
    if not (pattern == "config.json" and damage is Path.unlink):
        assert file.name in str(info.value)
    assert str(copy) in str(info.value)
    if not pattern.endswith(".tsv"):
        assert isinstance(info.value, ModelError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "distkgd-model/9"),
        ("scorer", {"name": "complex"}),
        ("scorer", {"name": "nothing", "dim": 12}),
        ("scorer", 5),
        ("num_entities", 49),
        ("num_relations", "four"),
        ("files", {"entity": []}),
        ("files", None),
    ],
)
def test_a_garbled_model_config_is_a_named_error(key: str, value: Any, labelled_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(labelled_model, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=str(copy)):
        load_model(copy, Ranks())


def test_a_truncated_teacher_stops_the_plan_by_its_name(labelled_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(labelled_model, copy)
    (file,) = copy.glob("entity-*")
    cut_in_half(file)
    graph = load_graph(labelled_model.parents[3] / "data")
    with pytest.raises(ModelError, match=file.name):
        ran(tmp_path / "run", {"teacher": str(copy), "student": STUDENT}, graph)


# -- splits that are not there --------------------------------------------------------------------------------------


def without(*splits: str) -> Graph:
    """The toy graph whose `splits` are empty."""
    return dataclasses.replace(toy_graph(), **dict.fromkeys(splits, torch.zeros(0, 3, dtype=torch.int64)))


@pytest.mark.parametrize("empty", [("valid",), ("test",), ("valid", "test")])
def test_an_empty_split_has_no_figures_in_any_report_nor_in_what_mlflow_is_told(
    empty: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    med = {"student": {**SMALL, "dim": 8, "method": "med", "distill": {"dims": [4, 8]}}, "baseline": True}
    graph = without(*empty)
    for tree in (TAUGHT, med):
        folder = tmp_path / tree["student"]["method"]
        run_plan(parsed(tree), graph, Ranks(), folder, resume=False, display=Display(True))
        run_plan(parsed(tree), graph, Ranks(), folder, resume=True, display=Display(True))
        report = read_report(folder)
        for stage, cells in zip(report.stages, rows(report), strict=True):
            known = stage.final_metrics()
            for split, column in (("valid", 6), ("test", 7)):
                figures = [stage.metrics(split), *stage.curve.get(split, {}).values()]
                assert all((one["mrr"] is None) == (split in empty) for one in figures)
                assert (cells[column] == "–") == (split in empty) == (f"final/{split}/mrr" not in known)
        for name in ("report.json", "report.md", "report.html"):
            text = (folder / name).read_text(encoding="utf-8")
            assert not re.search(r"\b0\.0000?\b", re.sub(r"<svg.*?</svg>|<style.*?</style>", "", text, flags=re.S)), (
                name
            )
    said = capsys.readouterr().err
    assert "0.0000" not in said and f"{empty[0]} MRR –" in said


@pytest.mark.parametrize("waits", [{"patience": 2}, {"schedule": {"name": "plateau"}}])
def test_what_waits_for_validation_is_refused_without_any_before_the_folder_is_made(
    waits: dict[str, Any], tmp_path: Path
) -> None:
    tree = {"teacher": {**TEACHER, **waits}, "student": STUDENT}
    with pytest.raises(ConfigError, match=r"^teacher: (patience 2|schedule plateau) would wait .* no valid triples"):
        ran(tmp_path / "run", tree, without("valid"))
    if "patience" in waits:
        with pytest.raises(ConfigError, match=r"teacher: patience 2 would wait .*validate_every is 0"):
            ran(tmp_path / "run", merge(tree, {"teacher": {"validate_every": 0}}))
    assert not (tmp_path / "run").exists()
    ran(tmp_path / "run", merge(tree, {"student": {"epochs": 1}, "teacher": {"epochs": 1}}))


def test_what_is_odd_about_the_data_stands_in_the_report(tmp_path: Path) -> None:
    graph = dataclasses.replace(toy_graph(), warnings=("test: its 50 triples are those of valid",))
    report = ran(tmp_path / "run", {"student": {**STUDENT, "method": "scratch", "epochs": 1}}, graph)
    assert report["remarks"] == ["Data: test: its 50 triples are those of valid."]
