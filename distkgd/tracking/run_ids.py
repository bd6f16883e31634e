"""The ids of a run's MLflow runs, kept in the run folder."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distkgd.common.files import write_atomic
from distkgd.errors import ConfigError

STATE_FILE = "mlflow.json"


def run_ids(run_folder: Path) -> dict[str, str]:
    """stage -> id of its run."""
    return {name: kept["run_id"] for name, kept in read_state(run_folder).get("stages", {}).items()}


def noted(run_folder: Path, stage: str | None) -> dict[str, Any]:
    """What a run folder knows of a stage's run, or (None) of the plan's; empty where there is none."""
    state = read_state(run_folder)
    found: dict[str, Any] = state if stage is None else state.get("stages", {}).get(stage, {})
    return found


def keep(run_folder: Path, stage: str | None, **values: Any) -> None:
    """Note values beside those of other stages, which other processes may be writing."""
    with locked(run_folder):
        state = read_state(run_folder)
        (state if stage is None else state["stages"].setdefault(stage, {})).update(values)
        write_state(run_folder, state)


def adopt(run_folder: Path, run: Mapping[str, Any], stage: str, values: Mapping[str, Any]) -> None:
    """Take over what another machine has `noted` of a plan's run and a stage's, where this folder has nothing."""
    run_folder.mkdir(parents=True, exist_ok=True)
    with locked(run_folder):
        state = read_state(run_folder) or {**run, "stages": {}}
        if values and not state["stages"].get(stage):
            state["stages"][stage] = dict(values)
        write_state(run_folder, state)


def write_state(run_folder: Path, state: Mapping[str, Any]) -> None:
    write_atomic(run_folder / STATE_FILE, json.dumps(state, indent=2) + "\n")


def read_state(run_folder: Path) -> dict[str, Any]:
    path = run_folder / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it to start new MLflow runs") from error
    return state


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
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
