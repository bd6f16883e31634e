"""The curves of a stage: means of its loss terms a few times per epoch, its validations, and what its method adds."""

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distkgd.common.energy import Meter
from distkgd.common.paths import naming
from distkgd.common.text import duration_text
from distkgd.training.job import Job, Progress, schedule_scale

LOGS_PER_EPOCH = 5
SILENCE_SECONDS = 30.0  # of a stage; then a line is due that no validation brings


class MetricsLog:
    """Means of the loss terms to metrics.jsonl (rank 0) and to tracking, a few times per epoch."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._every = max(1, job.input_builder.sampler.steps_per_epoch // LOGS_PER_EPOCH)
        self._timed = 0
        self._sent = sum(job.ranks.traffic.values())
        self._since = self._begun = self._told = time.monotonic()
        self._first_step = progress.step
        self._loss = math.nan
        # Of a stage that goes on, without knowing what it has drawn so far, nothing is known.
        known = job.ranks.first and (progress.step == 0 or progress.joules is not None)
        self._drawn, self._meter = progress.joules or 0.0, Meter() if known else None
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

    @property
    def due(self) -> bool:
        """Whether a row is written after this step."""
        return self._progress.step % self._every == 0

    def steps(self, found: Sequence[Mapping[str, float]]) -> None:
        """Take note of the terms of the latest steps: of all up to the present one, when a row is due."""
        if not found:
            return
        progress = self._progress
        for terms in found:
            for name, value in terms.items():
                progress.log_sums[name] = progress.log_sums.get(name, 0.0) + value
        progress.log_count += len(found)
        self._timed += len(found)
        if not self.due:
            return
        sums = {name if "/" in name else f"loss/{name}": total for name, total in progress.log_sums.items()}
        means = {name: total / progress.log_count for name, total in sums.items()}
        means["loss"] = self._loss = sum(mean for name, mean in means.items() if name.startswith("loss/"))
        now = time.monotonic()
        batch = self._job.config.batch_size
        means["triples_per_second"] = self._timed * batch / max(now - self._since, 1e-9)
        sent = sum(self._job.ranks.traffic.values())
        means["sent_bytes_per_step"] = (sent - self._sent) / self._timed
        means["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        self._sent = sent
        means["lr_scale"] = schedule_scale(self._job, progress)
        for name, shown in self._job.method.logged(progress.step).items():
            if not isinstance(shown, Tensor):
                means[name] = shown
            elif shown.dim() == 1:  # a table is too long for a log
                means |= {f"evaluator/{name}_{i + 1}": float(x) for i, x in enumerate(shown.detach().tolist())}
        self._write(means)
        progress.log_sums, progress.log_count = {}, 0
        self._timed, self._since = 0, now
        if now > self._told + SILENCE_SECONDS:
            self._tell()

    def validation(self, found: Mapping[str, float], improved: bool) -> None:
        """Log validation metrics and print the epoch's line."""
        self._write({f"valid/{name}": value for name, value in found.items()})
        self._tell(f"valid MRR {found['mrr']:.4f}{' *' if improved else ''}  ")
        self._since = time.monotonic()

    def _tell(self, valid: str = "") -> None:
        """A line: how far the stage is, its loss and speed, and about how long it and all later stages will take."""
        job, progress, now = self._job, self._progress, time.monotonic()
        per_epoch, epochs = job.input_builder.sampler.steps_per_epoch, job.phase.last
        done = progress.step / per_epoch
        speed = progress.step * job.config.batch_size / max(progress.train_seconds, 1e-9)
        pace = (now - self._begun) / max(progress.step - self._first_step, 1) * per_epoch  # seconds an epoch
        left = pace * max(epochs - done, 0.0)
        later = f", {duration_text(left + pace * job.later_epochs)} all stages" if job.later_epochs else ""
        self._told = now
        job.display.line(
            f"{job.name}{job.place}: epoch {f'{done:.1f}'.removesuffix('.0')}/{epochs}  loss {self._loss:.4g}  "
            f"{valid}{speed:,.0f} triples/s  about {duration_text(left)} left{later}"
        )

    def _write(self, values: Mapping[str, float]) -> None:
        progress = self._progress
        if self._meter is not None:
            joules = self._meter.joules()
            progress.joules = None if joules is None else self._drawn + joules
        if self._file is not None:
            row: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch, **values}
            with naming(self._path):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
        self._job.tracking.log(values, progress.step)


def keep_until(path: Path, step: int) -> None:
    """Drop the lines that an interrupted run logged after the checkpoint it goes on from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            logged = int(json.loads(line)["step"])
        except (ValueError, LookupError, TypeError, RecursionError):  # a line cut short by the kill
            continue
        if logged <= step:
            kept.append(line)
    part = path.with_suffix(".jsonl.tmp")
    part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    part.replace(path)
