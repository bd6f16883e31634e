"""Runs in a real SQLite store of MLflow: a copy, for each test, of one whose schema was made once."""

import json
import logging
import math
import os
import shutil
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from distkgd.errors import ConfigError
from distkgd.tracking import mlflow_runs as module
from distkgd.tracking.mlflow_runs import MlflowTracking, open_tracking
from distkgd.tracking.tracker import NoStageTracking, NoTracking, StageTracking, Tracking

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.usefixtures("uri")

DATASET = {
    "name": "umls",
    "sha256": "0123456789abcdef" * 4,
    "num_entities": 135,
    "num_relations": 46,
    "num_train": 5216,
    "num_valid": 652,
    "num_test": 661,
}


def _open(uri: str | None, folder: str = "run", *, name: str = "plan") -> Tracking:
    return open_tracking(run_folder=Path(folder).absolute(), name=name, uri=uri, enabled=True, active=True)


def _started(uri: str | None, folder: str = "run", **params: object) -> Tracking:
    tracking = _open(uri, folder)
    tracking.start(params or {"seed": 1}, {"git": "abc"}, DATASET)
    return tracking


def _client(uri: str) -> "mlflow.MlflowClient":
    return mlflow.MlflowClient(tracking_uri=uri)


def _runs(uri: str) -> dict[str, "mlflow.entities.Run"]:
    client = _client(uri)
    experiment = client.get_experiment_by_name("distkgd")
    found = client.search_runs([experiment.experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found), "two runs of one name"
    return runs


def _curve(uri: str, run: str, metric: str) -> list[tuple[int, float]]:
    history = _client(uri).get_metric_history(_runs(uri)[run].info.run_id, metric)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)]


def _artifact(uri: str, run: str, path: str) -> Path:
    return Path(_client(uri).download_artifacts(_runs(uri)[run].info.run_id, path))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("distkgd.tracking.") and record.levelno >= logging.WARNING
    ]


def test_a_plan_is_a_parent_run_and_each_stage_a_child_of_it(uri: str):
    tracking = _started(uri)
    for name in ("teacher", "student"):
        tracking.stage(name, {}, {"method": name}).finish("FINISHED", None)
    tracking.finish("FINISHED")
    runs = _runs(uri)
    assert set(runs) == {"plan", "teacher", "student"}
    for name in ("teacher", "student"):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["plan"].info.run_id
        assert runs[name].data.tags["method"] == name
    assert "mlflow.parentRunId" not in runs["plan"].data.tags
    assert runs["plan"].data.tags["git"] == "abc"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_figures_of_a_plan_as_a_whole_are_the_parents(uri: str):
    for mrr in (0.25, 0.5):  # told again by a resumed plan
        tracking = _started(uri)
        tracking.log({"budget/test/mrr_32_2bit": mrr})
        tracking.finish("FINISHED")
    assert _runs(uri)["plan"].data.metrics == {"budget/test/mrr_32_2bit": 0.5}


def test_a_resumed_plan_reopens_its_runs_and_continues_its_curves(uri: str):
    first = _started(uri)
    stage = first.stage("student", {"dim": 32}, {})
    for step in range(4):
        stage.log({"loss": 10.0 - step}, step)
    stage.finish("KILLED", None)
    first.finish("KILLED")
    before = {name: run.info.run_id for name, run in _runs(uri).items()}

    second = _started(uri)
    stage = second.stage("student", {"dim": 32}, {})
    assert {run.info.status for run in _runs(uri).values()} == {"RUNNING"}
    for step in range(2, 6):  # steps 2 and 3 were logged before the stop and are trained again
        stage.log({"loss": 10.0 - step}, step)
    stage.finish("FINISHED", None)
    second.finish("FINISHED")

    after = _runs(uri)
    assert {name: run.info.run_id for name, run in after.items()} == before
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert _curve(uri, "student", "loss") == [(step, 10.0 - step) for step in range(6)]
    assert "resumed_params_changed" not in after["student"].data.tags


def test_params_that_changed_before_a_resume_are_told_in_a_tag_and_the_new_points_are_kept(uri: str):
    for rate in (0.1, 0.2):
        tracking = _started(uri, seed=1)
        stage = tracking.stage("student", {"lr": rate, "dim": 32}, {})
        stage.log({"loss": rate}, 0)
        stage.finish("KILLED", None)
        tracking.finish("KILLED")
    student = _runs(uri)["student"]
    assert student.data.params == {"lr": "0.1", "dim": "32"}
    assert json.loads(student.data.tags["resumed_params_changed"]) == {"lr": ["0.1", "0.2"]}
    assert sorted(value for _, value in _curve(uri, "student", "loss")) == [0.1, 0.2]


