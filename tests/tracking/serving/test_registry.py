"""Versions and aliases in the registry of a real SQLite store."""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import distkgd
from distkgd.common.console import Display
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError, ModelError
from distkgd.models.export import export_model
from distkgd.models.model_folder import find_model, sha256_of
from distkgd.pipeline.autoconfig import Budget, request_of, run_own
from distkgd.reporting.run_report import Verdict
from distkgd.tracking.mlflow_store import EXPERIMENT
from distkgd.tracking.serving import entries, registry
from distkgd.tracking.serving.entries import RegisteredRun, entries_at, read_run, registered_name, roles_of
from distkgd.tracking.serving.openapi import ANSWER, openapi_text
from distkgd.tracking.serving.packing import pack
from distkgd.tracking.serving.registry import champion, register
from launch.register import main
from tests.own_graphs import own_triples, write_tsv
from tests.ranks import run_on_ranks
from tests.toys import toy_graph
from tests.tracking.serving.runs import run_toy

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.usefixtures("uri")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that MLflow has not heard of."""
    folder = tmp_path_factory.mktemp("registry") / "run"
    run_toy(folder)
    return folder


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run from another seed."""
    folder = tmp_path_factory.mktemp("again") / "run"
    run_toy(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path, bool], None]:
    """`pack`, but that a model is packed once and copied from then on."""
    place = tmp_path_factory.mktemp("packed")

    def pack_once(model: Path, out: Path, known: bool) -> None:
        assert not known
        kept = place / sha256_of(find_model(model) / "config.json")
        if not kept.exists():
            pack(model, kept)
        shutil.copytree(kept, out)

    return pack_once


def aliases(uri: str, name: str = "toy") -> dict[str, str]:
    """alias -> version."""
    found = mlflow.MlflowClient(uri).get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def versions(uri: str, name: str = "toy") -> list[Any]:
    found = mlflow.MlflowClient(uri).search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda one: int(one.version))


def connected(uri: str, tmp_path: Path) -> tuple[Any, str]:
    client = mlflow.MlflowClient(uri)
    return client, client.create_experiment(EXPERIMENT, artifact_location=(tmp_path / "mlartifacts").as_uri())


def launched(*arguments: Any, **options: Any) -> int:
    given = {"name": None, "uri": None, "champion_max_mb": None, "known": False, "speed": False} | options
    with pytest.raises(SystemExit) as ended:
        main(*arguments, **given)
    return int(ended.value.code or 0)


# -- plans ----------------------------------------------------------------------------------------------------------


