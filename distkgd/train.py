"""The one training loop. Read `train_stage` from top to bottom and you know what happens, and in which order."""

import hashlib
import json
import math
import resource
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from distkgd.config import EngineConfig, ScheduleConfig, StageConfig
from distkgd.display import Display
from distkgd.distributed.checkpoint import latest, load_rows, load_tensors, read_meta
from distkgd.distributed.checkpoint_writer import State, Writer
from distkgd.distributed.deepspeed_engine import DeepSpeedDense
from distkgd.distributed.dense import Dense, DenseOptimizer, begin_reducing
from distkgd.distributed.model_files import Rows
from distkgd.distributed.optim import RowOptimizer, clip_factor
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError, DivergedError, Stopped
from distkgd.methods import Method
from distkgd.scenes import Lookahead, SceneBuilder
from distkgd.tracking import StageTracking

LOGS_PER_EPOCH = 5


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
    done: bool = False
    log_sums: dict[str, float] = field(default_factory=dict)  # loss terms since the last logged row
    log_count: int = 0


@dataclass
class Job:
    """A stage ready to be trained.

    digest: identifies config, data and teachers; a checkpoint of another digest is refused.
    validate: -> validation metrics (with "mrr"), or None when there is nothing to validate on.
    """

    name: str
    config: StageConfig
    method: Method
    scenes: SceneBuilder
    ranks: Ranks
    folder: Path
    digest: str
    keep: int
    validate: Callable[[], dict[str, float]] | None
    tracking: StageTracking
    display: Display
    engine: EngineConfig = field(default_factory=EngineConfig)
    rows: dict[str, RowOptimizer] = field(default_factory=dict)
    dense: dict[str, Dense] = field(default_factory=dict)
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        self.writer = Writer(self.checkpoints, self.ranks, keep=self.keep)
        config, method = self.config.optimizer, self.method
        for group, model in method.trained.items():
            model.relation.requires_grad_(True)
            seed = self.scenes.sampler.seed
            self.rows[group] = RowOptimizer(config.name, model.entity, lr=config.lr, offload=config.offload, seed=seed)
            self.dense[group] = self._dense({"relation": model.relation}, config.relation_lr or config.lr)
        if method.evaluators:
            for tensor in method.evaluators.values():
                tensor.requires_grad_(True)
            self.dense["evaluators"] = self._dense(method.evaluators, method.evaluator_lr)
        self.lookahead = Lookahead(self.scenes, self.config.accumulate)
        self.writer = Writer(self.checkpoints, self.ranks, keep=self.keep)

    def _dense(self, tensors: Mapping[str, torch.Tensor], lr: float) -> Dense:
        name = self.config.optimizer.name
        if self.engine.name == "deepspeed":
            return DeepSpeedDense(name, tensors, lr=lr, ranks=self.ranks, zero=self.engine.zero)
        return DenseOptimizer(name, tensors, lr=lr)

    @property
    def checkpoints(self) -> Path:
        """Folder of this stage's checkpoints."""
        return self.folder / "checkpoint"


def train_stage(job: Job) -> Progress:
    """Train until the epochs are over, validation stops rising, or the method has finished; leaves the best rows in the
    student. Resumes from the newest checkpoint in the stage's folder if there is one.

    Raises Stopped after a signal (the checkpoint is written), DivergedError on a NaN or Inf loss.
    """
    progress = restore(job)
    per_epoch = job.scenes.sampler.steps_per_epoch
    begun = time.monotonic() - progress.seconds
    finished_before = progress.done
    with (
        MetricsLog(job, progress) as log,
        listen_for_stop() as stop,
        job.display.bar(job.name, last_epoch(job) * per_epoch) as bar,
        job.writer,
    ):
        while progress.epoch < last_epoch(job) and not progress.done:
            started = time.monotonic()
            terms, stopping = train_step(job, progress, stop.signal_number)
            progress.step += 1
            progress.train_seconds += time.monotonic() - started
            log.step(terms)
            bar.update(progress.step)

            if progress.step % per_epoch == 0:
                progress.epoch += 1
                end_epoch(job, progress, log, begun)
            if stopping:
                break
        job.lookahead.drop()
        if not finished_before:
            progress.done = progress.done or progress.epoch >= last_epoch(job)
            progress.seconds = time.monotonic() - begun
            write(job, progress)
            settle(job)
        # A signal may also have come in the last step or validation, after which no step would see it.
        if any(job.ranks.gather_objects(stop.signal_number)):
            raise Stopped(stop.signal_number or int(signal.SIGTERM), f"in stage {job.name} after step {progress.step}")
    if job.validate is not None and progress.best_step >= 0:
        load_group(job, "student", job.checkpoints / step_name(progress.best_step))
    return progress


