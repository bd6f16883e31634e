"""Runs, curves and checkpoints in MLflow: one parent run per plan, one child run per stage.

Beside `distkgd.serving` the only module that imports mlflow, and only inside functions: without it the same calls do
nothing.
Runs are named by id through `MlflowClient`, never by MLflow's global "active run", so that several plans can
live in one process. The ids are kept in the run folder (`mlflow.json`): a resumed plan continues its curves.

At the start, a store that cannot be used is a `ConfigError`. Later no failure of the store reaches the
training: a stage warns once, keeps its points for a later attempt, and metrics.jsonl remains the record.
"""

import fcntl
import json
import logging
import math
import os
import re
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, final
from urllib.parse import unquote, urlparse

from distkgd.errors import ConfigError, DistkgdError
from distkgd.report import write_atomic

if TYPE_CHECKING:
    from distkgd.serving.entries import Entry
    from distkgd.serving.registry import Registered

EXPERIMENT = "distkgd"
STATE_FILE = "mlflow.json"
DEFAULT_URI = "sqlite:///mlflow.db"

MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 250, 6000, 8000, 36  # mlflow.utils.validation
PARAMS_PER_CALL, METRICS_PER_CALL = 50, 1000  # MLflow allows 100 and 1000, and 1 MB a call
FLUSH_POINTS, FLUSH_SECONDS = 500, 5.0
RETRY_SECONDS, RETRY_SHARE = 30.0, 10.0  # after a failed call, wait 30 s or 10 times what it took
MAX_WAITING_POINTS = 100_000  # of a stage whose store is away; the oldest go first

Status = Literal["FINISHED", "FAILED", "KILLED"]
Params = Mapping[str, Any]
Tags = Mapping[str, str]
Metrics = Mapping[str, float]
NO_METRICS: Metrics = MappingProxyType({})
Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step

logger = logging.getLogger(__name__)


class StageTracking(ABC):
    """One stage's run."""

    @abstractmethod
    def log(self, metrics: Metrics, step: int) -> None:
        """Add one point per metric to the curves; buffered, NaN and Inf are allowed."""

    @abstractmethod
    def checkpoint(self, path: Path, step: int, sha256: str) -> None:
        """Note a kept checkpoint; a store that is not on this machine also gets its files."""

    @abstractmethod
    def finish(self, status: Status, model_folder: Path | None, metrics: Metrics = NO_METRICS) -> None:
        """Send what is buffered, the model and the final metrics (at the last step), and close the run."""


class Tracking(ABC):
    """A plan's run."""

    @abstractmethod
    def start(self, params: Params, tags: Tags, dataset: Params) -> None:
        """Create the parent run, or reopen the one this run folder already has.

        `dataset` has name, sha256, num_entities, num_relations, num_train, num_valid and num_test.
        Raises ConfigError when the store cannot be used.
        """

    @abstractmethod
    def attach(self, dataset: Params) -> None:
        """In place of `start`: the parent run is one that another process has started and will finish.

        Where the store cannot be reached there is a warning, and the stages go untracked.
        """

    @abstractmethod
    def stage(self, name: str, params: Params, tags: Tags) -> StageTracking:
        """Create or reopen the child run of one stage."""

    @abstractmethod
    def register(self, entries: "Sequence[Entry]", name: str, max_mb: float | None) -> list[str]:
        """Put finished models into the registry (`distkgd.serving.registry`), and say what became of each."""

    @abstractmethod
    def finish(self, status: Status, artifacts: Sequence[Path] = (), metrics: Metrics = NO_METRICS) -> None:
        """Close the parent run, and with the same status every stage that is still open."""


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
        _import_mlflow()
    except ImportError as error:
        logger.warning(
            "mlflow cannot be imported (%s): metrics go to metrics.jsonl only; pip install 'distkgd[mlflow]'",
            error,
        )
        return NoTracking()
    return MlflowTracking(run_folder, name, uri)


@final
class NoStageTracking(StageTracking):
    """Does nothing."""

    def log(self, metrics: Metrics, step: int) -> None:
        pass

    def checkpoint(self, path: Path, step: int, sha256: str) -> None:
        pass

    def finish(self, status: Status, model_folder: Path | None, metrics: Metrics = NO_METRICS) -> None:
        pass


@final
class NoTracking(Tracking):
    """Does nothing: tracking is off, mlflow is missing, or this is not the first rank."""

    def start(self, params: Params, tags: Tags, dataset: Params) -> None:
        pass

    def attach(self, dataset: Params) -> None:
        pass

    def stage(self, name: str, params: Params, tags: Tags) -> StageTracking:
        return NoStageTracking()

    def register(self, entries: "Sequence[Entry]", name: str, max_mb: float | None) -> list[str]:
        return []

    def finish(self, status: Status, artifacts: Sequence[Path] = (), metrics: Metrics = NO_METRICS) -> None:
        pass