def test_a_finished_plan_is_in_the_registry_and_answers_from_there(uri: str, tmp_path: Path) -> None:
    with patch.object(entries, "read_run", side_effect=AssertionError("read back")):
        report = run_toy(tmp_path / "run", mlflow={"enabled": True, "uri": uri})
    teacher, student, direct = versions(uri)
    found = aliases(uri)
    better = max((student, direct), key=lambda one: float(one.tags["valid_mrr"]))
    assert found == {"teacher": "1", "student-6": "2", "direct-6": "3", "champion": str(better.version)}
    rows = {row["name"]: row for row in report["stages"]}
    for one, stage in ((teacher, "teacher"), (student, "student"), (direct, "direct")):
        assert one.tags["stage"] == one.tags["role"] == stage
        assert float(one.tags["valid_mrr"]) == rows[stage]["valid"]["mrr"] and int(one.tags["bytes"]) > 0
    client = mlflow.MlflowClient(uri)
    state = json.loads((tmp_path / "run/mlflow.json").read_text())
    assert student.run_id == state["stages"]["student"]["run_id"]
    outputs = client.get_run(student.run_id).outputs.model_outputs
    assert [one.model_id for one in outputs] == [student.tags["model_id"]]
    assert client.list_artifacts(student.run_id, "model") == []  # it is stored once, in the logged model
    mlflow.set_tracking_uri(uri)
    try:
        served = mlflow.pyfunc.load_model("models:/toy@student-6")
    finally:
        mlflow.set_tracking_uri(None)
    (answer,) = served.predict([{"head": "e003", "relation": "r001", "k": 5}])
    wanted = distkgd.load(tmp_path / "run/stages/student").predict(head="e003", relation="r001", k=5)
    assert answer["names"] == wanted.names[0] and answer["ids"] == wanted.ids[0].tolist()
    assert served.input_example == [{"head": "e000", "relation": "r000", "k": 10}]
    assert served.metadata.signature.inputs is None  # MLflow would drop columns that it does not name
    assert [column.name for column in served.metadata.signature.outputs] == [*ANSWER]
    packed = Path(client.get_logged_model(student.tags["model_id"]).artifact_location.removeprefix("file://"))
    names = {path.name for path in (packed / "artifacts/model").iterdir()}
    assert {"entities.tsv", "relations.tsv", "config.json", "README.md"} <= names
    assert (packed / "openapi.json").read_text() == openapi_text()
    assert not list(packed.rglob("*.pkl")) and "served.py" in {path.name for path in packed.iterdir()}
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_plan_that_is_resumed_and_a_launcher_after_it_register_nothing_twice(uri: str, tmp_path: Path) -> None:
    track = {"mlflow": {"enabled": True, "uri": uri}}
    run_toy(tmp_path / "run", **track)
    before, ids = aliases(uri), [one.tags["model_id"] for one in versions(uri)]
    run_toy(tmp_path / "run", resume=True, **track)
    assert launched(tmp_path / "run") == 0
    assert aliases(uri) == before and [one.tags["model_id"] for one in versions(uri)] == ids


def run_tracked(ranks: Ranks, folder: str, uri: str) -> None:
    run_toy(Path(folder), ranks=ranks, mlflow={"enabled": True, "uri": uri})


def test_one_of_several_ranks_registers(uri: str, tmp_path: Path) -> None:
    run_on_ranks(2, run_tracked, folder=str(tmp_path / "run"), uri=uri)
    assert len(versions(uri)) == 3


def test_a_store_that_fails_at_the_end_costs_a_warning_and_no_run(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry, "pack", full)
    report = run_toy(tmp_path / "run", mlflow={"enabled": True, "uri": uri})
    assert len(report["stages"]) == 3 and versions(uri) == []
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("No space left" in text for text in said)


# -- once -------------------------------------------------------------------------------------------------------------

MOMENTS = [
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "create_model_version",
    "set_registered_model_alias",
]


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_call_that_was_killed_anywhere_is_made_good_without_a_second_version(
    moment: str,
    after: bool,
    run: Path,
    packed: Callable[[Path, Path], None],
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "pack", packed)
    client, experiment = connected(uri, tmp_path)
    models = read_run(run).entries()[1:]
    calls = Counter[str]()

    def dying(*arguments: Any, **options: Any) -> Any:
        calls[moment] += 1
        if calls[moment] < 2:
            return real(*arguments, **options)
        if after:
            real(*arguments, **options)
        raise Killed

    real = getattr(client, moment)
    with monkeypatch.context() as killed:
        killed.setattr(client, moment, dying)
        with pytest.raises(Killed):
            register(client, experiment, "toy", models, max_mb=None, runs={})
    (run / "stages/direct/.registering-left").mkdir()
    register(client, experiment, "toy", models, max_mb=None, runs={})
    assert [one.tags["stage"] for one in versions(uri)] == ["student", "direct"]
    logged = client.search_logged_models([experiment])
    assert Counter(str(one.status) for one in logged)["READY"] == len(logged) == 2
    assert aliases(uri).keys() == {"student-6", "direct-6", "champion"}
    assert not list(run.rglob(".registering-*"))


def test_a_model_that_was_trained_again_is_a_new_version_and_takes_the_alias(
    run: Path,
    again: Path,
    packed: Callable[[Path, Path], None],
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "pack", packed)
    client, experiment = connected(uri, tmp_path)
    for folder in (run, again):
        register(client, experiment, "toy", read_run(folder).entries(), max_mb=None, runs={})
    assert len(versions(uri)) == 6 and aliases(uri)["student-6"] == "5"