def train_step(job: Job, progress: Progress, signal_number: int) -> tuple[dict[str, float], bool]:
    """One global batch: the loss terms it had ({name: value}), and whether a signal asked any rank to stop."""
    method, accumulate = job.method, job.config.accumulate
    totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    stopping = False
    for i in range(accumulate):
        scene = job.lookahead.scene(progress.step, i)
        for update in method.updates(scene):
            job.lookahead.advance()
            torch.stack(list(update.terms.values())).sum().backward()
            for name, term in update.terms.items():
                totals[name] = totals[name] + term.detach().double().cpu()
            if i + 1 == accumulate:
                values, stopping = apply(job, progress, sorted(update.groups), totals, signal_number)
    return values, stopping


def apply(
    job: Job, progress: Progress, groups: list[str], totals: Mapping[str, torch.Tensor], signal_number: int
) -> tuple[dict[str, float], bool]:
    """One simultaneous step of some groups on the gradients that backward left behind.

    Returns the loss terms summed over ranks, and whether a signal asked any rank to stop. A NaN or Inf term raises
    DivergedError on all ranks.
    """
    rows = [job.rows[group] for group in groups if group in job.rows]
    dense = [job.dense[group] for group in groups if group in job.dense]
    names, limit = sorted(totals), job.config.optimizer.clip
    said = torch.stack([*(totals[name] for name in names), torch.tensor(float(signal_number))]).to(job.ranks.device)
    # An engine that sums over ranks itself may do so, unless the norm of the sum is needed first.
    reduced = bool(limit) or not all(one.sums_ranks for one in dense)
    arrived = begin_reducing(dense if reduced else [], job.ranks, said)

    def agree() -> tuple[dict[str, float], bool]:
        agreed = arrived().tolist()
        values = dict(zip(names, agreed[:-1], strict=True))
        check_finite(values, job, progress)
        return values, agreed[-1] > 0

    if limit:
        found = agree()
    clip = clip_factor(rows, [t for one in dense for t in one.tensors.values()], limit, job.ranks)
    scale = schedule_scale(job, progress)
    rates = {group: scale * job.method.lr_scale(group) for group in groups}
    for group in groups:
        if group in job.rows:
            job.rows[group].step(rates[group], clip)
    if not limit:
        found = agree()  # it travelled while the rows moved; after an error nothing of them is kept
    for group in groups:
        if group in job.dense:
            job.dense[group].step(rates[group], clip, reduced=reduced)
    return found


def end_epoch(job: Job, progress: Progress, log: "MetricsLog", begun: float) -> None:
    """Validate, remember the best, advance the method's phases, decide whether to go on, and checkpoint."""
    config, epoch = job.config, progress.epoch
    due = bool(config.validate_every) and (epoch % config.validate_every == 0 or epoch == last_epoch(job))
    improved = False
    if due and job.validate is not None:
        found = job.validate()
        improved = found["mrr"] > progress.best_mrr
        if improved:
            progress.best_mrr, progress.best_step = found["mrr"], progress.step
        progress.stale = 0 if improved else progress.stale + 1
        follow_plateau(config.schedule, progress, improved)
        log.validation(found, improved)
    plateau = bool(config.patience) and progress.stale >= config.patience
    if job.method.advance(epoch, config.epochs, plateau):
        job.display.line(f"{job.name}: next phase at epoch {epoch}")
        progress.stale = 0
        if progress.best_step >= 0 and not improved:
            # The phase starts from the best student so far, as the authors' code does.
            load_group(job, "student", job.checkpoints / step_name(progress.best_step))
    elif plateau:
        progress.done = True
    # The loop itself writes after the last epoch.
    ends = progress.done or epoch >= last_epoch(job)
    if not ends and (improved or (config.checkpoint_every and epoch % config.checkpoint_every == 0)):
        progress.seconds = time.monotonic() - begun
        write(job, progress)


