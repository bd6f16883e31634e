"""Runs, curves and checkpoints in MLflow: one parent run per plan, one child run per stage.

MLflow is imported inside functions only: without it the same calls do nothing.
Runs are named by id through `MlflowClient`, never by MLflow's global "active run", so that several plans can
live in one process. The ids are kept in the run folder (`mlflow.json`): a resumed plan continues its curves.

At the start, a store that cannot be used is a `ConfigError`. Later no failure of the store reaches the
training: a stage warns once, keeps its points for a later attempt, and metrics.jsonl remains the record.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, final
from urllib.parse import unquote, urlparse

from distkgd.common.text import redact
from distkgd.errors import ConfigError, DistkgdError
from distkgd.tracking.mlflow_store import DEFAULT_URI, OpenRun, Store, connect, import_mlflow, resolve_uri
from distkgd.tracking.mlflow_text import one_line, safe_name
from distkgd.tracking.run_ids import keep, noted, read_state, run_ids
from distkgd.tracking.serving.entries import Entry
from distkgd.tracking.serving.registry import Registered, register
from distkgd.tracking.tracker import (
    NO_METRICS,
    Metrics,
    NoStageTracking,
    NoTracking,
    Params,
    StageTracking,
    Status,
    Tags,
    Tracking,
)

METRICS_PER_CALL = 1000  # as many as MLflow allows
FLUSH_POINTS, FLUSH_SECONDS = 500, 5.0
RETRY_SECONDS, RETRY_SHARE = 30.0, 10.0  # after a failed call, wait 30 s or 10 times what it took
MAX_WAITING_POINTS = 100_000  # of a stage whose store is away; the oldest go first

logger = logging.getLogger(__name__)


def open_tracking(*, run_folder: Path, name: str, uri: str | None, enabled: bool, active: bool) -> Tracking:
    """The tracking of one plan, not yet started; an object that does nothing where there is none.

    run_folder: where the run ids are kept.
    uri: an MLflow tracking URI. None means, in this order: the one the run folder was started with, the
        environment's MLFLOW_TRACKING_URI, `sqlite:///mlflow.db` in the current directory.
    active: false on every rank but the first.
    """
    if not enabled:
        return NoTracking()
    uri = resolve_uri(uri, run_folder)  # before `active`: a typing error stops all ranks and not one
    if not active:
        return NoTracking()
    try:
        import_mlflow()
    except ImportError as error:
        logger.warning(
            "mlflow cannot be imported (%s): metrics go to metrics.jsonl only; pip install 'distkgd[mlflow]'",
            error,
        )
        return NoTracking()
    return MlflowTracking(run_folder, name, uri)


class Guard:
    """Runs calls to the store; the first that fails is warned about, none raises."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._warned = False
        self._retry_at = 0.0

    @property
    def is_waiting(self) -> bool:
        return time.monotonic() < self._retry_at

    def attempt(self, action: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            action()
        except Exception as error:
            now = time.monotonic()
            self._retry_at = now + max(RETRY_SECONDS, RETRY_SHARE * (now - began))
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s: MLflow failed, training goes on and metrics.jsonl remains the record: %s",
                    self._what,
                    one_line(error),
                )