# -- the champion -----------------------------------------------------------------------------------------------------


def version(mrr: float | None, size: int, role: str = "student") -> dict[str, str]:
    return {"role": role, "bytes": str(size)} | ({} if mrr is None else {"valid_mrr": repr(mrr)})


@pytest.mark.parametrize(
    ("rivals", "max_mb", "wanted"),
    [
        ([version(0.9, 10**8, "teacher"), version(0.4, 10**6), version(0.5, 10**6, "direct")], None, 2),
        ([version(0.9, 10**8, "teacher"), version(0.4, 10**6)], 99.9, 1),
        ([version(0.9, 10**8, "teacher"), version(0.4, 10**6)], 100.0, 0),
        ([version(0.5, 10**6), version(0.6, 2 * 10**6), version(0.55, 10**6)], 1.0, 2),
        ([version(0.5, 2000), version(0.5, 1000), version(0.5, 1000)], None, 1),
        ([version(0.9, 10**8, "teacher")], None, None),
        ([version(0.5, 10**6)], 0.5, None),
        ([version(None, 10), version(float("nan"), 10)], None, None),
        ([version(0.5, 1000), version(0.5, 1000) | {"known": "true"}], None, 1),
        ([], None, None),
    ],
)
def test_the_champion_is_the_best_that_fits(
    rivals: list[dict[str, str]], max_mb: float | None, wanted: int | None
) -> None:
    assert champion(list(enumerate(rivals)), max_mb) == wanted


def test_a_budget_moves_the_alias_and_one_that_nothing_meets_leaves_it(
    run: Path, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {entry.stage: entry for entry in read_run(run).entries()}
    assert rows["teacher"].num_bytes > rows["student"].num_bytes
    # Two epochs on a random graph make no teacher better.
    tags = entries.Entry.tags
    monkeypatch.setattr(
        entries.Entry, "tags", lambda e: tags(e) | {"valid_mrr": "0.9" if e.role == "teacher" else "0.5"}
    )
    assert launched(run) == 0
    assert aliases(uri)["champion"] == "2"
    assert launched(run, champion_max_mb=100.0) == 0
    assert aliases(uri)["champion"] == "1"
    said = capsys.readouterr().err
    assert f"MLFLOW_TRACKING_URI={uri} mlflow models serve -m 'models:/toy@champion' --env-manager local" in said
    assert "champion: toy version 1, teacher, valid MRR 0.9000" in said
    assert launched(run, champion_max_mb=1e-6) == 0
    assert aliases(uri)["champion"] == "1"
    assert "no version of toy has at most 1e-06 MB" in capsys.readouterr().err


def test_models_of_other_data_do_not_compete(
    run: Path,
    again: Path,
    packed: Callable[[Path, Path], None],
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "pack", packed)
    client, experiment = connected(uri, tmp_path)
    register(client, experiment, "toy", read_run(run).entries(), max_mb=None, runs={})
    for one in versions(uri):
        client.set_model_version_tag("toy", one.version, "data_sha256", "another")
        client.set_model_version_tag("toy", one.version, "valid_mrr", "1.0")
    register(client, experiment, "toy", read_run(again).entries(), max_mb=None, runs={})
    assert aliases(uri)["champion"] in ("5", "6")


# -- what is registered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "wanted"),
    [
        ({"student": []}, {"student": "student"}),
        ({"student": ["some/path"], "direct": []}, {"student": "student", "direct": "direct"}),
        ({"teacher": [], "student_16": ["teacher"], "student": ["student_16"]}, {"teacher": "teacher"}),
        ({"one": [], "two": [], "student": ["one", "two"]}, {"one": "teacher", "two": "teacher"}),
        (
            {"teacher": [], "direct": [], "assistant_8": [], "assistant": ["teacher"], "student": ["assistant"]},
            {"teacher": "teacher", "direct": "direct"},
        ),
    ],
)
def test_the_ends_of_a_plan_are_registered_and_not_its_middle(
    stages: dict[str, list[str]], wanted: dict[str, str]
) -> None:
    assert roles_of(list(stages.items())) == wanted | {"student": "student"}


