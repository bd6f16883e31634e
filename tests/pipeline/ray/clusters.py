"""Ray sessions and chains that tests of several modules use."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.pipeline.config import load_config, parse_config
from distkgd.pipeline.ray.driver import run_chain
from distkgd.pipeline.ray.stage_scheduler import Options
from tests.launches import SMALL

SECONDS = 240.0

# Three stages in a row and one beside them.
CHAIN: dict[str, Any] = merge(
    SMALL,
    {
        "chain": {"dims": [16, 8, 4]},
        "teacher": {"batch_size": 60, "epochs": 3, "validate_every": 1},
        "student": {"method": "iterde", "epochs": 3},
        "baseline": True,
    },
)
del CHAIN["student"]["dim"]


def chained(
    tree: dict[str, Any], folder: Path, *, workers: int = 1, resume: bool = False, retries: int = 3, wait: float = 5.0
) -> dict[str, Any]:
    """The report of a plan run on the Ray that this process is connected to."""
    options = Options(workers, 1, retries, wait)
    config = parse_config(tree, "test")
    report = run_chain(config, folder, resume=resume, address=None, options=options, display=Display(False))
    return report.to_json()


def shipped(path: str, *overrides: str) -> dict[str, Any]:
    """A config file as a tree, with overrides, untracked."""
    config = load_config(Path(path), [*overrides, "mlflow.enabled=false", "device=cpu", "threads=1"])
    return config.model_dump(mode="json")


class Background:
    """A chain that runs in a thread while the test looks at its folder."""

    def __init__(self, tree: dict[str, Any], folder: Path, **options: Any) -> None:
        self.folder = folder
        self._threads = ThreadPoolExecutor(1)
        self._future: Future[dict[str, Any]] = self._threads.submit(chained, tree, folder, **options)

    def until(self, happened: Callable[[], Any]) -> Any:
        """What `happened` returns once it is true; the chain's own error if that ends before."""
        deadline = time.monotonic() + SECONDS
        while not (found := happened()):
            if self._future.done():
                raise AssertionError(f"the chain ended before: {self._future.result()}")
            assert time.monotonic() < deadline, f"not within {SECONDS:g} s: {self.events()}"
            time.sleep(0.02)
        return found

    def events(self) -> list[dict[str, Any]]:
        """The timeline so far."""
        path = self.folder / "timeline.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def at_work(self, stage: str, attempt: int = 1) -> dict[str, Any]:
        """The event of an attempt at a stage, once that has a checkpoint and so is in the middle of training."""

        def found() -> Any:
            saved = list((self.folder / "stages" / stage / "checkpoint").glob("step_*"))
            return [e for e in self.events() if (e["stage"], e["attempt"]) == (stage, attempt)] if saved else []

        return self.until(found)[0]

    def report(self) -> dict[str, Any]:
        """Once it has ended."""
        return self._future.result(SECONDS)


def attempts(report: dict[str, Any]) -> dict[str, list[str]]:
    """Stage -> how its attempts ended, "done" or the kind of failure."""
    found: dict[str, list[str]] = {}
    for event in report["timeline"]:
        found.setdefault(event["stage"], []).append(event["outcome"].partition(":")[0])
    return found


def actor_process(title: str) -> psutil.Process:
    """The process of an actor below this one whose title has these letters."""
    for child in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(child.cmdline()).lower():
                return child
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no process {title}")


def kill(pid: int) -> None:
    """As a crash or the kernel would."""
    os.kill(pid, signal.SIGKILL)
