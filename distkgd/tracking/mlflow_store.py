"""A connection to an MLflow store."""

import json
import logging
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from distkgd.common.text import redact
from distkgd.errors import ConfigError
from distkgd.tracking.mlflow_text import MAX_DIGEST, MAX_TAG, cut, flatten, safe_name
from distkgd.tracking.run_ids import keep, locked, noted, read_state, write_state
from distkgd.tracking.tracker import Params, Tags

logger = logging.getLogger(__name__)

SHOWN_AS = {"description": "mlflow.note.content", "git_sha": "mlflow.source.git.commit"}  # on MLflow's own pages

EXPERIMENT = "distkgd"
DEFAULT_URI = "sqlite:///mlflow.db"
PARAMS_PER_CALL = 50  # MLflow allows 100, and 1 MB a call


@dataclass(frozen=True)
class OpenRun:
    """An open run. `steps`: the last step each curve had when it was reopened."""

    id: str
    artifact_uri: str
    steps: Mapping[str, int]


class Store:
    """A connection to the store, and the run ids in the run folder."""

    def __init__(self, run_folder: Path, uri: str) -> None:
        self.run_folder = run_folder
        self.uri = uri
        self.client, self.experiment_id = connect(uri)
        run_folder.mkdir(parents=True, exist_ok=True)
        with locked(run_folder):
            earlier = read_state(run_folder).get("uri")
            if earlier == redact(uri):
                return
            if earlier is not None:
                logger.warning("the earlier runs are in %s; new ones are made in %s", earlier, redact(uri))
            write_state(run_folder, {"uri": redact(uri), "experiment": EXPERIMENT, "run_id": None, "stages": {}})

    def open_run(self, stage: str | None, name: str, params: Params, tags: Tags, dataset: Params) -> OpenRun:
        """Reopen the run of a stage (None: of the plan), or create it."""
        run_id = noted(self.run_folder, stage).get("run_id")
        run = None if run_id is None else self._reopen(run_id)
        if run is None:
            run = self.client.create_run(self.experiment_id, run_name=name)
            keep(self.run_folder, stage, run_id=run.info.run_id)
        wanted, logged = flatten(params), run.data.params
        changed = {key: [logged[key], text] for key, text in wanted.items() if logged.get(key, text) != text}
        tags = dict(tags) | ({"resumed_params_changed": json.dumps(changed)} if changed else {})
        self._describe(run.info.run_id, {key: wanted[key] for key in wanted if key not in logged}, tags, dataset)
        # The last point of each curve, which the public `get_metric_history` gives only with all the others.
        # With other params the earlier points are not those of this training: all is logged beside them.
        last = {} if changed else {metric.key: metric.step for metric in run.data._metric_objs}
        return OpenRun(run.info.run_id, run.info.artifact_uri, last)

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
        known |= import_module("mlflow.tracking.context.registry").resolve_tags()  # user and source
        known |= {shown: str(tags[name]) for name, shown in SHOWN_AS.items() if name in tags}
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
        items = [entities.RunTag(safe_name(key), cut(redact(str(text)), MAX_TAG)) for key, text in tags.items()]
        self.client.log_batch(run_id, tags=items, synchronous=True)

    def log_files(self, run_id: str, path: Path, to: str | None) -> None:
        """Log a file, or the contents of a folder, under an artifact path."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), to)
        else:
            self.client.log_artifact(run_id, str(path), to)


def import_mlflow() -> Any:
    """MLflow, without its telemetry, and giving up on a server in seconds rather than in 4 minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    return import_module("mlflow")


def connect(uri: str) -> tuple[Any, str]:
    """A client of the store and the id of our experiment, created where they are not there yet."""
    mlflow = import_mlflow()
    file = _sqlite_file(uri)
    if file is not None:
        _check_sqlite(file)
    folder = Path.cwd() if file is None else file.parent
    is_server = urlparse(uri).scheme in ("http", "https") or uri.startswith("databricks")
    location = None if is_server else (folder / "mlartifacts").as_uri()  # MLflow's own default is ./mlruns
    # MLflow cannot create one schema in two processes at once, hence the lock.
    with locked(None if file is None else folder):
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
    kept = read_state(run_folder).get("uri")
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


def _sqlite_file(uri: str) -> Path | None:
    """The absolute path of the database file of an SQLite URI; None for other stores."""
    if urlparse(uri).scheme.split("+")[0] != "sqlite":
        return None
    return Path(uri.split(":///")[1].partition("?")[0]).resolve()