def last_epoch(job: Job) -> int:
    """The epoch after which the stage ends at the latest, as of the method's present phase."""
    return job.method.last_epoch(job.config.epochs)


def schedule_scale(job: Job, progress: Progress) -> float:
    """Factor on the learning rate at this step."""
    schedule = job.config.schedule
    share = min(1.0, progress.step / (job.config.epochs * job.scenes.sampler.steps_per_epoch))
    match schedule.name:
        case "linear":
            return 1.0 + (schedule.final - 1.0) * share
        case "cosine":
            return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * share))
        case "plateau":
            return progress.plateau_scale
    return 1.0


def follow_plateau(schedule: ScheduleConfig, progress: Progress, improved: bool) -> None:
    """Lower the learning rate after `patience` validations without a better MRR."""
    progress.plateau_stale = 0 if improved else progress.plateau_stale + 1
    if schedule.name == "plateau" and progress.plateau_stale >= schedule.patience:
        progress.plateau_scale *= schedule.factor
        progress.plateau_stale = 0


def check_finite(values: Mapping[str, float], job: Job, progress: Progress) -> None:
    """Stop all ranks (each sees the same sums) when a term is NaN or Inf."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise DivergedError(
            f"Stage {job.name}, step {progress.step}: loss term {', '.join(broken)} is "
            f"{', '.join(str(values[name]) for name in broken)}. Lower {job.name}.optimizer.lr "
            f"(now {job.config.optimizer.lr}), or set optimizer.clip; the last checkpoint is intact."
        )


# -- what is saved ------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Folder name of the checkpoint of `step`."""
    return f"step_{step:010d}"


def write(job: Job, progress: Progress) -> None:
    """Start a checkpoint of everything the loop needs; the best step and the newest ones are kept."""
    settle(job)  # first, because publishing this one may remove the one that is registered now
    state = State({}, {}, {"digest": job.digest, "progress": vars(progress), "method": job.method.state()})
    state.meta["optimizer_steps"] = {group: one.steps for group, one in job.dense.items()}
    for group, optimizer in job.rows.items():
        table = optimizer.table
        rows = {"weight": table.weight, **optimizer.state}
        state.rows |= {f"{group}.entity.{k}": Rows(v, table.lo, table.total) for k, v in rows.items()}
    for group, dense in job.dense.items():
        kinds = dense.state()
        for name, tensor in dense.tensors.items():
            state.tensors[f"{group}.{name}"] = tensor.detach()
            state.tensors |= {f"{group}.{name}.{k}": v for k, v in kinds.get(name, {}).items()}
    protect = [progress.best_step] if progress.best_step >= 0 else []
    job.writer.save(progress.step, state, protect=protect)


def settle(job: Job) -> None:
    """Wait until the checkpoint that is being written, if any, is published, and register it."""
    path = job.writer.wait()
    if path is not None and job.ranks.first:
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
    job.method.restore(meta["method"])
    progress = Progress(**meta["progress"])
    if not progress.done:
        job.display.line(f"{job.name}: resumed at step {progress.step}")
    return progress


