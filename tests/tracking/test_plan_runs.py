"""What a plan's own runs say in MLflow: the figures that its runs table and chart show first."""

from pathlib import Path
from typing import Any

import pytest

from distkgd.common.console import Display
from distkgd.distributed.ranks import Ranks
from distkgd.errors import Stopped
from distkgd.pipeline import plan as plan_module
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from tests.toys import toy_graph

mlflow = pytest.importorskip("mlflow")
STAGE = {"dim": 8, "epochs": 1, "batch_size": 60, "validate_every": 1}


def plan_on(uri: str, tmp_path: Path) -> Any:
    teacher = {**STAGE, "dim": 12}
    config = {"name": "toys", "threads": 1, "teacher": teacher, "student": {**STAGE, "method": "bkd", "bits": 4}}
    config |= {"baseline": True, "mlflow": {"uri": uri, "registry": False}, "report": {"html": False}}
    parsed = parse_config(config, "toys.yaml")
    return run_plan(parsed, toy_graph(), Ranks(), tmp_path / "run", resume=False, display=Display(False))


def runs_of(uri: str) -> tuple[Any, dict[str, Any]]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("distkgd").experiment_id])
    return client, {run.info.run_name: run for run in found}


def test_a_plans_run_has_the_figures_of_its_stages_and_says_what_it_is(uri: str, tmp_path: Path) -> None:
    report = plan_on(uri, tmp_path)
    client, runs = runs_of(uri)
    assert set(runs) == {"toys", "toys/teacher-12", "toys/student-8-4bit", "toys/direct-8-4bit"}
    told, student, teacher = runs["toys"].data.metrics, report.student, report.stage("teacher")
    assert told["test_mrr"] == student.mrr("test") and told["valid_mrr"] == student.mrr("valid")
    assert told["bytes_per_entity"] == student.bytes_per_entity
    assert told["retained"] == student.mrr("test") / teacher.mrr("test")
    for stage in report.stages:
        assert told[f"{stage.name}/test_mrr"] == stage.mrr("test")
    tags = runs["toys"].data.tags
    assert tags["mlflow.note.content"] == "complex, 8 numbers in 4 bits, on pystdlib by bkd"
    assert tags["mlflow.user"] and tags["mlflow.source.name"] and tags["mlflow.source.git.commit"] == tags["git_sha"]
    assert {"plan.yaml", "report.json"} <= {one.path for one in client.list_artifacts(runs["toys"].info.run_id)}


def test_a_stopped_plan_and_its_stage_end_alike(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_job: Any) -> None:
        raise Stopped(15, "stopped")

    monkeypatch.setattr(plan_module, "train_stage", stopped)
    with pytest.raises(Stopped):
        plan_on(uri, tmp_path)
    assert {run.info.status for run in runs_of(uri)[1].values()} == {"KILLED"}
