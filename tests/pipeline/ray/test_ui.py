"""MLflow's pages after a chain and a sweep, as a browser shows them. Slow; needs Chromium."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.pipeline.ray.session import ray_session
from distkgd.pipeline.sweep.config import load_sweep
from distkgd.pipeline.sweep.sweep import ENVIRONMENT, Slots, run_sweep
from tests.browser import CHROMIUM, browser
from tests.launches import small_data
from tests.pipeline.ray.clusters import CHAIN, chained

SECONDS = 60.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mlflow.db, which a chain and a sweep have written."""
    folder = tmp_path_factory.mktemp("ui")
    data, track = str(small_data(folder / "data")), {"enabled": True, "uri": f"sqlite:///{folder}/mlflow.db"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ray_session("local", num_cpus=2, quiet=True):
            chained(merge(CHAIN, {"name": "a_chain", "data": data, "mlflow": track}), folder / "chain")
            base = merge(CHAIN, {"data": data, "mlflow": track, "student": {"dim": 8, "method": "bkd"}})
            del base["chain"]
            text = {"name": "a_sweep", "base": base, "rows": {"cold": {}, "hot": {"student.distill.temperature": 3.0}}}
            import yaml

            (folder / "sweep.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
            sweep, tree = load_sweep(folder / "sweep.yaml")
            run_sweep(sweep, tree, folder / "sweep", resume=False, slots=Slots(), display=Display(False))
    return folder


@pytest.fixture(scope="module")
def site(tracked: Path) -> Iterator[str]:
    """MLflow's server of that file, on 127.0.0.1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tracked}/mlflow.db"]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tracked / "server.txt").open("w", encoding="utf-8") as said:
        server = subprocess.Popen(command, cwd=tracked, env=env, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < deadline, (tracked / "server.txt").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def runs_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """(experiment, name of a run -> it)."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("distkgd")
    found = client.search_runs([experiment.experiment_id])
    return experiment.experiment_id, {run.info.run_name: run for run in found}


# A curve of several points, not the dot of a final figure.
DRAWN = "[...document.querySelectorAll('path.js-line')].some(one => (one.getAttribute('d') || '').includes('L'))"


def linked(name: str) -> str:
    """Whether the page has a link with that text."""
    return f"[...document.querySelectorAll('a')].some(one => one.innerText.trim() === {json.dumps(name)})"


def test_the_pages_show_parents_children_curves_and_reports(site: str, tracked: Path, tmp_path: Path) -> None:
    experiment, runs = runs_of(tracked)
    pages = Path(os.environ.get("DISTKGD_PICTURES", tmp_path))
    with browser(tmp_path / "profile") as there:
        there.show(f"{site}/#/experiments/{experiment}/runs", ["a_chain", "a_sweep"], pages / "runs.png")
        for parent, child, curve in (
            ("a_chain", "a_chain/student-4", "valid/mrr"),
            ("a_sweep", "hot, seed 0", "valid/mrr"),
        ):
            run = f"{site}/#/experiments/{experiment}/runs"
            above, below = (f"{run}/{runs[name].info.run_id}" for name in (parent, child))
            there.show(above, [parent, "Child runs"], pages / f"{parent}.png", ready=linked(child))
            there.show(below, [child, "Finished"], pages / f"{parent}_child.png", ready=linked(parent))
            there.show(f"{below}/model-metrics", [curve], pages / f"{parent}_curves.png", ready=DRAWN)
            there.show(f"{above}/artifacts/report.md", ["report.md", "test MRR"], pages / f"{parent}_report.png")
    assert all(path.stat().st_size > 20_000 for path in pages.glob("*.png"))