@dataclass(frozen=True)
class _Run:
    """An open run. `steps`: the last step each curve had when it was reopened."""

    id: str
    artifact_uri: str
    reopened: bool
    steps: Mapping[str, int]

    @property
    def is_remote(self) -> bool:
        return urlparse(self.artifact_uri).scheme not in ("", "file")


class _Guard:
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
                    _told(error),
                )


class _Store:
    """A connection to the store, and the run ids in the run folder."""

    def __init__(self, run_folder: Path, uri: str) -> None:
        self._run_folder = run_folder
        self.uri = uri
        self.client, self.experiment_id = _connect(uri)
        run_folder.mkdir(parents=True, exist_ok=True)
        with _locked(run_folder):
            earlier = _read_state(run_folder).get("uri")
            if earlier == redact(uri):
                return
            if earlier is not None:
                logger.warning("the earlier runs are in %s; new ones are made in %s", earlier, redact(uri))
            self._write({"uri": redact(uri), "experiment": EXPERIMENT, "run_id": None, "stages": {}})

    def get(self, stage: str | None) -> dict[str, Any]:
        """What is kept about a stage, or (None) about the plan."""
        state = _read_state(self._run_folder)
        return state if stage is None else state["stages"].get(stage, {})

    def keep(self, stage: str | None, **values: Any) -> None:
        """Keep values beside those of other stages, which other processes may be writing."""
        with _locked(self._run_folder):
            state = _read_state(self._run_folder)
            (state if stage is None else state["stages"].setdefault(stage, {})).update(values)
            self._write(state)

    def _write(self, state: Mapping[str, Any]) -> None:
        write_atomic(self._run_folder / STATE_FILE, json.dumps(state, indent=2) + "\n")

    def open_run(self, stage: str | None, name: str, params: Params, tags: Tags, dataset: Params) -> _Run:
        """Reopen the run of a stage (None: of the plan), or create it."""
        run_id = self.get(stage).get("run_id")
        run = None if run_id is None else self._reopen(run_id)
        reopened = run is not None
        if run is None:
            run = self.client.create_run(self.experiment_id, run_name=name)
            self.keep(stage, run_id=run.info.run_id)
        wanted, logged = _flatten(params), run.data.params
        changed = {key: [logged[key], text] for key, text in wanted.items() if logged.get(key, text) != text}
        tags = dict(tags) | ({"resumed_params_changed": json.dumps(changed)} if changed else {})
        self._describe(run.info.run_id, {key: wanted[key] for key in wanted if key not in logged}, tags, dataset)
        # The last point of each curve, which the public `get_metric_history` gives only with all the others.
        # With other params the earlier points are not those of this training: all is logged beside them.
        last = {} if changed else {metric.key: metric.step for metric in run.data._metric_objs}
        return _Run(run.info.run_id, run.info.artifact_uri, reopened, last)

    def _reopen(self, run_id: str) -> Any | None:
        exceptions = import_module("mlflow.exceptions")
        try:
            run = self.client.get_run(run_id)
        except exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            logger.warning("the MLflow run %s of this folder was deleted: a new one is made", run_id)
            return None
        self.client.update_run(run_id, status="RUNNING")
        return run

    def _describe(self, run_id: str, params: Mapping[str, str], tags: Tags, dataset: Params) -> None:
        entities = import_module("mlflow.entities")
        items = [entities.Param(key, text) for key, text in params.items()]
        for first in range(0, len(items), PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=items[first : first + PARAMS_PER_CALL], synchronous=True)
        known = {"dataset.name": str(dataset["name"]), "dataset.sha256": str(dataset["sha256"])}
        self.set_tags(run_id, known | dict(tags))
        data = entities.Dataset(
            name=str(dataset["name"])[:500],
            digest=str(dataset["sha256"])[:MAX_DIGEST],
            source_type="local",
            source=json.dumps({"uri": str(dataset["name"])}),
            profile=json.dumps({key: dataset[key] for key in dataset if key.startswith("num_")}),
        )
        context = entities.InputTag("mlflow.data.context", "training")
        self.client.log_inputs(run_id, [entities.DatasetInput(data, [context])])

    def set_tags(self, run_id: str, tags: Tags) -> None:
        entities = import_module("mlflow.entities")
        items = [entities.RunTag(_safe_name(key), _cut(redact(str(text)), MAX_TAG)) for key, text in tags.items()]
        self.client.log_batch(run_id, tags=items, synchronous=True)

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        entities = import_module("mlflow.entities")
        self.client.log_batch(run_id, metrics=[entities.Metric(*point) for point in points], synchronous=True)

    def log_files(self, run_id: str, path: Path, to: str | None) -> None:
        """Log a file, or the contents of a folder, under an artifact path."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), to)
        else:
            self.client.log_artifact(run_id, str(path), to)


@final
class MlflowStageTracking(StageTracking):
    """A child run. Where the store is away when the stage begins, it is created at a later attempt."""

    def __init__(self, store: _Store, name: str, params: Params, tags: Tags, dataset: Params) -> None:
        self._store = store
        self._name = name
        self._description = (params, tags, dataset)
        self._guard = _Guard(f"stage {name}")
        self._run: _Run | None = None
        self._monitor: Any | None = None
        self._points: list[Point] = []
        self._last_step = 0
        self._flushed_at = time.monotonic()
        self.is_open = True  # until `finish`, which may still have to create the run
        self._guard.attempt(self._opened)

    def log(self, metrics: Metrics, step: int) -> None:
        now = time.time_ns() // 1_000_000
        self._points += [(_safe_name(name), float(value), now, step) for name, value in metrics.items()]
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
        if metrics:
            self._guard.attempt(lambda: _log_final(self._store, self._opened(), metrics, self._last_step))
        if model_folder is not None:
            self._guard.attempt(lambda: self._store.log_files(self._opened().id, model_folder, "model"))
        if self._monitor is not None:
            self._guard.attempt(self._monitor.finish)
        self._guard.attempt(lambda: self._store.client.set_terminated(self._opened().id, status))

    def _opened(self) -> _Run:
        if self._run is None:
            self._run = self._store.open_run(self._name, self._name, *self._description)
            steps = [step for key, step in self._run.steps.items() if not key.startswith("system/")]
            self._last_step = max(self._last_step, *steps, 0)
            if self.is_open:
                self._start_monitor(self._run)
        return self._run

    def _flush(self) -> None:
        """Send the buffer. What the reopened run already has is not sent twice: one value per step."""
        run = self._opened()
        self._points = [point for point in self._points if point[3] > run.steps.get(point[0], -math.inf)]
        while self._points:
            self._store.log_points(run.id, self._points[:METRICS_PER_CALL])
            del self._points[:METRICS_PER_CALL]
        self._flushed_at = time.monotonic()

    def _checkpoint(self, path: Path, step: int, sha256: str) -> None:
        row = {"step": step, "uri": path.as_uri(), "sha256": sha256}
        earlier = self._store.get(self._name).get("checkpoints", [])
        rows = [*[old for old in earlier if old["step"] != step and _is_kept(old["uri"])], row]
        rows.sort(key=lambda old: old["step"])
        self._store.keep(self._name, checkpoints=rows)
        run = self._opened()
        if run.is_remote:
            folder = f"checkpoints/step-{step}"
            self._store.log_files(run.id, path, folder)
            row["uri"] = f"{run.artifact_uri}/{folder}" + ("" if path.is_dir() else f"/{path.name}")
            self._store.keep(self._name, checkpoints=rows)
        columns = ["step", "uri", "sha256"]
        listed = {"columns": columns, "data": [[old[column] for column in columns] for old in rows]}
        self._store.client.log_dict(run.id, listed, "checkpoints.json")
        self._store.set_tags(run.id, {"checkpoint.newest": json.dumps(rows[-1])})

    def _start_monitor(self, run: _Run) -> None:
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
                self._monitor = module.SystemMetricsMonitor(
                    run.id, resume_logging=run.reopened, tracking_uri=self._store.uri
                )
                self._monitor.start()
            except ImportError as error:
                state = f"off: {error}; pip install psutil"
            except Exception as error:
                state = f"off: {_told(error)}"
        self._store.set_tags(run.id, {"system_metrics": state})


@final
class MlflowTracking(Tracking):
    """A parent run and its stages."""

    def __init__(self, run_folder: Path, name: str, uri: str) -> None:
        self._run_folder = run_folder
        self._name = name
        self._uri = uri
        self._guard = _Guard(f"plan {name}")
        self._store: _Store | None = None
        self._run: _Run | None = None
        self._dataset: Params = {}
        self._stages: list[MlflowStageTracking] = []
        self._attached = False

    def start(self, params: Params, tags: Tags, dataset: Params) -> None:
        self._dataset = dict(dataset)
        try:
            self._store = _Store(self._run_folder, self._uri)
            self._run = self._store.open_run(None, self._name, params, tags, self._dataset)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the MLflow store {redact(self._uri)} cannot be used: "
                f"{_told(error)}. Correct mlflow.uri (such as {DEFAULT_URI} "
                "or http://host:5000), start that server, or set mlflow.enabled=false."
            ) from error

    def attach(self, dataset: Params) -> None:
        self._dataset = dict(dataset)
        self._attached = True

        def connect() -> None:
            store = _Store(self._run_folder, self._uri)
            self._run = _Run(store.get(None)["run_id"], "", True, {})
            self._store = store

        self._guard.attempt(connect)

    def stage(self, name: str, params: Params, tags: Tags) -> StageTracking:
        if self._attached and self._store is None:
            return NoStageTracking()
        assert self._store is not None and self._run is not None, "stage() before start()"
        tags = dict(tags) | {"mlflow.parentRunId": self._run.id, "stage": name}
        stage = MlflowStageTracking(self._store, name, params, tags, self._dataset)
        self._stages.append(stage)
        return stage

    def register(self, entries: "Sequence[Entry]", name: str, max_mb: float | None) -> list[str]:
        lines: list[str] = []
        store = self._store
        if store is not None and not self._attached:
            ids = _run_ids(self._run_folder)
            arguments = store.client, store.experiment_id, entries, name, max_mb, ids
            self._guard.attempt(lambda: lines.extend(_register(*arguments).lines))
        return lines

    def finish(self, status: Status, artifacts: Sequence[Path] = (), metrics: Metrics = NO_METRICS) -> None:
        for stage in self._stages:
            stage.finish(status, None)
        store, run = self._store, self._run
        if store is None or run is None or self._attached:
            return
        self._run = None
        for path in artifacts:
            to = path.name if path.is_dir() else None
            self._guard.attempt(partial(store.log_files, run.id, path, to))
        if metrics:
            self._guard.attempt(lambda: _log_final(store, run, metrics, 0))
        self._guard.attempt(lambda: store.client.set_terminated(run.id, status))


def register_finished(
    entries: "Sequence[Entry]", name: str, max_mb: float | None, *, run_folder: Path, uri: str | None
) -> "tuple[Registered, str]":
    """(what became of the models, the store): `Tracking.register` of models that were finished earlier.

    run_folder, uri: as of `open_tracking`. Raises ConfigError where the store cannot be used.
    """
    uri = resolve_uri(uri, run_folder)
    try:
        client, experiment_id = _connect(uri)
        ids = _run_ids(run_folder) if _read_state(run_folder).get("uri") == redact(uri) else {}
        return _register(client, experiment_id, entries, name, max_mb, ids), uri
    except DistkgdError:
        raise
    except ImportError as error:
        raise ConfigError(f"mlflow cannot be imported ({error}): pip install 'distkgd[mlflow]'") from None
    except Exception as error:
        raise ConfigError(f"the MLflow store {redact(uri)} did not take the models: {_told(error)}") from error


def _register(
    client: Any, experiment_id: str, entries: "Sequence[Entry]", name: str, max_mb: float | None, ids: Mapping[str, str]
) -> "Registered":
    """`registry.register`, one caller at a time."""
    from distkgd.serving.registry import register  # noqa: PLC0415 - it exports models, which tracking alone does not

    with _locked(entries[0].folder):
        return register(client, experiment_id, name, entries, max_mb=max_mb, runs=ids)


def _run_ids(run_folder: Path) -> dict[str, str]:
    """stage -> id of its run."""
    return {name: kept["run_id"] for name, kept in _read_state(run_folder).get("stages", {}).items()}


def _log_final(store: _Store, run: _Run, metrics: Metrics, step: int) -> None:
    now = time.time_ns() // 1_000_000
    store.log_points(run.id, [(_safe_name(name), float(value), now, step) for name, value in metrics.items()])


def _import_mlflow() -> Any:
    """MLflow, without its telemetry, and giving up on a server in seconds rather than in 4 minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    return import_module("mlflow")


