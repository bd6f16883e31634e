"""Ray Tune runs the trials: one process each, stopped by its scheduler, suggested by its search algorithm.

Tune decides; what was trained is remembered in the trials' own folders. A resumed sweep therefore restores none of
Tune's pickles: its trials report what they have reported before, and go on from their checkpoints.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from distkgd.errors import ConfigError, DistkgdError, Stopped
from distkgd.pipeline.ray.worker_group import Slot
from distkgd.pipeline.sweep.config import AshaConfig, Domain
from distkgd.pipeline.sweep.search import Arm
from distkgd.pipeline.sweep.trials import Trial
from distkgd.pipeline.sweep.worker import Call, Record, run_trial

METRIC, TIME = "valid_mrr", "epoch"
ROOM_SECONDS = 900.0  # an autoscaler needs minutes for a node
ASK_SECONDS = 5.0
TRIES = 2  # more for a trial whose process died
# ASHA would stop a trial at `max_t` before it has saved its model; trials end by themselves.
NEVER = 10**6

Find = Callable[[Mapping[str, Any]], Trial]  # a trial of Tune's, by its config
Notice = Callable[[str, Trial, Record], None]  # ("begun", "told" or "over", which, how it stands)


class Room:
    """Whether some node could hold a trial, free or not. One that never comes is not waited for without end."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        self._slot = Slot(resources["cpu"], resources.get("gpu", 0.0))
        self._asked_at = -math.inf
        self._seen_at = time.monotonic()

    def check(self) -> None:
        """DistkgdError once there has been no such node for ROOM_SECONDS."""
        now = time.monotonic()
        if now < self._asked_at + ASK_SECONDS:
            return
        self._asked_at = now
        nodes: Any = ray.nodes  # which has no types
        if self._slot.count(nodes()):
            self._seen_at = now
        elif now > self._seen_at + ROOM_SECONDS:
            raise DistkgdError(
                f"for {ROOM_SECONDS:g} s no node has had {self._slot.bundle} for a trial; look at `ray status`, or ask "
                "for less with --cpus-per-trial and --gpus-per-trial; --resume goes on."
            )


def find_in(trials: Mapping[str, Trial], config: Mapping[str, Any]) -> Trial:
    """The trial of a table."""
    return trials[config["trial"]]


def find_drawn(arm: Arm, config: Mapping[str, Any]) -> Trial:
    """The trial of a search."""
    return arm.trial(config)


def _work(config: dict[str, Any], find: Find, call: Call) -> None:
    """What a process of Tune's does."""
    stopped: list[SystemExit] = []

    def report(mrr: float, epoch: int) -> bool:
        try:
            tune.report({METRIC: mrr, TIME: epoch})
        except SystemExit as error:  # so Tune tells a thread that its trial was stopped
            stopped.append(error)
        return not stopped

    # A search may draw what it has drawn before: that is another trial to Tune, which wants the curve once more.
    attempt = f"{call.attempt}.{tune.get_context().get_trial_id()}"
    run_trial(find(config), replace(call, attempt=attempt), report)
    if stopped:
        raise stopped[0]


