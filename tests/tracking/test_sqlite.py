"""Stages that run at once, each in a process of its own, write to one SQLite file."""

import json
import logging
import multiprocessing
import os
from pathlib import Path

from distkgd.tracking import mlflow_runs
from distkgd.tracking.mlflow_runs import open_tracking

POINTS, WRITERS = 120, 3
DATA = {"name": "toy", "sha256": "0" * 64, "num_entities": 1, "num_relations": 1} | dict.fromkeys(
    ("num_train", "num_valid", "num_test"), 1
)


def write(folder: Path, uri: str, name: str) -> None:
    """One stage in many small writes, beside those of MLflow's own thread; what is logged goes to NAME.log."""
    os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] = "true"
    logging.basicConfig(level="WARNING", filename=folder / f"{name}.log", force=True)
    mlflow_runs.FLUSH_POINTS = 4
    run = open_tracking(run_folder=folder, name="plan", uri=uri, enabled=True, active=True)
    run.attach(DATA)
    stage = run.stage(name, {"dim": 8}, {})
    for step in range(POINTS):
        stage.log({"loss": 1.0 / (step + 1)}, step)
    stage.finish("FINISHED", None, {"final/test/mrr": 0.5})
    run.finish("FINISHED")


def test_stages_that_write_at_once_lose_no_point_and_meet_no_lock(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    plan = open_tracking(run_folder=tmp_path, name="plan", uri=uri, enabled=True, active=True)
    plan.start({}, {}, DATA)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", __name__])  # imported once for all
    names = [f"stage_{i}" for i in range(WRITERS)]
    processes = [context.Process(target=write, args=(tmp_path, uri, name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    said = [(tmp_path / f"{name}.log").read_text(encoding="utf-8") for name in names]
    assert [process.exitcode for process in processes] == [0] * WRITERS, said
    assert not any("WARNING" in text for text in said), said
    plan.finish("FINISHED")
    ids = json.loads((tmp_path / "mlflow.json").read_text(encoding="utf-8"))
    client = MlflowClient(uri)
    for name in names:
        run = client.get_run(ids["stages"][name]["run_id"])
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == ids["run_id"]
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in points] == list(range(POINTS))