def test_params_added_before_a_resume_are_logged(uri: str):
    _started(uri, seed=1).finish("KILLED")
    _started(uri, seed=1, more=2).finish("FINISHED")
    assert _runs(uri)["plan"].data.params == {"seed": "1", "more": "2"}


def test_params_are_flattened_spelled_as_yaml_and_cut_at_mlflows_length(uri: str):
    tree = {
        "train": {"optimiser": {"lr": 0.001}, "bf16": True, "clip": None},
        "dims": [32, 64],
        "stages": [{"name": "teacher"}, {"name": "student"}],
        "empty": {},
        "text": "x" * 7000,
        "hits@10": Path("/a/b"),
    }
    many = {f"p{index}": "y" * 50 for index in range(230)}
    _started(uri, **tree, many=many).finish("FINISHED")
    params = _runs(uri)["plan"].data.params
    assert params["train.optimiser.lr"] == "0.001"
    assert params["train.bf16"] == "true"
    assert params["train.clip"] == "null"
    assert params["dims"] == "[32, 64]"
    assert params["stages.1.name"] == "student"
    assert params["empty"] == "{}"
    assert params["text"] == "x" * 5999 + "…"
    assert params["hits_at_10"] == "/a/b"
    assert sum(key.startswith("many.p") for key in params) == 230


def test_no_password_of_a_url_reaches_params_tags_or_the_run_folder(uri: str):
    secret = "postgresql://me:hunter2@db:5432/x"
    tracking = _open(uri)
    tracking.start({"tracking": {"uri": secret}}, {"uri": secret}, DATASET)
    tracking.finish("FINISHED")
    run = _runs(uri)["plan"]
    assert run.data.params["tracking.uri"] == run.data.tags["uri"] == "postgresql://me:***@db:5432/x"
    assert b"hunter2" not in Path("mlflow.db").read_bytes()


def test_the_data_set_is_an_input_with_a_digest_and_the_whole_checksum_is_a_tag(uri: str):
    tracking = _started(uri)
    tracking.stage("student", {}, {}).finish("FINISHED", None)
    tracking.finish("FINISHED")
    _started(uri).finish("FINISHED")  # a second start adds no second input
    for run in _runs(uri).values():
        (entry,) = run.inputs.dataset_inputs
        assert entry.dataset.name == "umls"
        assert entry.dataset.digest == DATASET["sha256"][:36]
        assert json.loads(entry.dataset.profile) == {
            key: value for key, value in DATASET.items() if key.startswith("num_")
        }
        assert run.data.tags["dataset.sha256"] == DATASET["sha256"]