class _Watch(tune.Callback):
    """Tells of the trials, and notes which the scheduler has stopped."""

    def __init__(self, find: Find, call: Call, notice: Notice, room: Room) -> None:
        self._find = find
        self._call = call
        self._notice = notice
        self._room = room
        self.too_long: DistkgdError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; what we tell others of cannot be

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        try:
            self._room.check()
        except DistkgdError as error:
            self.too_long = error
            raise

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell("begun", trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell("told", trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._find(trial.config)
        folder = ours.folder(self._call.out)
        record = Record.read(folder)
        if record.status == "running":
            record.end(folder, "stopped")
        self._notice("over", ours, record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._find(trial.config)
        folder = ours.folder(self._call.out)
        folder.mkdir(parents=True, exist_ok=True)
        record = Record.read(folder)
        lines = [line for line in str(trial.get_error() or "").splitlines() if line.strip()]
        record.end(folder, "failed", lines[-1].strip() if lines else "its process died")
        self._notice("over", ours, record)

    def _tell(self, what: str, trial: Any) -> None:
        ours = self._find(trial.config)
        self._notice(what, ours, Record.read(ours.folder(self._call.out)))


def run_table(trials: Sequence[Trial], call: Call, resources: Mapping[str, float], notice: Notice) -> None:
    """Run every one of some trials."""
    if trials:
        by_name = {trial.digest: trial for trial in trials}
        space = {"trial": tune.grid_search(list(by_name))}
        _fit(partial(find_in, by_name), space, call, resources, notice, tune.TuneConfig(num_samples=1))


def run_arm(
    arm: Arm,
    samples: int,
    search: str,
    scheduler: AshaConfig,
    call: Call,
    resources: Mapping[str, float],
    notice: Notice,
    before: Sequence[Trial],
) -> None:
    """Run the trials of one side of a search: `samples` draws of each point of its grids.

    before: the trials of an earlier call. They come again, first, and report what they have reported: that is how the
    scheduler and the search algorithm learn of them.
    """
    space = {key: to_tune(domain) for key, domain in arm.drawn.items()}
    algorithm = _optuna(space, arm.seed, before) if search == "optuna" else None
    config = tune.TuneConfig(
        metric=METRIC,
        mode="max",
        num_samples=max(samples, len(before)) if algorithm else samples,
        search_alg=algorithm or tune.search.BasicVariantGenerator(random_state=arm.seed),
        scheduler=_scheduler(scheduler),
    )
    # Optuna has the space already. The other draws the same numbers as before, in the same order.
    _fit(partial(find_drawn, arm), {} if algorithm else space, call, resources, notice, config)


def to_tune(domain: Domain) -> Any:
    """Tune's word for a domain."""
    if domain.grid is not None:
        return tune.grid_search(domain.grid)
    if domain.choice is not None:
        return tune.choice(domain.choice)
    if domain.uniform is not None:
        return tune.uniform(*domain.uniform)
    assert domain.loguniform is not None
    return tune.loguniform(*domain.loguniform)


def _scheduler(config: AshaConfig) -> TrialScheduler | None:
    if config.name == "none":
        return None
    return ASHAScheduler(time_attr=TIME, max_t=NEVER, grace_period=config.grace, reduction_factor=config.reduction)


def _optuna(space: Mapping[str, Any], seed: int, before: Sequence[Trial]) -> Any:
    """Optuna's search (TPE), asked for some trials first."""
    try:
        from ray.tune.search.optuna import OptunaSearch  # noqa: PLC0415

        points = [{key: trial.overrides[key] for key in space} for trial in before]
        import_module("optuna").logging.set_verbosity(logging.WARNING)
        spaces = OptunaSearch.convert_search_space(dict(space))
        # Points that are given draw nothing: with the same seed the others would be drawn again.
        return OptunaSearch(spaces, metric=METRIC, mode="max", seed=seed + len(points), points_to_evaluate=points)
    except (ImportError, AssertionError) as error:
        raise ConfigError(f"search: optuna needs Optuna ({error}); pip install 'distkgd[ray]'.") from None


def _fit(
    find: Find,
    space: Mapping[str, Any],
    call: Call,
    resources: Mapping[str, float],
    notice: Notice,
    config: "tune.TuneConfig",
) -> None:
    trainable = tune.with_resources(tune.with_parameters(_work, find=find, call=call), dict(resources))
    config.trial_dirname_creator = lambda trial: str(trial.trial_id)
    watch = _Watch(find, call, notice, Room(resources))
    number = len(list((call.out / "tune").glob("*"))) if (call.out / "tune").is_dir() else 0
    run = tune.RunConfig(
        name=f"{number:03d}",
        storage_path=str(call.out / "tune"),
        failure_config=tune.FailureConfig(max_failures=TRIES),
        callbacks=[watch],
        verbose=0,
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses files that we have it not write
    try:
        with _stops() as stopped:
            results = tune.Tuner(trainable, param_space=dict(space), tune_config=config, run_config=run).fit()
    except Exception:
        if watch.too_long is not None:  # which Tune has wrapped
            raise watch.too_long from None
        raise
    if stopped:
        raise Stopped(stopped[0], f"with {results.num_terminated} trials over in this call")


@contextmanager
def _stops() -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM and pass it on in the form in which Tune ends in order; a second acts as usual.

    Tune's own handler of SIGINT, which says nothing of it to its caller, is off (`ENVIRONMENT`).
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        signal.signal(number, before[signal.Signals(number)])
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Tune listens
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_tasks(
    function: Callable[[Trial, Call], None], trials: Sequence[Trial], call: Call, resources: Mapping[str, float]
) -> Iterator[Trial]:
    """`function` of each trial as a task; yields those that are done as they come.

    Raises DistkgdError when one fails, after the others are cancelled.
    """
    task: Any = ray.remote(function)
    task = task.options(num_cpus=resources["cpu"], num_gpus=resources.get("gpu", 0), max_retries=TRIES)
    waiting = {task.remote(trial, call): trial for trial in trials}
    room = Room(resources)
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=1.0)
            room.check()
            for one in done:
                try:
                    ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    told = str(cause) if isinstance(cause, DistkgdError) else str(error).strip().splitlines()[-1]
                    raise DistkgdError(f"{waiting[one].name}: {told}") from None
                except ray.exceptions.RayError as error:
                    raise DistkgdError(f"{waiting[one].name}: {error}") from None
                yield waiting.pop(one)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "while its teachers were trained") from None
    finally:
        for one in waiting:
            ray.cancel(one)
