"""Stages that run at once, each in a process of its own, write to one SQLite file."""

import json
import subprocess
import sys
from pathlib import Path

from distkgd.tracking.mlflow_runs import open_tracking
from tests.launches import ROOT

POINTS, WRITERS = 240, 3
DATA = {"name": "toy", "sha256": "0" * 64, "num_entities": 1, "num_relations": 1} | dict.fromkeys(
    ("num_train", "num_valid", "num_test"), 1
)
WRITER = f"""
import logging, sys
from pathlib import Path
from distkgd.tracking import mlflow_runs
logging.basicConfig(level="WARNING", stream=sys.stdout)
mlflow_runs.FLUSH_POINTS = 4  # many small writes
run = mlflow_runs.open_tracking(run_folder=Path(sys.argv[1]), name="plan", uri=sys.argv[2], enabled=True, active=True)
run.attach({DATA!r})
stage = run.stage(sys.argv[3], {{"dim": 8}}, {{}})
for step in range({POINTS}):
    stage.log({{"loss": 1.0 / (step + 1)}}, step)
stage.finish("FINISHED", None, {{"final/test/mrr": 0.5}})
run.finish("FINISHED")
"""


def test_stages_that_write_at_once_lose_no_point_and_meet_no_lock(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    plan = open_tracking(run_folder=tmp_path, name="plan", uri=uri, enabled=True, active=True)
    plan.start({}, {}, DATA)
    command = [sys.executable, "-c", WRITER, str(tmp_path), uri]
    processes = [
        subprocess.Popen(
            [*command, f"stage_{i}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(WRITERS)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * WRITERS, said
    assert not any("WARNING" in text for text in said), said
    plan.finish("FINISHED")
    ids = json.loads((tmp_path / "mlflow.json").read_text(encoding="utf-8"))
    client = MlflowClient(uri)
    for i in range(WRITERS):
        run = client.get_run(ids["stages"][f"stage_{i}"]["run_id"])
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == ids["run_id"]
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in points] == list(range(POINTS))
