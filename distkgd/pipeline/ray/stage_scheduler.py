"""The stages of a plan on their way: which begin, on how many workers, and what becomes of each."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

from distkgd.common.text import fixed
from distkgd.errors import DistkgdError, Stopped
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.overlap import has_rows
from distkgd.pipeline.plan import finished_result
from distkgd.pipeline.ray.schedule import ASIDE, Timeline, allot, early, ready
from distkgd.pipeline.ray.session import import_ray
from distkgd.pipeline.ray.worker import Place, Surroundings, Work
from distkgd.pipeline.ray.worker_group import Slot, WorkerGroup
from distkgd.pipeline.stages import Plan, Stage, check_stage
from distkgd.pipeline.storage import open_storage

POLL_SECONDS = 0.2


class StageError(DistkgdError):
    """A stage that could not be finished, and why."""


@dataclass(frozen=True)
class Options:
    """How a plan is spread over a cluster.

    workers: of each stage, 0: what is free, shared by the stages that can run. cpus: of each worker.
    retries: how often a stage, and the coordinator, is started again after a death.
    wait_seconds: for room for all workers of a stage, before it goes on with fewer.
    """

    workers: int = 0
    cpus: int = 1
    retries: int = 3
    wait_seconds: float = 60.0


@dataclass(frozen=True)
class Request:
    """What the coordinator is asked for.

    config: the resolved run. uri: MLflow's store. launcher: tells this launch from all others, so that a coordinator
    that was started again knows the folder as its own. grows: whether the cluster may get nodes that it does not have.
    free: stages whose batches become smaller where the data does not fill them.
    """

    config: Mapping[str, Any]
    folder: Path
    uri: str | None
    resume: bool
    launcher: str
    options: Options
    surroundings: Surroundings
    grows: bool = False
    free: frozenset[str] = frozenset()


class StageScheduler:
    """The stages of a plan on their way. Every running stage has a thread, which waits for its gang.

    slot: what one worker takes. stop: set when all are to end. say: takes lines for the user.
    """

    def __init__(
        self,
        request: Request,
        plan: Plan,
        device: str,
        slot: Slot,
        stop: Event,
        say: Callable[[str], None],
    ) -> None:
        self._request = request
        self._plan = plan
        self._stages = plan.stages
        self._device = device
        self._slot = slot
        self._stop = stop
        self._say = say
        self._ray = import_ray()
        self._lock = Lock()
        self._taken: dict[str, int] = {}  # workers of the stages that are running
        self._storage = open_storage(plan.config, plan.folder)
        self._aside: set[str] = set()  # stages that do not begin again before their teachers are finished
        self._too_small = -1  # the cluster's slots when there was no room for a whole gang
        self.timeline = Timeline(request.folder)

    def run(self, signal_number: Callable[[], int]) -> list[StageResult]:
        """The results of all stages, in the order of the plan. signal_number: -> what asked to stop."""
        results: dict[str, StageResult] = {}
        running: dict[Future[StageResult | None], str] = {}
        if self._storage is not None:
            self._storage.keep_ids()
        with ThreadPoolExecutor(len(self._stages)) as threads:
            try:
                while len(results) < len(self._stages):
                    if self._stop.is_set():
                        raise Stopped(signal_number(), "between two stages")
                    for stage, size in self._next(results, list(running.values())):
                        result = finished_result(self._plan, stage)
                        if result is not None:
                            self._say(f"{stage.name}: finished before, valid MRR {fixed(result.mrr('valid'), 4)}")
                            results[stage.name] = result
                            continue
                        self._taken[stage.name] = size
                        running[threads.submit(self._train, stage, size, signal_number)] = stage.name
                    for future in wait(running, POLL_SECONDS, FIRST_COMPLETED)[0]:
                        name = running.pop(future)
                        del self._taken[name]
                        result = future.result()
                        if result is None:
                            self._aside.add(name)
                        else:
                            results[name] = result
            except BaseException:
                self._stop.set()  # the others write a checkpoint and end
                raise
        return [results[stage.name] for stage in self._stages]

    def _next(self, finished: Collection[str], running: list[str]) -> list[tuple[Stage, int]]:
        """Stages that begin now, and on how many workers."""
        stages = ready(self._stages, finished, [*finished, *running])
        if not stages:
            begun = [*running, *self._aside]
            stages = early(self._stages, finished, begun, partial(has_rows, self._request.folder))
        total, wanted = self._slots_and_wanted()
        sizes = allot(len(stages), max(0, total - sum(self._taken.values())), wanted, not running)
        if self._storage is not None:
            most = self._slot.largest(self._ray.nodes())
            sizes = [min(size, most) if most else size for size in sizes]
        return [(stage, self._permitted(stage, size)) for stage, size in zip(stages, sizes, strict=False)]

    def _slots_and_wanted(self) -> tuple[int, int]:
        """Workers that all living nodes could hold, and what each stage is to have (0: a share).

        A cluster that was too small is not waited for again until it has changed.
        """
        total, wanted = self._slot.count(self._ray.nodes()), self._request.options.workers
        return total, (max(1, min(wanted, total)) if total == self._too_small and wanted else wanted)

    def _permitted(self, stage: Stage, size: int) -> int:
        """The largest number of ranks up to `size` that a stage can be cut for; its error where there is none."""
        error: DistkgdError | None = None
        for world in range(size, 0, -1):
            try:
                check_stage(stage, self._plan.graph, world)
            except DistkgdError as wrong:
                error = error or wrong
            else:
                return world
        raise error or AssertionError(f"{stage.name} on {size} workers")

    def _train(self, stage: Stage, size: int, signal_number: Callable[[], int]) -> StageResult | None:
        """A stage's result, after as many attempts as it takes; StageError after too many.

        None where it has stepped aside, with a checkpoint, until its teacher is finished.
        """
        options, request = self._request.options, self._request
        threads = self._plan.config.threads or max(1, options.cpus)
        folder, sha256 = request.folder, self._plan.graph.identity
        work = Work(request.config, self._stages, stage.name, folder, request.uri, sha256, self._device, threads)
        gang = WorkerGroup(
            self._ray,
            request.launcher,
            self._slot,
            request.surroundings,
            partial(self._permitted, stage),
            one_node=self._storage is not None,
        )
        for attempt in range(options.retries + 1):
            events: list[dict[str, Any]] = []
            outcome = gang.run(
                work, size, options.wait_seconds, self._stop, partial(self._begun, stage.name, size, events)
            )
            aside = outcome.kind == "stopped" and not self._stop.is_set()
            text = f"{ASIDE}: until its teacher is finished" if aside else f"{outcome.kind}: {outcome.text}"
            for event in events:
                self.timeline.end(event, "done" if outcome.kind == "done" else text)
            if outcome.kind == "done" and outcome.result is not None:
                if self._storage is not None:
                    self._storage.download_stage(stage.name)  # the run folder gets it, wherever it was trained
                return outcome.result
            if self._stop.is_set():
                raise Stopped(signal_number(), f"in stage {stage.name}")
            if aside:
                self._say(f"{stage.name}: steps aside until its teacher is finished")
                return None
            if outcome.kind == "refused":
                raise StageError(f"stage {stage.name}: {outcome.text}")
            left = options.retries - attempt
            if left:
                self._say(f"{stage.name}: {outcome.text}; it goes on from its last checkpoint (attempts left: {left})")
            size = self._again(stage, size)
        raise StageError(
            f"stage {stage.name} ended {options.retries + 1} times, at last so: {outcome.text} Its last checkpoint is "
            "kept: cure the cause and use --resume, or allow more with --retries."
        )

    def _begun(
        self, name: str, size: int, events: list[dict[str, Any]], places: list[Place], granted_at: float
    ) -> None:
        hosts = [place.host for place in places]
        events.append(self.timeline.begin(name, hosts, [place.pid for place in places], granted_at))
        with self._lock:
            self._taken[name] = len(places)
            if len(places) < size:
                self._too_small = self._slot.count(self._ray.nodes())
        fewer = f" in place of {size}: there is no room for more" if len(places) < size else ""
        self._say(f"{name}: {len(places)} worker{'s' * (len(places) > 1)} on {', '.join(dict.fromkeys(hosts))}{fewer}")

    def _again(self, stage: Stage, size: int) -> int:
        """The number of workers of the next attempt."""
        with self._lock:
            total, wanted = self._slots_and_wanted()
            left = total - sum(self._taken.values()) + self._taken[stage.name]
            self._taken[stage.name] = self._permitted(stage, wanted or max(1, min(size, left)))
            return self._taken[stage.name]
