"""A stage ready to be trained, what its loop has to remember, and how both are written to disk and read back."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from distkgd.common.console import Display
from distkgd.common.stop_signal import StopRequest
from distkgd.config.run_options import EngineConfig
from distkgd.config.stage import StageOptions
from distkgd.data.step_inputs import Prefetcher, StepInputBuilder
from distkgd.distributed.checkpoint.reader import latest, load_rows, load_tensors, read_meta
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.distributed.checkpoint.writer import State, Writer
from distkgd.distributed.finite import Broken
from distkgd.distributed.optim.deepspeed_engine import DeepSpeedDense
from distkgd.distributed.optim.dense import Dense, DenseOptimizer
from distkgd.distributed.optim.kept import KeptRows
from distkgd.distributed.optim.rows import RowOptimizer
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError
from distkgd.methods import Method, Phase

if TYPE_CHECKING:
    from distkgd.tracking.tracker import StageTracking

# (stage, epoch, best validation MRR so far) -> whether to go on.
Watch = Callable[[str, int, float], bool]


class TeacherPoller(Protocol):
    """Who knows when a teacher that was not finished is."""

    def follow(self, progress: "Progress", stop: StopRequest) -> bool:
        """Before the first epoch and after each: whether to go on. All ranks call it and get the same answer."""
        ...


@dataclass
class Progress:
    """All the loop has to remember across a restart, beside tensors."""

    step: int = 0
    epoch: int = 0
    best_mrr: float = -1.0
    best_step: int = -1
    stale: int = 0
    plateau_scale: float = 1.0
    plateau_stale: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    joules: float | None = None  # drawn by the first rank's machine so far; None: not known
    done: bool = False
    early_steps: int = 0  # on a teacher that was not finished (`distkgd.pipeline.overlap`)
    log_sums: dict[str, float] = field(default_factory=dict)  # loss terms since the last logged row
    log_count: int = 0


@dataclass
class Job:
    """A stage ready to be trained.

    digest: identifies config but for its epochs, data and teachers; a checkpoint of another digest is refused.
    validate: -> validation metrics (with "mrr"), or None when there is nothing to validate on.
    watch: told the stage's name, epoch and best MRR after every validation, once its checkpoint is on the way; False
        stops the stage there. All ranks must get the same answer.
    early: a teacher that is not finished. copy: told of every checkpoint on the first rank.
    told: a broken row in words, with the name of what it is of.
    place: of how many stages it is which, in words. later_epochs: of the stages after it.
    kept: of the student's entities and relations, those that do not move freely.
    """

    name: str
    config: StageOptions
    method: Method[Any]
    input_builder: StepInputBuilder
    ranks: Ranks
    folder: Path
    digest: str
    keep: int
    validate: Callable[[], dict[str, float]] | None
    tracking: "StageTracking"
    display: Display
    engine: EngineConfig = field(default_factory=EngineConfig)
    watch: Watch | None = None
    early: TeacherPoller | None = None
    copy: Callable[[Path], None] | None = None
    told: Callable[[Broken], str] = str
    place: str = ""
    later_epochs: int = 0
    kept: tuple[KeptRows, KeptRows] | None = None
    rows: dict[str, RowOptimizer] = field(default_factory=dict)
    dense: dict[str, Dense] = field(default_factory=dict)
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        seed = self.input_builder.sampler.seed
        for name, group in self.method.groups.items():
            config, model, lr = group.recipe(self.config.optimizer), group.model, None
            for tensor in group.replicated.values():
                tensor.requires_grad_(True)
            if model is not None:
                lr, offload = config.relation_lr, config.offload
                self.rows[name] = RowOptimizer(config.name, model.entity, lr=config.lr, offload=offload, seed=seed)
            self.dense[name] = self._dense(config.name, group.replicated, lr or config.lr)
        if self.kept is not None:
            for one in self.rows.values():
                if one.table is self.method.student.entity:
                    one.kept = self.kept[0]
        self.prefetcher = Prefetcher(self.input_builder, self.config.accumulate)
        self.writer = Writer(self.checkpoints, self.ranks, keep=self.keep)

    def _dense(self, name: str, tensors: Mapping[str, torch.Tensor], lr: float) -> Dense:
        if self.engine.name == "deepspeed":
            return DeepSpeedDense(name, tensors, lr=lr, ranks=self.ranks, zero=self.engine.zero)
        return DenseOptimizer(name, tensors, lr=lr)

    def row_tensors(self, group: str) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of a group's entity rows; of groups that share a table the first one has the rows."""
        optimizer = self.rows[group]
        first = next(other for other, one in self.rows.items() if one.table is optimizer.table)
        return ({"weight": optimizer.table.weight} if group == first else {}) | optimizer.state

    @property
    def phase(self) -> Phase:
        """The method's present phase."""
        return self.method.phase(self.config.epochs)

    @property
    def checkpoints(self) -> Path:
        """Folder of this stage's checkpoints."""
        return self.folder / "checkpoint"


