"""A sweep in MLflow: one parent run, a child for each trial and teacher, all written by the process that drives it.

Trials run side by side and do not know of MLflow, so that no database is written by two at once.
"""

import json
from pathlib import Path

from distkgd.common.files import write_atomic
from distkgd.pipeline.sweep.trials import Trial
from distkgd.pipeline.sweep.worker import Record, scored_result
from distkgd.tracking.tracker import StageTracking, Status, Tracking

STATUS: dict[str, Status] = {"finished": "FINISHED", "stopped": "KILLED", "diverged": "FAILED", "failed": "FAILED"}


class Children:
    """The trials' runs; those that were closed by an earlier call stay as they are."""

    def __init__(self, tracking: Tracking, out: Path) -> None:
        self._tracking = tracking
        self._out = out
        self._path = out / "tracked.json"
        self._closed: list[str] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else []
        self._open: dict[str, StageTracking] = {}
        self._epochs: dict[str, int] = {}

    def tell(self, trial: Trial, record: Record) -> None:
        """Send what is new of a trial's curve; opens its run."""
        key = trial.digest
        if key in self._closed:
            return
        if key not in self._open:
            tags = {"group": trial.group, "row": trial.row, "seed": str(trial.seed), "kind": trial.kind}
            tags |= {"folder": str(trial.folder(self._out))}
            params = {"overrides": trial.overrides, **trial.scored.model_dump(mode="json")}
            self._open[key] = self._tracking.stage(trial.name, params, tags)
        for epoch, mrr in record.curve:
            if epoch > self._epochs.get(key, 0):
                self._open[key].log({"valid_mrr": mrr}, epoch)
                self._epochs[key] = epoch

    def close(self, trial: Trial, record: Record) -> None:
        """Send the rest of a trial that is over: its losses, and how it ended."""
        key = trial.digest
        if key in self._closed:
            return
        self.tell(trial, record)
        child = self._open.pop(key)
        folder = trial.folder(self._out)
        curves = folder / "stages" / trial.stage / "metrics.jsonl"
        for line in curves.read_text(encoding="utf-8").splitlines() if curves.exists() else ():
            row = json.loads(line)
            child.log({name: value for name, value in row.items() if name not in ("step", "epoch")}, row["step"])
        found = scored_result(trial, self._out).final_metrics() if record.status == "finished" else {}
        child.finish(STATUS[record.status], None, found)
        if record.status != "failed":  # which may be tried again
            self._closed.append(key)
            write_atomic(self._path, json.dumps(self._closed) + "\n")