def test_several_teachers_have_an_alias_each(uri: str, tmp_path: Path) -> None:
    small = {"dim": 8, "batch_size": 100, "epochs": 1}
    two = {"teacher": None, "teachers": {"v2": small, "latest": small}, "student": {"method": "dualde"}}
    run_toy(tmp_path / "run", **two, mlflow={"enabled": True, "uri": uri, "registered_as": "my kge"})
    assert {"teacher-v2", "teacher-latest", "student-6", "direct-6"} <= aliases(uri, "my kge").keys()


def test_a_stage_or_a_model_folder_is_registered_alone(run: Path, uri: str, tmp_path: Path) -> None:
    assert launched(run / "stages/student") == 0
    assert aliases(uri) == {"student-6": "1", "champion": "1"}
    export_model(run / "stages/student", tmp_path / "small packed", "packed", Ranks())
    assert launched(tmp_path / "small packed", name="small") == 0
    assert aliases(uri, "small") == {"student-6-8bit": "1"}  # nobody knows how good it is
    assert [entry.alias for entry in entries_at(run / "stages/teacher/model")[0]] == ["teacher"]
    assert not list(tmp_path.rglob(".registering-*"))


def test_known_triples_go_along_when_asked_and_make_a_version_of_their_own(
    run: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, data, stage = toy_graph(), tmp_path / "data", tmp_path / "run/stages/student"
    shutil.copytree(run, tmp_path / "run")
    assert launched(stage) == 0
    assert launched(stage, known=True) == 2
    assert "this needs the data set" in capsys.readouterr().err
    data.mkdir()
    for split in ("train", "valid", "test"):
        rows = (f"e{h:03d}\tr{r:03d}\te{t:03d}\n" for h, r, t in getattr(graph, split).tolist())
        (data / f"{split}.tsv").write_text("".join(rows))
    config = json.loads((stage / "model/config.json").read_text())
    (stage / "model/config.json").write_text(json.dumps(config | {"source": str(data)}))
    assert launched(stage, name="known") == launched(stage, name="known", known=True) == 0
    assert launched(stage, name="known") == launched(stage, name="known", known=True) == 0
    assert [one.tags.get("known") for one in versions(uri, "known")] == [None, "true"]
    assert aliases(uri, "known") == {"student-6": "2", "champion": "2"}
    shutil.rmtree(data)
    mlflow.set_tracking_uri(uri)
    try:
        served = mlflow.pyfunc.load_model("models:/known@champion")
    finally:
        mlflow.set_tracking_uri(None)
    h, r, _ = graph.train[0].tolist()
    (answer,) = served.predict([{"head": f"e{h:03d}", "relation": f"r{r:03d}", "k": 41, "exclude_known": True}])
    every = torch.cat([graph.train, graph.valid, graph.test]).tolist()
    assert set(answer["ids"]) == set(range(41)) - {row[2] for row in every if row[:2] == [h, r]}


def test_what_cannot_be_registered_is_said_in_one_line(
    run: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(tmp_path / "nothing") == 2
    assert "holds no model" in capsys.readouterr().err
    assert launched(run, name="a/b") == 2
    assert "'a/b' cannot name a registered model" in capsys.readouterr().err
    assert launched(run, uri="./mlruns") == 2
    assert "file store" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    (file,) = (tmp_path / "run/stages/student/model").glob("entity*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert launched(tmp_path / "run") == 2
    assert file.name in capsys.readouterr().err
    assert [one.tags["stage"] for one in versions(uri)] == ["teacher"]
    for damage in ("{", "stages: []\n"):
        (tmp_path / "run/plan.yaml").write_text(damage)
        with pytest.raises(DistkgdError, match=r"plan\.yaml"):
            read_run(tmp_path / "run").entries()
    assert (ConfigError, ModelError) and registered_name("runs/a:b") == "runs-a-b" and registered_name("/") == "-"


# -- budgets and splits that are not there --------------------------------------------------------------------------


def test_the_student_that_a_budget_chose_is_registered_is_the_champion_and_is_found_by_its_budget(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run, name = write_tsv(tmp_path / "mine.tsv", own_triples(900, 120, 5)), tmp_path / "run", "mine_croppable"
    quick = ["device=cpu", "threads=1", f"mlflow.uri={uri}", "student.epochs=2", "student.dim=16", "report.html=false"]
    crops = "student.distill.dims={from: 4, to: 16, step: 4}"
    request = request_of(None, [*quick, crops], str(file), budget=Budget(max_mb=0.012))
    assert request is not None
    outcome = run_own(request, Ranks(), Display(True), run)
    assert outcome.report is not None and outcome.report.budget is not None
    dim, rows = outcome.report.budget.chosen, {stage.name: stage for stage in outcome.report.stages}
    assert aliases(uri, name) == {f"student-{dim}": "1", "teacher": "2", "champion": "1"}
    chosen, whole = versions(uri, name)
    assert (chosen.tags["stage"], chosen.tags["role"]) == (f"student_{dim}", "student") and dim is not None and dim < 16
    assert (whole.tags["stage"], whole.tags["role"]) == ("student", "teacher")
    assert float(chosen.tags["valid_mrr"]) == rows[f"student_{dim}"].mrr("valid")
    assert int(chosen.tags["bytes"]) <= 12_000 < int(whole.tags["bytes"])
    assert [entry.alias for entry in entries_at(run / f"stages/student_{dim}")[0]] == [f"student-{dim}"]

    better, mrr = "The directly trained model of that size is the better one", float(chosen.tags["valid_mrr"])
    said = any(better in remark for remark in outcome.report.remarks)
    assert said == ((rows["direct"].mrr("valid") or 0.0) > mrr) and capsys.readouterr().err.count(better) == said
    path = run / "stages/direct/result.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    for gain in (-0.05, 0.05):
        path.write_text(json.dumps(kept | {"valid": kept["valid"] | {"mrr": mrr + gain}}), encoding="utf-8")
        mlflow.MlflowClient(uri).delete_registered_model_alias(name, "champion")
        assert launched(run, champion_max_mb=0.012) == 0
        assert aliases(uri, name)["champion"] == "1"
        assert (better in capsys.readouterr().err) == (gain > 0)
    assert launched(run / "stages/direct", champion_max_mb=0.012, name=name) == 0
    assert aliases(uri, name)["champion"] == "3"  # who is told so can have it


def test_a_budget_that_no_model_has_met_limits_the_champion_unless_another_limit_is_given() -> None:
    missed = Verdict(wanted={"max_mb": 0.5}, met=False, chosen=None, sizes=())
    run = RegisteredRun(Path("run"), "run", {}, {}, missed, "0" * 64, "filtered, realistic")
    assert (run.champion_limit(None), run.champion_limit(2.0)) == (0.5, 2.0)
    met = dataclasses.replace(run, budget=missed.model_copy(update={"met": True, "chosen": 8}))
    assert met.champion_limit(None) is None and dataclasses.replace(run, budget=None).champion_limit(None) is None


def test_no_champion_is_chosen_on_an_empty_split(uri: str, tmp_path: Path) -> None:
    graph = dataclasses.replace(toy_graph(), valid=torch.zeros(0, 3, dtype=torch.int64))
    with patch("tests.tracking.serving.runs.toy_graph", lambda: graph):
        run_toy(tmp_path / "run", mlflow={"enabled": True, "uri": uri})
    assert aliases(uri).keys() == {"teacher", "student-6", "direct-6"}
    assert not any("valid_mrr" in one.tags for one in versions(uri))
    assert champion([(0, version(0.0, 10))], None) is None  # what was registered before says 0 of an empty split