def _connect(uri: str) -> tuple[Any, str]:
    """A client of the store and the id of our experiment, created where they are not there yet."""
    mlflow = _import_mlflow()
    file = _sqlite_file(uri)
    if file is not None:
        _check_sqlite(file)
    folder = Path.cwd() if file is None else file.parent
    is_server = urlparse(uri).scheme in ("http", "https") or uri.startswith("databricks")
    location = None if is_server else (folder / "mlartifacts").as_uri()  # MLflow's own default is ./mlruns
    # MLflow cannot create one schema in two processes at once, hence the lock.
    with _locked(None if file is None else folder):
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                return client, client.create_experiment(EXPERIMENT, artifact_location=location)
            except mlflow.MlflowException:  # somebody else was faster, or it is a true failure
                experiment = client.get_experiment_by_name(EXPERIMENT)
                if experiment is None:
                    raise
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"the MLflow experiment {EXPERIMENT!r} in {redact(uri)} is deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return client, experiment.experiment_id


def _check_uri(uri: str) -> None:
    """Refuse what MLflow would refuse late, or take and lose."""
    scheme = urlparse(uri).scheme.split("+")[0]
    if scheme == "file" or (scheme == "" and not uri.startswith("databricks")):
        raise ConfigError(
            f"mlflow.uri (or MLFLOW_TRACKING_URI) = {uri!r} is a file store, which MLflow no longer "
            f"maintains. Name a database, such as {DEFAULT_URI}, or a server, such as http://host:5000. "
            "`mlflow migrate-filestore` moves old runs into a database."
        )
    if scheme == "sqlite" and (":///" not in uri or uri.split(":///")[1] in ("", ":memory:")):
        raise ConfigError(
            f"mlflow.uri = {uri!r} names no file. Write {DEFAULT_URI} (three slashes, a path relative to "
            "the current directory) or sqlite:////absolute/path/mlflow.db (four)."
        )