@final
class MlflowStageTracking(StageTracking):
    """A child run. Where the store is away when the stage begins, it is created at a later attempt."""

    def __init__(self, store: Store, name: str, title: str, params: Params, tags: Tags, dataset: Params) -> None:
        self._store = store
        self._name, self._title = name, title
        self._description = (params, tags, dataset)
        self._guard = Guard(f"stage {name}")
        self._run: OpenRun | None = None
        self._monitor: Any | None = None
        self._points: list[Any] = []
        self._last_step = 0
        self._flushed_at = time.monotonic()
        self.is_open = True  # until `finish`, which may still have to create the run
        self._guard.attempt(self._opened)

    def log(self, metrics: Metrics, step: int) -> None:
        self._points += _points(metrics, step)
        self._last_step = max(self._last_step, step)
        waited = time.monotonic() - self._flushed_at
        is_due = len(self._points) >= FLUSH_POINTS or waited >= FLUSH_SECONDS
        if is_due and not self._guard.is_waiting:
            self._guard.attempt(self._flush)
        del self._points[:-MAX_WAITING_POINTS]

    def checkpoint(self, path: Path, step: int, sha256: str) -> None:
        self._guard.attempt(lambda: self._checkpoint(path.resolve(), step, sha256))

    def finish(self, status: Status, model_folder: Path | None, metrics: Metrics = NO_METRICS) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._guard.attempt(self._flush)
        # Newer than what a reopened run may have at this step: `_flush` would leave them out.
        self._guard.attempt(lambda: _send(self._store, self._opened().id, _points(metrics, self._last_step)))
        if model_folder is not None:
            self._guard.attempt(lambda: self._store.log_files(self._opened().id, model_folder, "model"))
        if self._monitor is not None:
            self._guard.attempt(self._monitor.finish)
        self._guard.attempt(lambda: self._store.client.set_terminated(self._opened().id, status))

    def _opened(self) -> OpenRun:
        if self._run is None:
            self._run = self._store.open_run(self._name, self._title, *self._description)
            steps = [step for key, step in self._run.steps.items() if not key.startswith("system/")]
            self._last_step = max(self._last_step, *steps, 0)
            if self.is_open:
                self._start_monitor(self._run)
        return self._run

    def _flush(self) -> None:
        """Send the buffer. What the reopened run already has is not sent twice: one value per step."""
        run = self._opened()
        self._points = [point for point in self._points if point.step > run.steps.get(point.key, -math.inf)]
        _send(self._store, run.id, self._points)
        self._flushed_at = time.monotonic()

    def _checkpoint(self, path: Path, step: int, sha256: str) -> None:
        row = {"step": step, "uri": path.as_uri(), "sha256": sha256}
        earlier = noted(self._store.run_folder, self._name).get("checkpoints", [])
        rows = [*[old for old in earlier if old["step"] != step and _is_kept(old["uri"])], row]
        rows.sort(key=lambda old: old["step"])
        keep(self._store.run_folder, self._name, checkpoints=rows)
        run = self._opened()
        if urlparse(run.artifact_uri).scheme not in ("", "file"):
            folder = f"checkpoints/step-{step}"
            self._store.log_files(run.id, path, folder)
            row["uri"] = f"{run.artifact_uri}/{folder}" + ("" if path.is_dir() else f"/{path.name}")
            keep(self._store.run_folder, self._name, checkpoints=rows)
        columns = ["step", "uri", "sha256"]
        listed = {"columns": columns, "data": [[old[column] for column in columns] for old in rows]}
        self._store.client.log_dict(run.id, listed, "checkpoints.json")
        self._store.set_tags(run.id, {"checkpoint.newest": json.dumps(rows[-1])})

    def _start_monitor(self, run: OpenRun) -> None:
        """System metrics in a thread of MLflow; a tag says whether they are on, and why not."""
        state = "on"
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
            state = "off: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false"
        else:
            try:
                import_module("psutil")
                module = import_module("mlflow.system_metrics.system_metrics_monitor")
                # It announces its start and end among the lines of training.
                logging.getLogger(module.__name__).setLevel(logging.WARNING)
                self._monitor = module.SystemMetricsMonitor(run.id, resume_logging=True, tracking_uri=self._store.uri)
                self._monitor.start()
            except ImportError as error:
                state = f"off: {error}; pip install psutil"
            except Exception as error:
                state = f"off: {one_line(error)}"
        self._store.set_tags(run.id, {"system_metrics": state})