def test_points_are_buffered_and_complete_after_finish(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", math.inf)
    stage = _started(uri).stage("student", {}, {})
    for step in range(2300):
        stage.log({"loss": float(step)}, step)
        if step == 100:
            assert _curve(uri, "student", "loss") == []
    stage.finish("FINISHED", None, {"test/mrr": 0.25})
    assert _curve(uri, "student", "loss") == [(step, float(step)) for step in range(2300)]
    assert _curve(uri, "student", "test/mrr") == [(2299, 0.25)]


def test_points_that_have_waited_for_seconds_are_sent_with_the_next(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", math.inf)
    stage = _started(uri).stage("student", {}, {})
    stage.log({"loss": 1.0}, 0)
    assert _curve(uri, "student", "loss") == []
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    stage.log({"loss": 2.0}, 1)
    assert _curve(uri, "student", "loss") == [(0, 1.0), (1, 2.0)]
    stage.finish("FINISHED", None)


def test_metric_names_are_made_valid_and_nan_and_inf_are_taken(uri: str):
    stage = _started(uri).stage("student", {}, {})
    stage.log({"valid/hits@10": 0.5, "loss": math.nan, "norm": math.inf, "/a//λ(x)": 1.0}, 3)
    stage.finish("FINISHED", None)
    metrics = _runs(uri)["student"].data.metrics
    assert metrics["valid/hits_at_10"] == 0.5
    assert math.isnan(metrics["loss"])
    assert metrics["norm"] > 1e300
    assert metrics["a/__x_"] == 1.0


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "rows.safetensors").write_bytes(b"rows")
    return path


def test_kept_checkpoints_are_listed_with_place_step_and_checksum_also_after_a_resume(uri: str, tmp_path: Path):
    tracking = _started(uri)
    stage = tracking.stage("student", {}, {})
    paths = {step: _checkpoint(tmp_path / "checkpoints", step) for step in (10, 20, 30)}
    stage.checkpoint(paths[10], 10, "a" * 64)
    stage.checkpoint(paths[20], 20, "b" * 64)
    tracking.finish("KILLED")
    shutil.rmtree(paths[10])  # retired
    stage = _started(uri).stage("student", {}, {})
    stage.checkpoint(paths[30], 30, "c" * 64)
    stage.checkpoint(paths[30], 30, "d" * 64)
    listed = json.loads(_artifact(uri, "student", "checkpoints.json").read_text())
    assert listed["columns"] == ["step", "uri", "sha256"]
    assert listed["data"] == [[20, paths[20].as_uri(), "b" * 64], [30, paths[30].as_uri(), "d" * 64]]
    newest = json.loads(_runs(uri)["student"].data.tags["checkpoint.newest"])
    assert newest == {"step": 30, "uri": paths[30].as_uri(), "sha256": "d" * 64}
    names = [item.path for item in _client(uri).list_artifacts(_runs(uri)["student"].info.run_id)]
    assert names == ["checkpoints.json"]  # a local store holds no second copy


def test_a_remote_store_also_gets_the_files_of_a_checkpoint(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _client(uri).create_experiment("distkgd", artifact_location="s3://bucket/kge")
    sent: list[tuple[str, str | None]] = []
    tables: list[dict] = []
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", lambda _, run, path, to=None: sent.append((path, to)))
    monkeypatch.setattr(mlflow.MlflowClient, "log_dict", lambda _, run, table, to: tables.append(table))
    stage = _started(uri).stage("student", {}, {})
    path = _checkpoint(tmp_path, 10)
    stage.checkpoint(path, 10, "a" * 64)
    assert sent == [(str(path), "checkpoints/step-10")]
    run = _runs(uri)["student"].info
    assert tables[-1]["data"] == [[10, f"{run.artifact_uri}/checkpoints/step-10", "a" * 64]]
    assert run.artifact_uri.startswith("s3://bucket/kge/")


def test_the_model_folder_and_the_report_become_artifacts_beside_the_sqlite_file(uri: str, tmp_path: Path):
    model, plots = tmp_path / "run" / "model", tmp_path / "plots"
    for folder in (model, plots):
        folder.mkdir(parents=True)
        (folder / "file.txt").write_text(folder.name)
    (tmp_path / "report.md").write_text("# Report")
    tracking = _started(uri)
    tracking.stage("student", {}, {}).finish("FINISHED", model)
    tracking.finish("FINISHED", [tmp_path / "report.md", plots])
    assert _artifact(uri, "student", "model/file.txt").read_text() == "model"
    assert _artifact(uri, "plan", "report.md").read_text() == "# Report"
    assert _artifact(uri, "plan", "plots/file.txt").read_text() == "plots"
    assert list((tmp_path / "mlartifacts").iterdir())
    assert not (tmp_path / "mlruns").exists()


def test_finishing_the_plan_closes_the_stages_that_are_open_and_no_others(uri: str):
    tracking = _started(uri)
    tracking.stage("teacher", {}, {}).finish("FINISHED", None)
    tracking.stage("student", {}, {}).log({"loss": 1.0}, 7)
    tracking.finish("FAILED")
    tracking.finish("FINISHED")
    status = {name: run.info.status for name, run in _runs(uri).items()}
    assert status == {"plan": "FAILED", "teacher": "FINISHED", "student": "FAILED"}
    assert _curve(uri, "student", "loss") == [(7, 1.0)]


@pytest.mark.parametrize(("enabled", "active"), [(False, True), (True, False), (False, False)])
def test_disabled_tracking_and_other_ranks_do_nothing_at_all(uri: str, tmp_path: Path, enabled: bool, active: bool):
    before = sorted(tmp_path.rglob("*"))
    tracking = open_tracking(run_folder=tmp_path / "run", name="plan", uri=uri, enabled=enabled, active=active)
    assert type(tracking) is NoTracking
    tracking.start({"seed": 1}, {}, DATASET)
    stage = tracking.stage("student", {}, {})
    assert type(stage) is NoStageTracking
    stage.log({"loss": 1.0}, 0)
    stage.checkpoint(tmp_path, 1, "a")
    stage.finish("FINISHED", tmp_path, {"mrr": 0.5})
    tracking.finish("FINISHED", [tmp_path])
    assert sorted(tmp_path.rglob("*")) == before


def test_without_mlflow_one_warning_says_where_the_metrics_are(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracking = _open(uri)
    tracking.start({}, {}, DATASET)
    tracking.stage("student", {}, {}).log({"loss": 1.0}, 0)
    assert type(tracking) is NoTracking
    (warning,) = _warnings(caplog)
    assert "metrics.jsonl" in warning
    assert "distkgd[mlflow]" in warning


def test_a_store_that_fails_in_mid_training_warns_once_and_gets_all_points_when_it_is_back(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(module, "RETRY_SHARE", 0.0)
    stage = _started(uri).stage("student", {}, {})
    stage.log({"loss": 0.0}, 0)
    with monkeypatch.context() as away:
        away.setattr(mlflow.MlflowClient, "log_batch", _raise)
        for step in range(1, 5):
            stage.log({"loss": float(step)}, step)
        stage.checkpoint(Path("nowhere"), 4, "a")
    stage.finish("FINISHED", None)
    (warning,) = _warnings(caplog)
    assert "stage student" in warning
    assert "database is locked" in warning
    assert "SELECT" not in warning
    assert "metrics.jsonl" in warning
    assert _curve(uri, "student", "loss") == [(step, float(step)) for step in range(5)]


def test_a_store_that_fails_is_left_alone_for_a_while(uri: str, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    stage = _started(uri).stage("student", {}, {})
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", lambda *args, **kwargs: calls.append(1) or _raise())
    for step in range(10):
        stage.log({"loss": 1.0}, step)
    assert len(calls) == 1


def test_a_store_that_stays_away_bounds_the_buffer_and_lets_every_call_return(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tracking = _started(uri)
    stage = tracking.stage("student", {}, {})
    for name in ("log_batch", "log_artifacts", "log_dict", "set_terminated", "create_run"):
        monkeypatch.setattr(mlflow.MlflowClient, name, _raise)
    monkeypatch.setattr(module, "MAX_WAITING_POINTS", 100)
    for step in range(600):
        stage.log({"loss": 1.0}, step)
    stage.checkpoint(tmp_path, 5, "a")
    assert len(stage._points) == 100
    stage.finish("FINISHED", tmp_path, {"mrr": 0.5})
    late = tracking.stage("late", {}, {})
    late.finish("FINISHED", None)
    tracking.finish("FINISHED", [tmp_path])
    assert [text.split(":")[0] for text in _warnings(caplog)] == ["stage student", "stage late", "plan plan"]


def test_a_stage_that_begins_while_the_store_is_away_gets_its_run_later(uri: str, monkeypatch: pytest.MonkeyPatch):
    tracking = _started(uri)
    with monkeypatch.context() as away:
        away.setattr(mlflow.MlflowClient, "create_run", _raise)
        stage = tracking.stage("student", {"dim": 32}, {})
        stage.log({"loss": 1.0}, 0)
    stage.finish("FINISHED", None)
    run = _runs(uri)["student"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"dim": "32"}
    assert _curve(uri, "student", "loss") == [(0, 1.0)]


def test_a_run_that_is_made_only_when_its_stage_ends_starts_no_thread(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    tracking = _started(uri)
    with monkeypatch.context() as away:
        away.setattr(mlflow.MlflowClient, "create_run", _raise)
        stage = tracking.stage("student", {}, {})
    stage.finish("FINISHED", None)
    assert stage._monitor is None
    assert _runs(uri)["student"].info.status == "FINISHED"


def test_final_metrics_of_a_stage_resumed_at_its_end_stand_at_its_last_step(uri: str):
    tracking = _started(uri)
    tracking.stage("student", {}, {}).log({"loss": 1.0}, 50)
    tracking.finish("KILLED")
    _started(uri).stage("student", {}, {}).finish("FINISHED", None, {"mrr": 0.5})
    assert _curve(uri, "student", "mrr") == [(50, 0.5)]


def test_final_metrics_of_a_stage_that_was_trained_again_are_the_new_ones(uri: str):
    for mrr in (0.1, 0.5):
        tracking = _started(uri)
        stage = tracking.stage("student", {}, {})
        stage.log({"loss": 1.0}, 50)
        stage.finish("FINISHED", None, {"final/mrr": mrr})
        tracking.finish("FINISHED")
    assert _runs(uri)["student"].data.metrics["final/mrr"] == 0.5
    assert _curve(uri, "student", "loss") == [(50, 1.0)]


def test_a_tracker_that_lacks_a_method_is_no_tracker():
    for one in (Tracking, StageTracking):
        with pytest.raises(TypeError, match="abstract"):
            one()  # type: ignore[abstract]


def _raise(*args: object, **kwargs: object) -> None:
    raise RuntimeError("database is locked\n[SQL: SELECT 1]")


@pytest.mark.parametrize("bad", ["./mlruns", "mlruns", "/data/mlruns", "file:///data/mlruns", "file:mlruns", "."])
def test_a_file_store_is_refused_with_a_database_to_use_instead(bad: str):
    with pytest.raises(ConfigError, match=r"file store.*sqlite:///mlflow\.db"):
        _open(bad)


@pytest.mark.parametrize("bad", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://mlflow.db"])
def test_an_sqlite_uri_without_a_file_is_refused(bad: str):
    with pytest.raises(ConfigError, match="names no file"):
        _open(bad)


def test_a_bad_uri_stops_every_rank_and_not_only_the_first(tmp_path: Path):
    with pytest.raises(ConfigError, match="file store"):
        open_tracking(run_folder=tmp_path, name="plan", uri="./mlruns", enabled=True, active=False)


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path):
    (tmp_path / "other.db").write_text("this is no database at all, " * 40)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no SQLite database"):
        _started("sqlite:///other.db")
    assert time.monotonic() - began < 20


def test_an_unknown_kind_of_store_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"mlflow\.uri"):
        _started("gopher://host/x")


def test_a_server_that_does_not_answer_is_refused_at_the_start_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="start that server") as caught:
        _started("http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(caught.value)


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(uri: str):
    experiment = _client(uri).create_experiment("distkgd")
    _client(uri).delete_experiment(experiment)
    with pytest.raises(ConfigError, match=f"restore --experiment-id {experiment}"):
        _started(uri)


def test_the_default_store_is_a_database_in_the_current_directory(uri: str, tmp_path: Path):
    _started(None).finish("FINISHED")
    assert set(_runs(uri)) == {"plan"}
    state = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    assert state["uri"] == uri
    assert state["run_id"] == _runs(uri)["plan"].info.run_id


def test_the_environments_store_comes_before_the_default(schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(schema, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    _started(None).finish("FINISHED")
    assert set(_runs(f"sqlite:///{tmp_path / 'other.db'}")) == {"plan"}


def test_an_sqlite_uri_that_names_its_driver_is_made_absolute_too(uri: str, tmp_path: Path):
    _started("sqlite+pysqlite:///mlflow.db").finish("FINISHED")
    assert set(_runs(uri)) == {"plan"}
    state = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    assert state["uri"] == f"sqlite+pysqlite:///{tmp_path / 'mlflow.db'}"


def test_a_resume_from_another_directory_finds_the_store_of_the_run_folder(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _started("sqlite:///mlflow.db").finish("KILLED")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _started(None, str(tmp_path / "run")).finish("FINISHED")
    assert _runs(uri)["plan"].info.status == "FINISHED"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_resume_into_another_store_makes_new_runs_and_says_so(
    uri: str, schema: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _started(uri).finish("KILLED")
    shutil.copy(schema, tmp_path / "other.db")
    _started("sqlite:///other.db").finish("FINISHED")
    assert _runs(uri)["plan"].info.status == "KILLED"
    assert _runs(f"sqlite:///{tmp_path / 'other.db'}")["plan"].info.status == "FINISHED"
    assert ["new ones are made" in text for text in _warnings(caplog)] == [True]


def test_a_run_that_was_deleted_in_the_store_is_made_anew(uri: str, caplog: pytest.LogCaptureFixture):
    _started(uri).finish("KILLED")
    gone = _runs(uri)["plan"].info.run_id
    _client(uri).delete_run(gone)
    _started(uri).finish("FINISHED")
    assert _runs(uri)["plan"].info.run_id != gone
    assert ["was deleted" in text for text in _warnings(caplog)] == [True]


def test_a_run_that_the_store_never_had_is_made_anew(uri: str, tmp_path: Path):
    _started(uri).finish("KILLED")
    file = tmp_path / "run" / "mlflow.json"
    state = json.loads(file.read_text()) | {"run_id": "0" * 32}
    file.write_text(json.dumps(state))
    tracking = _open(uri, name="anew")
    tracking.start({}, {}, DATASET)
    assert set(_runs(uri)) == {"plan", "anew"}


def test_a_damaged_file_of_run_ids_is_named(uri: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mlflow.json").write_text('{"uri": ')
    with pytest.raises(ConfigError, match=r"mlflow\.json is damaged"):
        _started(uri)


def test_two_plans_interleaved_in_one_process_do_not_meet(uri: str, schema: Path, tmp_path: Path):
    shutil.copy(schema, tmp_path / "other.db")
    uris = [uri, f"sqlite:///{tmp_path / 'other.db'}"]
    plans = [_started(uris[0], "a"), _started(uris[1], "b")]
    stages = [plan.stage("student", {}, {}) for plan in plans]
    for step in range(3):
        for index, stage in enumerate(stages):
            stage.log({"loss": float(10 * index + step)}, step)
    assert mlflow.active_run() is None
    for plan, stage, status in zip(plans, stages, ["FINISHED", "FAILED"], strict=True):
        stage.finish(status, None)
        plan.finish(status)
    for index, status in enumerate(["FINISHED", "FAILED"]):
        assert _curve(uris[index], "student", "loss") == [(step, 10.0 * index + step) for step in range(3)]
        assert {run.info.status for run in _runs(uris[index]).values()} == {status}


def test_two_openers_of_one_run_folder_do_not_lose_each_others_stages(uri: str, tmp_path: Path):
    first, second = _started(uri), _started(uri)
    stages: list[StageTracking] = [first.stage("a", {}, {}), second.stage("b", {}, {})]
    stages[0].checkpoint(_checkpoint(tmp_path, 1), 1, "a" * 64)
    state = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    runs = _runs(uri)
    assert {name: kept["run_id"] for name, kept in state["stages"].items()} == {
        "a": runs["a"].info.run_id,
        "b": runs["b"].info.run_id,
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mlflow.json"]


def test_system_metrics_of_a_stage_stop_with_it(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracking = _started(uri)
    stage = tracking.stage("student", {}, {})
    stage.log({"loss": 1.0}, 4)
    thread = stage._monitor._process
    assert thread.is_alive()
    time.sleep(0.5)
    stage.finish("FINISHED", None, {"mrr": 0.5})
    tracking.finish("FINISHED")
    assert not thread.is_alive()
    runs = _runs(uri)
    assert runs["student"].data.tags["system_metrics"] == "on"
    assert any(name.startswith("system/cpu") for name in runs["student"].data.metrics)
    assert not any(name.startswith("system/") for name in runs["plan"].data.metrics)
    assert _curve(uri, "student", "mrr") == [(4, 0.5)]


def test_without_psutil_a_tag_says_that_there_are_no_system_metrics(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setitem(sys.modules, "psutil", None)
    stage = _started(uri).stage("student", {}, {})
    assert stage._monitor is None
    stage.finish("FINISHED", None)
    tag = _runs(uri)["student"].data.tags["system_metrics"]
    assert tag.startswith("off")
    assert "pip install psutil" in tag


def test_telemetry_is_off_unless_the_user_has_set_it(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert isinstance(_open(uri), MlflowTracking)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    _open(uri)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_a_folder_with_a_space_holds_store_and_artifacts(schema: Path, tmp_path: Path):
    (tmp_path / "my data").mkdir()
    shutil.copy(schema, tmp_path / "my data" / "kge #1.db")
    (tmp_path / "report.md").write_text("# Report")
    uri = f"sqlite:///{tmp_path}/my data/kge #1.db"
    _started(uri).finish("FINISHED", [tmp_path / "report.md"])
    assert _artifact(uri, "plan", "report.md").read_text() == "# Report"
    assert list((tmp_path / "my data" / "mlartifacts").iterdir())


def test_the_database_can_be_read_by_sqlite_while_a_run_is_open(uri: str, tmp_path: Path):
    stage = _started(uri).stage("student", {}, {})
    stage.log({"loss": 1.0}, 0)
    with sqlite3.connect(tmp_path / "mlflow.db", timeout=0) as connection:
        assert connection.execute("SELECT COUNT(*) FROM runs").fetchone() == (2,)
    stage.finish("FINISHED", None)