def _check_sqlite(file: Path) -> None:
    """Open the database once: MLflow retries for minutes what cannot succeed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(file)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"mlflow.uri names {file}, which is no SQLite database that can be opened ({error}): name "
            "another file, move this one away, or set mlflow.enabled=false"
        ) from error


def resolve_uri(uri: str | None, run_folder: Path) -> str:
    """The store that `open_tracking` would use; relative files become absolute ones."""
    kept = _read_state(run_folder).get("uri")
    if not uri and kept is not None and "***@" not in kept:
        return str(kept)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    _check_uri(uri)
    file = _sqlite_file(uri)
    if file is None:
        return uri
    head, _, tail = uri.partition(":///")
    options = tail.partition("?")[2]
    return f"{head}:///{file}" + (f"?{options}" if options else "")


def noted(run_folder: Path, stage: str) -> dict[str, Any]:
    """What a run folder knows of a stage's run; empty where there is none."""
    found: dict[str, Any] = _read_state(run_folder).get("stages", {}).get(stage, {})
    return found


def adopt(run_folder: Path, run: Mapping[str, Any], stage: str, values: Mapping[str, Any]) -> None:
    """Take over what another machine has `noted` of a plan's run and a stage's, where this folder has nothing."""
    run_folder.mkdir(parents=True, exist_ok=True)
    with _locked(run_folder):
        state = _read_state(run_folder) or {**run, "stages": {}}
        if values and not state["stages"].get(stage):
            state["stages"][stage] = dict(values)
        write_atomic(run_folder / STATE_FILE, json.dumps(state, indent=2) + "\n")