def schedule_scale(job: Job, progress: Progress) -> float:
    """Factor on the learning rate at this step; the schedule of a method of several phases spans each of them."""
    schedule = job.config.schedule
    phase = job.phase
    epochs = progress.step / job.input_builder.sampler.steps_per_epoch - phase.begin
    share = min(1.0, epochs / (phase.end - phase.begin))
    match schedule.name:
        case "linear":
            return 1.0 + (schedule.final - 1.0) * share
        case "cosine":
            return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * share))
        case "plateau":
            return progress.plateau_scale
    return 1.0


def step_name(step: int) -> str:
    """Folder name of the checkpoint of `step`."""
    return f"step_{step:010d}"


def best_step(path: Path) -> int:
    """The step of the best validation that a checkpoint knows of; its own where there was none."""
    manifest = read_meta(path)
    best = int(manifest["meta"]["progress"]["best_step"])
    return best if best >= 0 else int(manifest["step"])


def write(job: Job, progress: Progress) -> None:
    """Start a checkpoint of everything the loop needs; the best step and the newest ones are kept."""
    wait_for_checkpoint(job)  # first, because publishing this one may remove the one that is registered now
    kept = job.method.state()
    state = State({}, {}, {"digest": job.digest, "progress": vars(progress), "method": dict(kept.values)})
    state.meta["epochs"] = job.config.epochs
    state.meta["optimizer_steps"] = {group: one.steps for group, one in job.dense.items()}
    for group, optimizer in job.rows.items():
        table = optimizer.table
        state.rows |= {f"{group}.entity.{k}": Rows(v, table.lo, table.total) for k, v in job.row_tensors(group).items()}
    for group, dense in job.dense.items():
        kinds = dense.state()
        for name, tensor in dense.tensors.items():
            state.tensors[f"{group}.{name}"] = tensor.detach()
            state.tensors |= {f"{group}.{name}.{k}": v for k, v in kinds.get(name, {}).items()}
    state.rows |= {f"method.{k}": v for k, v in kept.rows.items()}
    state.tensors |= {f"method.{k}": v for k, v in kept.tensors.items()}
    protect = [progress.best_step] if progress.best_step >= 0 else []
    job.writer.save(progress.step, state, protect=protect)


def wait_for_checkpoint(job: Job) -> None:
    """Wait until the checkpoint that is being written, if any, is published, and register it."""
    path = job.writer.wait()
    if path is not None and job.ranks.first:
        if job.copy is not None:
            job.copy(path)
        digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        job.tracking.checkpoint(path, int(path.name.removeprefix("step_")), digest)


def restore(job: Job) -> Progress:
    """Load the newest undamaged checkpoint into the job, or start fresh."""
    path = latest(job.checkpoints, job.ranks, job.display.warn)
    if path is None:
        return Progress()
    meta = read_meta(path)["meta"]
    if meta["digest"] != job.digest:
        raise CheckpointError(
            f"{path} belongs to another config, data set or teacher than stage {job.name} has now; "
            "use another --out, or go back to the plan.yaml beside it."
        )
    for group in job.dense:
        load_group(job, group, path)
    kept = job.method.state()
    for key, rows in kept.rows.items():
        rows.tensor.copy_(load_rows(path, f"method.{key}", rows.lo, rows.lo + len(rows.tensor)))
    stored = load_tensors(path) if kept.tensors else {}
    for key, tensor in kept.tensors.items():
        tensor.copy_(stored[f"method.{key}"])
    job.method.restore(meta["method"])
    progress = Progress(**meta["progress"])
    if meta["epochs"] < job.config.epochs:
        progress.done = False
    if not progress.done:
        job.display.line(f"{job.name}: resumed at step {progress.step}")
    return progress


def load_group(job: Job, group: str, path: Path) -> None:
    """Rows, replicated tensors and optimiser state of one group from a checkpoint, in place."""
    wait_for_checkpoint(job)  # it may be the one that is being written
    steps = read_meta(path)["meta"]["optimizer_steps"][group]
    if group in job.rows:
        optimizer = job.rows[group]
        table = optimizer.table
        optimizer.steps = steps
        for key, value in job.row_tensors(group).items():
            value.copy_(load_rows(path, f"{group}.entity.{key}", table.lo, table.hi))
    stored = load_tensors(path)
    tensors, state = {}, {}
    for name in job.dense[group].tensors:
        prefix = f"{group}.{name}"
        tensors[name] = stored[prefix]
        state[name] = {k.removeprefix(f"{prefix}."): v for k, v in stored.items() if k.startswith(f"{prefix}.")}
    job.dense[group].load(tensors, state, steps)
