"""A run's stages at an fsspec URI (`storage: URI`), for machines that share no disk.

URI/
  plan.yaml  mlflow.json                 whose place this is, and its run in MLflow
  stages/STAGE/result.json               written last: the finished stage is here, as model/ and metrics.jsonl
  stages/STAGE/checkpoint/step_*/        while it is trained: the newest (manifest.json last) and the best one
  stages/STAGE/mlflow.json               the stage's run

The first rank of a stage writes; whoever needs a teacher, or takes a stage up on another machine, fetches.
"""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from distkgd.common.files import discard, write_atomic
from distkgd.config.tree import read_yaml
from distkgd.distributed.checkpoint.reader import MANIFEST, list_steps, verify
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError, ConfigError, StorageError
from distkgd.models.remote import check_files, download, filled, open_uri, reaching, upload
from distkgd.models.run_paths import RESULT, stage_folder
from distkgd.pipeline.config import RunConfig
from distkgd.pipeline.run_folder import refuse_other_plan
from distkgd.tracking.run_ids import STATE_FILE, adopt, noted
from distkgd.training.job import best_step, step_name

PLAN, CURVES = "plan.yaml", "metrics.jsonl"
logger = logging.getLogger(__name__)


class Storage:
    """The place of one run. Its methods are called by one process at a time of each machine."""

    def __init__(self, uri: str, run_folder: Path) -> None:
        self._uri = uri.rstrip("/")
        self._folder = run_folder
        self._fs, self._root = open_uri(uri)
        self._thread = ThreadPoolExecutor(1, "storage")
        self._copies: list[Future[None]] = []

    # -- the run ------------------------------------------------------------------------------------------------------

    def restore_plan(self, resume: bool) -> None:
        """Take up the run that is here in a folder that has none; ConfigError when it was not asked to."""
        there = f"{self._root}/{PLAN}"
        with reaching(f"looking into {self._uri}"):
            if (self._folder / PLAN).exists():
                return
            if not self._fs.exists(there):
                self._fs.makedirs(
                    self._root, exist_ok=True
                )  # a place that cannot be written is refused before training
                return
            if not resume:
                raise ConfigError(f"{self._uri} already holds a run; add --resume to go on with it, or change storage.")
            text = self._fs.cat_file(there).decode()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / PLAN, text)

    def claim(self) -> None:
        """Make this the place of the run folder's run; ConfigError when it is another run's."""
        mine, there = self._folder / PLAN, f"{self._root}/{PLAN}"
        with reaching(f"writing to {self._uri}"), TemporaryDirectory() as folder:
            if self._fs.exists(there):
                self._fs.get_file(there, str(Path(folder) / PLAN))
                try:
                    refuse_other_plan(Path(folder) / PLAN, read_yaml(mine))
                except ConfigError as error:
                    raise ConfigError(str(error).replace(folder, self._uri)) from None
            else:
                self._fs.makedirs(self._root, exist_ok=True)
                self._fs.put_file(str(mine), there)

    def keep_ids(self, stage: str | None = None) -> None:
        """Tell other machines the ids of the run in MLflow, and of a stage, if it is tracked."""
        path, there = self._folder / STATE_FILE, f"{self._root}/{STATE_FILE}"
        with reaching(f"writing to {self._uri}"):
            if path.exists() and not self._fs.exists(there):
                self._fs.put_file(str(path), there)
            if stage is not None and (values := noted(self._folder, stage)):
                self._fs.pipe_file(f"{self._of(stage)}/{STATE_FILE}", json.dumps(values).encode())

    # -- stages -------------------------------------------------------------------------------------------------------

    def download_stage(self, name: str) -> bool:
        """Fetch a finished stage, unless it is here; whether it is here now."""
        here, there = stage_folder(self._folder, name), self._of(name)
        if (here / RESULT).exists():
            return True
        with reaching(f"fetching stage {name} from {self._uri}"):
            if not self._fs.exists(f"{there}/{RESULT}"):
                return False
            with filled(here / "model") as part:
                download(self._fs, f"{there}/model", part)
                check_files(part, f"{self._uri}/stages/{name}/model")
            self._fs.get_file(f"{there}/{CURVES}", str(here / CURVES))
            write_atomic(here / RESULT, self._fs.cat_file(f"{there}/{RESULT}").decode())
        return True

    def upload_stage(self, name: str) -> None:
        """Copy a finished stage, unless it is there, and drop its checkpoints there."""
        here, there = stage_folder(self._folder, name), self._of(name)
        self.wait()
        with reaching(f"copying stage {name} to {self._uri}"):
            if self._fs.exists(f"{there}/{RESULT}"):
                return
            upload(self._fs, here / "model", f"{there}/model", "config.json")
            for file in (CURVES, RESULT):
                self._fs.put_file(str(here / file), f"{there}/{file}")
            self.keep_ids(name)
            if self._fs.exists(f"{there}/checkpoint"):
                self._fs.rm(f"{there}/checkpoint", recursive=True)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def copy_checkpoint(self, name: str, path: Path) -> None:
        """Begin to copy a stage's checkpoint; training goes on."""
        self._copies.append(self._thread.submit(self._copy, name, path))

    def wait(self) -> None:
        """Until no copy is under way."""
        copies, self._copies = self._copies, []
        for copy in copies:
            copy.result()

    def download_checkpoints(self, name: str) -> None:
        """Fetch the newest whole checkpoint of a stage, and the best one it knows of, if newer than those here."""
        here = stage_folder(self._folder, name) / "checkpoint"
        with reaching(f"fetching checkpoints of {name} from {self._uri}"):
            self._bring_run(name)
            for step in reversed(self._steps(name)):
                if step <= max(list_steps(here), default=-1):
                    return
                try:
                    self._bring_checkpoint(name, step)
                    best = best_step(here / step_name(step))
                    if best not in list_steps(here):
                        self._bring_checkpoint(name, best)
                    self._fs.get_file(f"{self._of(name)}/{CURVES}", str(here.parent / CURVES))
                    return
                except (CheckpointError, FileNotFoundError) as error:
                    logger.warning("a copy of a checkpoint of %s cannot be used: %s", name, error)
                    if (here / step_name(step)).exists():
                        discard(here / step_name(step))

    def _bring_checkpoint(self, name: str, step: int) -> None:
        with filled(stage_folder(self._folder, name) / "checkpoint" / step_name(step)) as part:
            download(self._fs, f"{self._of(name)}/checkpoint/{step_name(step)}", part)
            verify(part)

    def _copy(self, name: str, path: Path) -> None:
        there = f"{self._of(name)}/checkpoint"
        try:
            with reaching(f"copying {path} to {self._uri}"):
                self._fs.makedirs(there, exist_ok=True)
                self._fs.put_file(str(stage_folder(self._folder, name) / CURVES), f"{self._of(name)}/{CURVES}")
                self.keep_ids(name)
                upload(self._fs, path, f"{there}/{path.name}", MANIFEST)
                for step in self._steps(name):
                    if step not in (best_step(path), int(path.name.removeprefix("step_"))):
                        self._fs.rm(f"{there}/{step_name(step)}", recursive=True)
        except (StorageError, CheckpointError) as error:
            if path.exists():  # else newer ones have taken its place meanwhile
                logger.warning("training goes on; a later checkpoint may get through: %s", error)

    def _steps(self, name: str) -> list[int]:
        # Of the complete copies, ascending.
        self._fs.invalidate_cache()
        found = self._fs.find(f"{self._of(name)}/checkpoint", maxdepth=2)  # `glob` takes the URI itself for a pattern
        return sorted(int(path.split("/")[-2].removeprefix("step_")) for path in found if path.endswith(f"/{MANIFEST}"))

    # -- MLflow -------------------------------------------------------------------------------------------------------

    def _bring_run(self, name: str) -> None:
        run, stage = f"{self._root}/{STATE_FILE}", f"{self._of(name)}/{STATE_FILE}"
        if self._fs.exists(run):
            values = json.loads(self._fs.cat_file(stage)) if self._fs.exists(stage) else {}
            adopt(self._folder, json.loads(self._fs.cat_file(run)), name, values)

    def _of(self, name: str) -> str:
        return f"{self._root}/stages/{name}"


def open_storage(config: RunConfig, run_folder: Path) -> Storage | None:
    """Of a run; None where its machines share a disk."""
    return Storage(config.storage, run_folder) if config.storage else None


def find_run(config: RunConfig, run_folder: Path, ranks: Ranks, resume: bool) -> Storage | None:
    """The storage of a run, before its folder is prepared: `Storage.restore_plan`. All ranks call it."""
    storage = open_storage(config, run_folder)
    if storage is not None:
        on_first(ranks, partial(storage.restore_plan, resume))
    return storage


def download_run(storage: Storage | None, names: Sequence[str], ranks: Ranks) -> None:
    """What is there of a run's stages, once its folder has its plan. All ranks call it."""
    if storage is None:
        return

    def bring() -> None:
        storage.claim()
        for name in names:
            if not storage.download_stage(name):
                storage.download_checkpoints(name)

    on_first(ranks, bring)


def upload_stage(storage: Storage | None, name: str, ranks: Ranks) -> None:
    """Copy a finished stage. All ranks call it."""
    if storage is not None:
        on_first(ranks, partial(storage.upload_stage, name))