def load_group(job: Job, group: str, path: Path) -> None:
    """Rows, replicated tensors and optimiser state of one group from a checkpoint, in place."""
    settle(job)  # it may be the one that is being written
    steps = read_meta(path)["meta"]["optimizer_steps"][group]
    if group in job.rows:
        optimizer = job.rows[group]
        table = optimizer.table
        optimizer.steps = steps
        for key, value in {"weight": table.weight, **optimizer.state}.items():
            value.copy_(load_rows(path, f"{group}.entity.{key}", table.lo, table.hi))
    stored = load_tensors(path)
    tensors, state = {}, {}
    for name in job.dense[group].tensors:
        prefix = f"{group}.{name}"
        tensors[name] = stored[prefix]
        state[name] = {k.removeprefix(f"{prefix}."): v for k, v in stored.items() if k.startswith(f"{prefix}.")}
    job.dense[group].load(tensors, state, steps)


# -- what is logged -----------------------------------------------------------------------------------------------


class MetricsLog:
    """Means of the loss terms to metrics.jsonl (rank 0) and to tracking, a few times per epoch."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._every = max(1, job.scenes.sampler.steps_per_epoch // LOGS_PER_EPOCH)
        self._timed = 0
        self._sent = sum(job.ranks.traffic.values())
        self._since = time.monotonic()
        self._loss = math.nan
        self._path = job.folder / "metrics.jsonl"
        self._file = None
        if job.ranks.first:
            job.folder.mkdir(parents=True, exist_ok=True)
            keep_until(self._path, progress.step)
            self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def step(self, terms: Mapping[str, float]) -> None:
        """Take note of one step's terms."""
        progress = self._progress
        for name, value in terms.items():
            progress.log_sums[name] = progress.log_sums.get(name, 0.0) + value
        progress.log_count += 1
        self._timed += 1
        if progress.step % self._every:
            return
        means = {f"loss/{name}": total / progress.log_count for name, total in progress.log_sums.items()}
        means["loss"] = self._loss = sum(means.values())
        now = time.monotonic()
        batch = self._job.config.batch_size
        means["triples_per_second"] = self._timed * batch / max(now - self._since, 1e-9)
        sent = sum(self._job.ranks.traffic.values())
        means["sent_bytes_per_step"] = (sent - self._sent) / self._timed
        means["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        self._sent = sent
        means["lr_scale"] = schedule_scale(self._job, progress)
        for name, tensor in self._job.method.evaluators.items():
            means |= {f"evaluator/{name}_{i + 1}": float(x) for i, x in enumerate(tensor.detach().tolist())}
        self._write(means)
        progress.log_sums, progress.log_count = {}, 0
        self._timed, self._since = 0, now

    def validation(self, found: Mapping[str, float], improved: bool) -> None:
        """Log validation metrics and print the epoch's line."""
        progress = self._progress
        self._write({f"valid/{name}": value for name, value in found.items()})
        speed = progress.step * self._job.config.batch_size / max(progress.train_seconds, 1e-9)
        mark = " *" if improved else ""
        epochs = last_epoch(self._job)
        self._job.display.line(
            f"{self._job.name}: epoch {progress.epoch}/{epochs}  loss {self._loss:.4g}  "
            f"valid MRR {found['mrr']:.4f}{mark}  {speed:,.0f} triples/s"
        )
        self._since = time.monotonic()

    def _write(self, values: Mapping[str, float]) -> None:
        progress = self._progress
        if self._file is not None:
            row: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch, **values}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._job.tracking.log(values, progress.step)


def keep_until(path: Path, step: int) -> None:
    """Drop the lines that an interrupted run logged after the checkpoint it goes on from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line cut short by the kill
            continue
        if row["step"] <= step:
            kept.append(line)
    part = path.with_suffix(".jsonl.tmp")
    part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    part.replace(path)


# -- signals ------------------------------------------------------------------------------------------------------


@dataclass
class StopRequest:
    """The signal that asked this process to stop, or 0."""

    signal_number: int = 0


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
    request = StopRequest()
    before: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, before[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    except ValueError:
        # Not the main thread (a Ray actor): its owner decides when to stop.
        before.clear()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
