"""A sweep from its file to its table: teachers first, each once, then the trials, then what came of them.

OUT/
  sweep.yaml                     the sweep and its base
  trials/  teachers/             a run folder each, named by a digest of what it trains
  (`distkgd.pipeline.sweep.trials`) tune/                          Ray Tune's own notes, one folder per call; nothing is
  read from them report.json  report.md  chart.svg  chart.png
  mlflow.json                    run ids: one parent, one child per trial
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.paths import AnyPath, check_folder
from distkgd.common.provenance import git_sha
from distkgd.config.tree import merge
from distkgd.data import Graph, anchored, load_graph
from distkgd.distributed.ownership import owned, refuse_owned
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import closing
from distkgd.pipeline.ray.session import ray_session
from distkgd.pipeline.ray.worker_group import Slot
from distkgd.pipeline.stages import check_plan
from distkgd.pipeline.sweep.chart import check_installed
from distkgd.pipeline.sweep.config import SweepConfig, Tree
from distkgd.pipeline.sweep.report import make_report, write_files
from distkgd.pipeline.sweep.search import Arm, budgets, note_draw, read_draws, search_arms
from distkgd.pipeline.sweep.tracking import Children
from distkgd.pipeline.sweep.trials import Trial, table_trials
from distkgd.pipeline.sweep.worker import Call, Record, rank_test, scored_result, train_teacher
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.tracking.tracker import Tracking

# Read by Ray Tune when it is imported or started; see `session` for Ray's own.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",  # of this process, which trains nothing
}

FILES = ("report.json", "report.md", "chart.svg", "chart.png")  # of a finished sweep, for MLflow


@dataclass(frozen=True)
class Slots:
    """What Ray is to give: its address (None: started here), and CPUs and GPUs of each trial."""

    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's words."""
        return {"cpu": self.cpus} | ({"gpu": self.gpus} if self.gpus else {})


