"""What runs in the processes of a sweep: one plan in a folder of its own, told about epoch by epoch.

trial.json beside a trial's run holds what the sweep has to remember of it:
  status    running, finished, stopped (by the scheduler), diverged, or failed
  curve     [[epoch, best validation MRR so far], …] of the scored stage
  attempt   the call of the sweep, and Tune's trial in it, that has last worked on it
  starts, ends    when it was begun, and came to an end, each time; pid: of the process that began it last
  error     why it diverged or failed
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.locks import SECONDS, held
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks, join_ranks
from distkgd.errors import ConfigError, DistkgdError, DivergedError, Stopped
from distkgd.evaluation.model_metrics import evaluate_model
from distkgd.kernels.memory import keep_freed_memory
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.plan import checked_plan, run_plan
from distkgd.pipeline.sweep.trials import Trial
from distkgd.reporting.run_report import REPORT, read_report
from distkgd.training.job import Watch

TEACHER_SECONDS = 24 * 3600.0  # another trial may be training the teacher
Report = Callable[[float, int], bool]  # (best MRR so far, epoch) -> whether to go on


@dataclass
class Record:
    """trial.json; see the module's docstring."""

    status: str = "running"
    attempt: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    pid: int = 0
    error: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Of a trial's folder; a fresh one where there is none."""
        try:
            return cls(**json.loads((folder / "trial.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{folder / 'trial.json'} is damaged ({error}); remove {folder}.") from None

    def write(self, folder: Path) -> None:
        """Into a trial's folder."""
        write_atomic(folder / "trial.json", json.dumps(asdict(self), indent=2) + "\n")

    def is_over(self, stops: bool) -> bool:
        """Whether another start would change nothing; a sweep without a scheduler goes on with what one has stopped."""
        return self.status in ("finished", "diverged") or (self.status == "stopped" and stops)

    @property
    def epoch(self) -> int:
        """The last one reported, or 0."""
        return self.curve[-1][0] if self.curve else 0

    def begin(self, folder: Path) -> None:
        """Note a start."""
        self.status, self.error, self.pid = "running", None, os.getpid()
        self.starts.append(_now())
        self.write(folder)

    def end(self, folder: Path, status: str, error: str | None = None) -> None:
        """Note an end."""
        self.status, self.error = status, error
        self.ends.append(_now())
        self.write(folder)


@dataclass(frozen=True)
class Call:
    """One call of a sweep.

    out: its folder. attempt: tells it from other calls, and in a process of Tune's from its other trials.
    threads: of a process. gpus: whether a process has any.
    stops: whether there is a scheduler that stops trials.
    """

    out: Path
    attempt: str
    threads: int
    gpus: bool
    stops: bool

    def ranks(self, device: str) -> Ranks:
        """A process's world of one; `device` auto is a GPU only where a trial was given one."""
        return join_ranks("cpu" if device == "auto" and not self.gpus else device)


def run_trial(trial: Trial, call: Call, report: Report) -> None:
    """Train what a trial still lacks, and report its curve.

    In each call the curve is reported from its first epoch, so that the scheduler knows what it knew before; no epoch
    is reported twice. A trial that diverged has MRR 0. Raises nothing that would come again in another try.
    """
    folder = trial.folder(call.out)
    with held(folder / "claim"):
        record = Record.read(folder)
        curve = record.curve if record.attempt != call.attempt else []
        record.attempt = call.attempt
        record.write(folder)
        made: StageResult | None = None
        if not all(report(mrr, epoch) for epoch, mrr in curve):
            return
        if not record.is_over(call.stops):
            record.begin(folder)
            try:
                for teacher in trial.teachers().values():
                    train_teacher(teacher, call, TEACHER_SECONDS)
                made = _train(trial, call, _watcher(trial, record, folder, report))
                record.end(folder, "finished")
            except Stopped:
                return  # whoever has stopped it knows why
            except DivergedError as error:
                record.end(folder, "diverged", str(error))
            except DistkgdError as error:
                record.end(folder, "failed", str(error))
        if record.status != "finished":
            report(0.0, record.epoch + 1)
        elif not record.curve:
            mrr = (made or scored_result(trial, call.out)).mrr("valid")
            if mrr is not None:
                report(mrr, trial.scored.epochs)


def train_teacher(trial: Trial, call: Call, wait: float = SECONDS) -> None:
    """Train a teacher unless it is finished; whoever comes second waits for whoever is training it.

    Raises ConfigError when that takes longer than `wait` seconds.
    """
    folder = trial.folder(call.out)
    if (folder / REPORT).exists():
        return
    with held(folder / "claim", wait):
        if (folder / REPORT).exists():
            return
        record = Record.read(folder)
        record.begin(folder)
        _train(trial, call, _watcher(trial, record, folder, lambda _mrr, _epoch: True))
        record.end(folder, "finished")


def _watcher(trial: Trial, record: Record, folder: Path, report: Report) -> Watch:
    def watch(stage: str, epoch: int, best: float) -> bool:
        if stage != trial.stage or epoch <= record.epoch:
            return True  # of another stage, or again after a restart
        record.curve.append((epoch, best))
        record.write(folder)
        return report(best, epoch)

    return watch


def _train(trial: Trial, call: Call, watch: Watch) -> StageResult:
    keep_freed_memory()
    torch.set_num_threads(trial.config.threads or call.threads)
    config = trial.with_teachers(call.out)
    graph = load_graph(config.data)
    if graph.identity != trial.data:
        raise ConfigError(f"The data {config.data} is not what it was when the sweep began, or not on every machine.")
    ranks, folder = call.ranks(config.device), trial.folder(call.out)
    stages = checked_plan(config, graph, folder, ranks.world, trial.plan(config)).stages
    report = run_plan(config, graph, ranks, folder, resume=True, display=Display(False), stages=stages, watch=watch)
    return next(stage for stage in report.stages if stage.name == trial.stage)


def scored_result(trial: Trial, out: Path) -> StageResult:
    """Of the stage that a finished trial is about, as the process that trained it has left it."""
    stages = {stage.name: stage for stage in read_report(trial.folder(out)).stages}
    return stages[trial.stage]


def rank_test(trial: Trial, call: Call) -> None:
    """Write test.json, the test metrics of a finished trial whose plan has left the test split unread."""
    path = trial.folder(call.out) / "test.json"
    if path.exists():
        return
    config = trial.config
    torch.set_num_threads(config.threads or call.threads)
    model, ranks = trial.folder(call.out) / "stages" / trial.stage, call.ranks(config.device)
    found = evaluate_model(model, ranks, split="test", source=config.data, ties=config.ties, filter_=config.filter)
    write_atomic(path, json.dumps(found["overall"], indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
