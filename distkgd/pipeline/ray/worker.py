"""What runs in the actors: one rank of the process group that trains one stage, as torchrun would run it."""

import hashlib
import logging
import os
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from distkgd.common.console import Display
from distkgd.common.locks import BusyError, held
from distkgd.common.stop_signal import ask_to_stop
from distkgd.data import load_graph
from distkgd.data.sharing import shared_graph
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks, join_ranks, leave_ranks
from distkgd.errors import CheckpointError, ConfigError, DataError, DistkgdError, RendezvousError, Stopped, StorageError
from distkgd.kernels.memory import keep_freed_memory
from distkgd.models.run_paths import stage_folder
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.config import RunConfig, parse_config
from distkgd.pipeline.foreign_teachers import bring_teachers
from distkgd.pipeline.plan import open_run, run_stage
from distkgd.pipeline.ray.session import import_ray
from distkgd.pipeline.run_folder import LOG
from distkgd.pipeline.stages import Plan, Stage, check_stage
from distkgd.pipeline.storage import open_storage
from distkgd.tracking.mlflow_runs import open_tracking

logger = logging.getLogger(__name__)

INHERITED = ("DISTKGD_", "MLFLOW_")
SCRATCH = "DISTKGD_SCRATCH"
FETCH_SECONDS = 1800.0


@dataclass(frozen=True)
class Place:
    """Where an actor is. port: free a moment ago."""

    host: str
    port: int
    pid: int


@dataclass(frozen=True)
class Work:
    """What all workers of a stage are told.

    config: the resolved run. stages: of the plan, of which `stage` is one. folder: of the run. uri: MLflow's store.
    sha256: of the data that the plan was checked on.
    """

    config: Mapping[str, Any]
    stages: Sequence[Stage]
    stage: str
    folder: Path
    uri: str | None
    sha256: str
    device: str
    threads: int


@dataclass(frozen=True)
class Surroundings:
    """What actors take over from the launcher: its working directory where they have it, and settings of ours."""

    cwd: str = field(default_factory=os.getcwd)
    variables: Mapping[str, str] = field(
        default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith(INHERITED)}
    )

    def enter(self) -> None:
        """In the actor's process."""
        os.environ.update(self.variables)
        if Path(self.cwd).is_dir():
            os.chdir(self.cwd)


@dataclass(frozen=True)
class Outcome:
    """How a rank, or a whole gang, has ended.

    kind: done; stopped by a signal, checkpoint written; refused: it would end so again; failed: it may not; died: the
        rank's process, or its node, is gone.
    result: the stage's. text: why.
    """

    kind: Literal["done", "stopped", "refused", "failed", "died"]
    text: str = ""
    result: StageResult | None = None


class StageWorker:
    """One rank. Its methods are called by the coordinator; `alive` and `stop` in another thread than `train`."""

    def __init__(self, name: str, surroundings: Surroundings) -> None:
        self._name = name
        surroundings.enter()

    def __repr__(self) -> str:
        return self._name  # what Ray puts before this actor's lines

    def place(self) -> Place:
        """Where this actor is."""
        with socket.socket() as s:
            s.bind(("", 0))
            return Place(import_ray().util.get_node_ip_address(), int(s.getsockname()[1]), os.getpid())

    def alive(self) -> bool:
        """Whether this process still answers."""
        return True

    def stop(self, signal_number: int) -> None:
        """Finish the step, write a checkpoint, and end."""
        ask_to_stop(signal_number)

    def train(self, work: Work, rank: int, world: int, first: Place) -> Outcome:
        """This rank's part of the stage; `first` is where rank 0 is. Errors are told, not raised."""
        try:
            return Outcome("done", result=train_rank(work, rank, world, first))
        except Stopped as stopped:
            return Outcome("stopped", str(stopped))
        except (RendezvousError, CheckpointError, StorageError, BusyError) as error:
            return Outcome("failed", f"{type(error).__name__}: {error}")
        except DistkgdError as error:
            return Outcome("refused", f"{type(error).__name__}: {error}")
        except Exception as error:  # told to the coordinator, which may start the stage again
            logger.exception("rank %d of stage %s", rank, work.stage)
            at = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome("failed", f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})")


def train_rank(work: Work, rank: int, world: int, first: Place) -> StageResult | None:
    """Join the others, run the stage, leave; the stage's result on rank 0, None on the others."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # Ray shows each worker its own GPU alone
        "MASTER_ADDR": first.host,
        "MASTER_PORT": str(first.port),
    }
    keep_freed_memory()
    torch.set_num_threads(work.threads)
    config = parse_config(work.config, "the plan")
    folder = folder_of(work, config)
    if not config.storage and not (folder / "plan.yaml").is_file():
        raise ConfigError(
            f"{socket.gethostname()} does not see the run folder {folder}; give --out a path on a disk that all nodes "
            "share, or set storage to a URI that they reach."
        )
    stages = {stage.name: stage for stage in work.stages}
    stage = stages[work.stage]
    ranks = join_ranks(work.device)
    on_first(ranks, partial(provide, config, folder, stage, stages))
    with only_one(stage_folder(folder, stage.name) / "gang.lock", ranks):
        graph = shared_graph(ranks, lambda: load_graph(config.data))
        if graph.identity != work.sha256:
            raise DataError(f"{socket.gethostname()} has other data at {config.data} than the coordinator has.")
        check_stage(stage, graph, world)
        plan = Plan(config, graph, folder, work.stages)
        if config.storage:
            bring_teachers(plan, [stage], ranks)
        tracking = open_tracking(
            run_folder=folder,
            name=config.name,
            uri=work.uri,
            enabled=config.mlflow.enabled,
            active=ranks.first,
        )
        tracking.attach(graph.summary())
        display = Display(ranks.first)
        with display.kept(folder / LOG, ranks.rank):
            result = run_stage(open_run(plan, ranks, tracking, display), stage)
        leave_ranks(ranks)
    return result if rank == 0 else None


def folder_of(work: Work, config: RunConfig) -> Path:
    """Where this node keeps the run: the run folder, or with `storage` a folder of its own below DISTKGD_SCRATCH."""
    scratch = os.environ.get(SCRATCH)
    if not config.storage or not scratch:
        return work.folder
    return Path(scratch) / hashlib.sha256(str(work.folder).encode()).hexdigest()[:12]


def provide(config: RunConfig, folder: Path, stage: Stage, stages: Mapping[str, Stage]) -> None:
    """Fetch what a stage needs of others and, if it was begun elsewhere, of itself; nothing where a disk is shared."""
    storage = open_storage(config, folder)
    if storage is None:
        return
    with held(folder / "storage.lock", FETCH_SECONDS):  # two gangs of a node may need the same
        storage.restore_plan(resume=True)
        for name in (name for name in stage.needs if name in stages):
            if not storage.download_stage(name):
                raise StorageError(f"{config.storage} does not hold stage {name}, which {stage.name} needs.")
        storage.download_checkpoints(stage.name)


@contextmanager
def only_one(path: Path, ranks: Ranks) -> Iterator[None]:
    """Hold `path` on rank 0, so that no earlier attempt still writes beside this one."""
    if not ranks.first:
        yield
        return
    with held(path):
        yield
