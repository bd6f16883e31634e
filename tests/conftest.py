"""Shared fixtures: one thread per process, and rank processes that live as long as the session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # whichever test imports Ray first, it reads this then

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distkgd.tracking.run_ids import locked
from tests.programs import end_programs
from tests.ranks import close_pools

# Begun first where files run side by side, so that none of them is left running alone at the end.
SLOW = [
    "docs/test_commands",
    "pipeline/sweep/test_sweep",
    "pipeline/test_elastic",
    "invariants/test_resume",
    "gpu/test_equals_cpu",
    "gpu/",
    "distributed/test_cost",
    "tracking/serving/test_endpoint",
    "models/export/test_export",
    "invariants/test_engines",
    "invariants/test_moves",
    "pipeline/autoconfig/test_command",
    "invariants/test_world_size",
    "invariants/test_kills",
    "distributed/optim",
    "kernels/triton",
    "test_launch",
    "tracking/test_sqlite",
    "distributed/test_nodes",
    "pipeline/ray",
    "methods",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = str(item.path)
        return next((i for i, name in enumerate(SLOW) if f"tests/{name}" in path), len(SLOW))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    close_pools()
    end_programs()


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables and without our experiment: made in seconds, for all workers."""
    mlflow = pytest.importorskip("mlflow")
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place
    file = place / "schema.db"
    with locked(place):
        if not file.exists():
            mlflow.MlflowClient(tracking_uri=f"sqlite:///{place / 'making.db'}")
            (place / "making.db").rename(file)
    return file


@pytest.fixture
def uri(schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh MLflow store, in a current directory of the test's own; no thread of system metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    shutil.copy(schema, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