@final
class MlflowTracking(Tracking):
    """A parent run and its stages."""

    def __init__(self, run_folder: Path, name: str, uri: str) -> None:
        self._run_folder = run_folder
        self._name = name
        self._uri = uri
        self._guard = Guard(f"plan {name}")
        self._store: Store | None = None
        self._run_id: str | None = None
        self._dataset: Params = {}
        self._stages: list[MlflowStageTracking] = []
        self._attached = False

    def start(self, params: Params, tags: Tags, dataset: Params) -> None:
        self._dataset = dict(dataset)
        try:
            self._store = Store(self._run_folder, self._uri)
            self._run_id = self._store.open_run(None, self._name, params, tags, self._dataset).id
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the MLflow store {redact(self._uri)} cannot be used: "
                f"{one_line(error)}. Correct mlflow.uri (such as {DEFAULT_URI} "
                "or http://host:5000), start that server, or set mlflow.enabled=false."
            ) from error

    def attach(self, dataset: Params) -> None:
        self._dataset = dict(dataset)
        self._attached = True
        self._guard.attempt(self._connect)

    def _connect(self) -> None:
        store = Store(self._run_folder, self._uri)
        self._run_id = noted(self._run_folder, None)["run_id"]
        self._store = store

    def stage(self, name: str, params: Params, tags: Tags, title: str | None = None) -> StageTracking:
        if self._attached and self._store is None:
            return NoStageTracking()
        assert self._store is not None and self._run_id is not None, "stage() before start()"
        tags = dict(tags) | {"mlflow.parentRunId": self._run_id, "stage": name}
        stage = MlflowStageTracking(self._store, name, title or name, params, tags, self._dataset)
        self._stages.append(stage)
        return stage

    def register(self, entries: Sequence[Entry], name: str, max_mb: float | None) -> list[str]:
        lines: list[str] = []
        store = self._store
        if store is not None and not self._attached:
            runs = run_ids(self._run_folder)
            arguments = store.client, store.experiment_id, name, entries
            self._guard.attempt(lambda: lines.extend(register(*arguments, max_mb=max_mb, runs=runs).lines))
        return lines

    def log(self, metrics: Metrics) -> None:
        store, run_id = self._store, self._run_id
        if store is not None and run_id is not None and not self._attached:
            self._guard.attempt(lambda: _send(store, run_id, _points(metrics, 0)))

    def finish(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        for stage in self._stages:
            stage.finish(status, None)
        store, run_id = self._store, self._run_id
        if store is None or run_id is None or self._attached:
            return
        self._run_id = None
        for path in artifacts:
            to = path.name if path.is_dir() else None
            self._guard.attempt(partial(store.log_files, run_id, path, to))
        self._guard.attempt(lambda: store.client.set_terminated(run_id, status))


def register_finished(
    entries: Sequence[Entry], name: str, max_mb: float | None, *, run_folder: Path, uri: str | None
) -> tuple[Registered, str]:
    """(what became of the models, the store): `Tracking.register` of models that were finished earlier.

    run_folder, uri: as of `open_tracking`. Raises ConfigError where the store cannot be used.
    """
    uri = resolve_uri(uri, run_folder)
    try:
        client, experiment_id = connect(uri)
        ids = run_ids(run_folder) if read_state(run_folder).get("uri") == redact(uri) else {}
        return register(client, experiment_id, name, entries, max_mb=max_mb, runs=ids), uri
    except DistkgdError:
        raise
    except ImportError as error:
        raise ConfigError(f"mlflow cannot be imported ({error}): pip install 'distkgd[mlflow]'") from None
    except Exception as error:
        raise ConfigError(f"the MLflow store {redact(uri)} did not take the models: {one_line(error)}") from error


def _points(metrics: Metrics, step: int) -> list[Any]:
    metric, now = import_module("mlflow.entities").Metric, time.time_ns() // 1_000_000
    return [metric(safe_name(name), float(value), now, step) for name, value in metrics.items()]


def _send(store: Store, run_id: str, points: list[Any]) -> None:
    """Send points, which leave the list as they arrive."""
    while points:
        store.client.log_batch(run_id, metrics=points[:METRICS_PER_CALL], synchronous=True)
        del points[:METRICS_PER_CALL]


def _is_kept(uri: str) -> bool:
    """Is a checkpoint still there? One that was uploaded is; one on this machine may have been retired."""
    parsed = urlparse(uri)
    return parsed.scheme != "file" or Path(unquote(parsed.path)).exists()