def _sqlite_file(uri: str) -> Path | None:
    """The absolute path of the database file of an SQLite URI; None for other stores."""
    if urlparse(uri).scheme.split("+")[0] != "sqlite":
        return None
    return Path(uri.split(":///")[1].partition("?")[0]).resolve()


def _read_state(run_folder: Path) -> dict[str, Any]:
    path = run_folder / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it to start new MLflow runs") from error
    return state


@contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """Hold a folder's advisory lock; where the file system has none, go on without."""
    if folder is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _flatten(tree: Params) -> dict[str, str]:
    """Nested params as a.b.c keys and texts, spelled as in YAML, cut at what MLflow keeps."""
    flat: dict[str, str] = {}

    def visit(key: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                visit(f"{key}.{name}" if key else str(name), item)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                visit(f"{key}.{index}", item)
        elif key:
            flat[_safe_name(key)] = _cut(redact(_spell(value)), MAX_PARAM)

    visit("", tree)
    return flat


def _spell(value: Any) -> str:
    if value is None or isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def _safe_name(name: str) -> str:
    """A name MLflow takes: hits@10 becomes hits_at_10, other strange characters become `_`."""
    name = re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY] or "_"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def redact(text: str) -> str:
    """Without the password of any URL in it."""
    return re.sub(r"(://[^/:@\s]*:)[^@/\s]+@", r"\1***@", text)


def _told(error: Exception) -> str:
    """An error in one line: those of a database go on with the statement and its parameters."""
    first = str(error).partition("\n")[0]
    return _cut(redact(f"{type(error).__name__}: {first}"), 500)


def _is_kept(uri: str) -> bool:
    """Is a checkpoint still there? One that was uploaded is; one on this machine may have been retired."""
    parsed = urlparse(uri)
    return parsed.scheme != "file" or Path(unquote(parsed.path)).exists()