def run_sweep(
    sweep: SweepConfig, base: Tree, out: AnyPath, *, resume: bool, slots: Slots, display: Display
) -> dict[str, Any]:
    """Run every trial of a sweep that is not over, write the report, and return it.

    Raises ConfigError before anything is trained, also when `out` already holds a sweep and resume is off; DistkgdError
    in the end when trials have failed; Stopped after a signal.
    """
    out, base = check_folder(out).resolve(), found_from_anywhere(base)
    refuse_owned(out)
    graphs = _Graphs()
    trials = table_trials(sweep, base, graphs.sha256) if sweep.space is None else []
    arms = search_arms(sweep, base, graphs.sha256) if sweep.space is not None else []
    warned: list[Graph] = []
    for trial in [*trials, *(arm.trial(arm.first) for arm in arms)]:
        graph = graphs.get(trial.config.data)
        check_plan(trial.config, trial.plan(trial.config), graph, 1)
        if sweep.space is not None and not len(graph.valid):
            raise ConfigError(f"{graph.name} has no valid triples to choose the best trials by; give rows or a grid.")
        for warning in graph.warnings if graph not in warned else ():
            display.warn(f"{graph.name}: {warning}")
        warned.append(graph)
    if base.get("storage"):
        raise ConfigError("a sweep's trials share its folder, on a disk that all nodes see; leave storage out.")
    if (out / "sweep.yaml").exists() and not resume:
        raise ConfigError(f"{out} already holds a sweep; add --resume to go on with it, or choose another --out.")
    with owned(out, Ranks(), display.line):
        plain = {"sweep": sweep.model_dump(mode="json", exclude_none=True), "base": base}
        write_atomic(out / "sweep.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        stops = sweep.scheduler.name != "none"
        call = Call(out, os.urandom(8).hex(), slots.cpus, gpus=slots.gpus > 0, stops=stops)
        config = parse_config(base, sweep.name)
        track = config.mlflow
        tracking = open_tracking(run_folder=out, name=sweep.name, uri=track.uri, enabled=track.enabled, active=True)
        tracking.start(plain, {"git_sha": git_sha(), "kind": "sweep"}, graphs.get(config.data).summary())
        with closing(tracking, out, FILES), _ray(slots, display):
            driver = _Driver(sweep, call, slots, display, tracking, graphs)
            report = driver.table(trials) if sweep.space is None else driver.search(arms)
            write_files(out, report, display)
    failed = [trial for trial in report["trials"] if trial["status"] == "failed"]
    if failed:
        told = "; ".join(f"{trial['name']}: {trial['error']}" for trial in failed[:3])
        raise DistkgdError(
            f"{len(failed)} of {len(report['trials'])} trials failed (--resume tries them again): {told}"
        )
    return report


def found_from_anywhere(base: Tree) -> Tree:
    """`base` with the paths made absolute: trials run in other working directories."""
    found = dict(base)
    if isinstance(found.get("data"), str):
        found["data"] = anchored(found["data"])
    if isinstance(found.get("teacher"), str) and Path(found["teacher"]).is_dir():
        found["teacher"] = str(Path(found["teacher"]).resolve())
    if isinstance(found.get("teachers"), Mapping):
        found["teachers"] = {
            name: str(Path(one).resolve()) if isinstance(one, str) and Path(one).is_dir() else one
            for name, one in found["teachers"].items()
        }
    student = found.get("student")
    distill = student.get("distill") if isinstance(student, Mapping) else None
    if isinstance(distill, Mapping) and isinstance(distill.get("labels"), str):
        found = merge(found, {"student": {"distill": {"labels": str(Path(distill["labels"]).resolve())}}})
    return found


def table_of(sweep: SweepConfig, base: Tree) -> list[Trial]:
    """The trials of a sweep of rows or a grid, on the data that are here now."""
    return table_trials(sweep, base, _Graphs().sha256)


class _Graphs:
    """The data sets of a sweep, each read once."""

    def __init__(self) -> None:
        self.get: Callable[[str], Graph] = cache(load_graph)

    def sha256(self, data: str) -> str:
        return self.get(data).identity


@contextmanager
def _ray(slots: Slots, display: Display) -> Iterator[None]:
    """Ray, started on this machine, or joined at an address or as RAY_ADDRESS says."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    check_installed()
    with ray_session(slots.address, quiet=True) as session:
        have = session.ray.cluster_resources()
        for what, need in (("CPU", slots.cpus), ("GPU", slots.gpus)) if session.local else ():
            if need > have.get(what, 0):
                raise ConfigError(f"A trial is to have {need} {what}s and Ray has {have.get(what, 0):g}; ask for less.")
        at_once = Slot(slots.cpus, slots.gpus).count(session.ray.nodes())
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        display.line(f"Ray: {cpus:g} CPUs, {gpus:g} GPUs now, up to {at_once} trials at once")
        yield


class _Driver:
    """Starts what is not over, tells the terminal and MLflow, and gathers."""

    def __init__(
        self, sweep: SweepConfig, call: Call, slots: Slots, display: Display, tracking: Tracking, graphs: _Graphs
    ) -> None:
        from distkgd.pipeline.sweep import tune  # noqa: PLC0415 - which imports ray

        self._tune = tune
        self._sweep = sweep
        self._call = call
        self._resources = slots.resources
        self._display = display
        self._graphs = graphs
        self._children = Children(tracking, call.out)
        self._draws = call.out / "draws.jsonl"

    def table(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """Run rows, and report on them."""
        self._run(trials)
        return make_report(self._sweep, trials, self._call.out)

    def search(self, arms: Sequence[Arm]) -> dict[str, Any]:
        """Run both arms of a search, then the best of each at every seed, which alone read test, and report on them."""
        sweep, tried, best = self._sweep, [], []
        for arm, samples in zip(arms, budgets(sweep, arms), strict=True):
            if arm.shares_teachers:
                self._teach([arm.trial(arm.first)])
            before = read_draws(self._draws, arm)
            over = [trial for trial in before if self._record(trial).is_over(self._call.stops)]
            if len(over) < len(before) or len(over) < samples * arm.num_points:
                how = (sweep.search, sweep.scheduler, self._call, self._resources, self._notice)
                self._tune.run_arm(arm, samples, *how, before)
            done = read_draws(self._draws, arm)
            finished = [trial for trial in done if self._record(trial).status == "finished"]
            if not finished:
                raise DistkgdError(f"No trial of arm {arm.name} has finished; see {self._call.out / 'trials'}.")
            tried += done
            best.append(max(finished, key=lambda trial: scored_result(trial, self._call.out).mrr("valid") or 0.0))
        winners = [at_seed(trial, seed) for trial in best for seed in sweep.seeds]
        self._run(winners)
        unranked = [trial for trial in winners if self._record(trial).status == "finished"]
        unranked = [trial for trial in unranked if len(self._graphs.get(trial.config.data).test)]
        unranked = [trial for trial in unranked if not (trial.folder(self._call.out) / "test.json").exists()]
        for trial in self._tune.run_tasks(rank_test, unranked, self._call, self._resources):
            self._display.line(f"{trial.name}: ranked on test")
        return make_report(sweep, winners, self._call.out, tried)

    def _run(self, trials: Sequence[Trial]) -> None:
        """Train the teachers, then the trials that are not over."""
        waiting = [trial for trial in trials if not self._record(trial).is_over(stops=False)]
        for trial in trials:
            if trial not in waiting:
                self._children.close(trial, self._record(trial))
        done = len(trials) - len(waiting)
        self._display.line(f"{len(trials)} trials" + (f", {done} of them over before" if done else ""))
        self._teach(waiting)
        self._tune.run_table(waiting, self._call, self._resources, self._notice)

    def _teach(self, trials: Sequence[Trial]) -> None:
        teachers = {one.digest: one for trial in trials for one in trial.teachers().values()}
        missing = [one for one in teachers.values() if self._record(one).status != "finished"]
        if missing:
            self._display.line(f"{len(missing)} teachers for {len(trials)} trials")
        for one in self._tune.run_tasks(train_teacher, missing, self._call, self._resources):
            self._notice("over", one, self._record(one))
        for one in teachers.values():
            self._children.close(one, self._record(one))

    def _record(self, trial: Trial) -> Record:
        return Record.read(trial.folder(self._call.out))

    def _notice(self, what: str, trial: Trial, record: Record) -> None:
        if what == "begun" and self._sweep.space is not None:
            note_draw(self._draws, trial.kind, trial.overrides)
        if what == "over":
            self._children.close(trial, record)
            curve = f", epoch {record.epoch}, valid MRR {record.curve[-1][1]:.4f}" if record.curve else ""
            self._display.line(f"{trial.name}: {record.status}{curve}" + (f" ({record.error})" if record.error else ""))
        else:
            self._children.tell(trial, record)


def at_seed(trial: Trial, seed: int) -> Trial:
    """A trial once more, at another seed."""
    config = trial.config.model_copy(update={"seed": seed})
    return replace(trial, config=config, name=f"{trial.name}, seed {seed}")
