"""A stage as a gang of actors in a placement group: placed, started, watched, and taken down again."""

import math
import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from threading import Event
from typing import Any

from distkgd.distributed.ranks import PEER_TIMEOUT
from distkgd.pipeline.ray.worker import Outcome, Place, StageWorker, Surroundings, Work

START_SECONDS = 300.0  # from a granted place to actors that answer: a node may first have to fetch its environment
RETRY_SECONDS = 5.0  # for a smaller gang, once the whole one has been waited for
POLL_SECONDS = 0.5
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 120.0  # without a sign of life
GRACE_SECONDS = PEER_TIMEOUT.total_seconds() + 15  # from the first rank's end to the last one's
STOP_SECONDS = 120.0  # from a stop to a written checkpoint


@dataclass(frozen=True)
class Slot:
    """What one worker takes of a node."""

    cpus: float
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray has it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def count(self, nodes: Sequence[Mapping[str, Any]]) -> int:
        """How many of them all living nodes have, free or not. nodes: what ray.nodes() returns."""
        return sum(self._of_each(nodes))

    def largest(self, nodes: Sequence[Mapping[str, Any]]) -> int:
        """How many of them the largest living node has."""
        return max(self._of_each(nodes), default=0)

    def _of_each(self, nodes: Sequence[Mapping[str, Any]]) -> list[int]:
        living = [node["Resources"] for node in nodes if node["Alive"]]
        return [int(min(has.get(kind, 0.0) // amount for kind, amount in self.bundle.items())) for has in living]


class WorkerGroup:
    """Runs one attempt at a stage.

    launcher: begins the names of its placement groups. permitted: n -> the largest number of workers up to n that the
    stage allows. one_node: whether all workers must be on one, whose disk they share.
    """

    def __init__(
        self,
        ray: Any,
        launcher: str,
        slot: Slot,
        surroundings: Surroundings,
        permitted: Callable[[int], int],
        one_node: bool = False,
    ) -> None:
        self._strategy = "STRICT_PACK" if one_node else "PACK"
        self._ray = ray
        self._launcher = launcher
        self._slot = slot
        self._surroundings = surroundings
        self._permitted = permitted

    def run(
        self, work: Work, size: int, wait_seconds: float, stop: Event, begun: Callable[[list[Place], float], None]
    ) -> Outcome:
        """How the stage ended on `size` workers, or after `wait_seconds` without room on fewer.

        begun: is told where the workers are, and when (Unix seconds) they got their room.
        """
        ray, group, workers = self._ray, None, []
        try:
            group, world = self._placed(work.stage, size, wait_seconds, stop)
            if group is None:
                return Outcome("stopped" if stop.is_set() else "failed", self._no_room(wait_seconds))
            granted_at = time.time()
            workers = self._hired(work.stage, group, world)
            places = ray.get([worker.place.remote() for worker in workers], timeout=START_SECONDS)
            begun(places, granted_at)
            return self._watched(workers, work, places, stop)
        except ray.exceptions.GetTimeoutError:
            return Outcome("failed", f"the workers did not start within {START_SECONDS:g} s")
        except ray.exceptions.RayError as error:
            return Outcome("died", told(error))
        finally:
            for worker in workers:
                ray.kill(worker)
            if group is not None:
                ray.util.remove_placement_group(group)

    def _no_room(self, seconds: float) -> str:
        return (
            f"no node had {self._slot.bundle} free within {seconds:g} s; look at `ray status`, free some, or ask for "
            "less with --cpus-per-worker"
        )

    def _placed(self, stage: str, size: int, seconds: float, stop: Event) -> tuple[Any, int]:
        """A placement group and its size; None and 0 where there is no room for even one worker."""
        sizes = [size]
        while sizes[-1] > 1:
            # Of what is left of the cluster; other stages may have their part of that, hence the halves.
            left = min(sizes[-1] - 1, self._slot.count(self._ray.nodes())) if len(sizes) == 1 else sizes[-1] // 2
            sizes.append(self._permitted(max(1, left)))
        for number, world in enumerate(sizes):
            name = f"{self._launcher}.{stage}.{uuid.uuid4().hex}"
            group = self._ray.util.placement_group([self._slot.bundle] * world, strategy=self._strategy, name=name)
            last = number == len(sizes) - 1
            deadline = time.monotonic() + (seconds if number == 0 or last else min(seconds, RETRY_SECONDS))
            while not (ready := group.wait(POLL_SECONDS)) and time.monotonic() < deadline and not stop.is_set():
                pass
            if ready:
                return group, world
            self._ray.util.remove_placement_group(group)
        return None, 0

    def _hired(self, name: str, group: Any, world: int) -> list[Any]:
        strategy = import_module("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
        actor = self._ray.remote(concurrency_groups={"beside": 1})(StageWorker)
        return [
            actor.options(
                num_cpus=self._slot.cpus,
                num_gpus=self._slot.gpus,
                scheduling_strategy=strategy(group, placement_group_bundle_index=rank),
            ).remote(name if rank == 0 else f"{name}.{rank}", self._surroundings)
            for rank in range(world)
        ]

    def _watched(self, workers: Sequence[Any], work: Work, places: Sequence[Place], stop: Event) -> Outcome:
        """Wait for all ranks; the first that ends badly leaves the others the time in which they notice."""
        world = len(workers)
        calls = {w.train.remote(work, rank, world, places[0]): rank for rank, w in enumerate(workers)}
        ended: dict[int, Outcome] = {}
        pulse = Pulse(self._ray, workers)
        deadline = float("inf")
        while len(ended) < world and time.monotonic() < deadline:
            waiting = [call for call, rank in calls.items() if rank not in ended]
            for call in self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)[0]:
                ended[calls[call]] = self._ended(call)
            for rank in pulse.silent(set(range(world)) - set(ended)):
                ended[rank] = Outcome("died", f"no sign of life for {SILENCE_SECONDS:g} s")
            if stop.is_set():
                pulse.stop()
                deadline = min(deadline, time.monotonic() + STOP_SECONDS)
            if any(one.kind != "done" for one in ended.values()):
                died = any(one.kind == "died" for one in ended.values())
                deadline = min(deadline, time.monotonic() + (0 if died else GRACE_SECONDS))
        return judged(ended, places)

    def _ended(self, call: Any) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(call)
            return outcome
        except self._ray.exceptions.RayError as error:
            return Outcome("died", told(error))


def dissolve(ray: Any, launcher: str) -> None:
    """Remove the placement groups, and so the workers, that an earlier life of this launcher's coordinator has left.

    Ray does that for actors that have died, and not for those that it starts again.
    """
    for known in ray.util.placement_group_table().values():
        if known["name"].startswith(f"{launcher}.") and known["state"] != "REMOVED":
            with suppress(ValueError):  # it is gone by now
                ray.util.remove_placement_group(ray.util.get_placement_group(known["name"]))


class Pulse:
    """Signs of life of workers, and word to them to stop."""

    def __init__(self, ray: Any, workers: Sequence[Any]) -> None:
        self._ray = ray
        self._workers = workers
        self._asked: dict[int, Any] = {}
        self._heard = [time.monotonic()] * len(workers)
        self._told_at = -math.inf

    def stop(self) -> None:
        """Ask all to stop, and again after a while: one that is still loading its data does not listen yet."""
        if time.monotonic() > self._told_at + BEAT_SECONDS:
            self._told_at = time.monotonic()
            for worker in self._workers:
                worker.stop.options(concurrency_group="beside").remote(int(signal.SIGTERM))

    def silent(self, ranks: set[int]) -> list[int]:
        """Those of `ranks` that have not answered for too long; a dead one answers through its call."""
        now = time.monotonic()
        for rank in ranks:
            asked = self._asked.get(rank)
            if asked is not None and self._ray.wait([asked], timeout=0)[0]:
                self._heard[rank] = now
                del self._asked[rank]
            elif asked is None and now > self._heard[rank] + BEAT_SECONDS:
                self._asked[rank] = self._workers[rank].alive.options(concurrency_group="beside").remote()
        return [rank for rank in ranks if now > self._heard[rank] + SILENCE_SECONDS]


def judged(ended: Mapping[int, Outcome], places: Sequence[Place]) -> Outcome:
    """One outcome of all ranks. A death explains the errors of the others, a refusal is no one's consequence."""
    if len(ended) == len(places) and all(one.kind == "done" for one in ended.values()):
        return ended[0]
    for kind in ("died", "refused", "stopped", "failed"):
        for rank, one in sorted(ended.items()):
            if one.kind == kind:
                place = places[rank]
                text = (
                    one.text if kind == "refused" else f"rank {rank} (process {place.pid} on {place.host}): {one.text}"
                )
                return replace(one, text=text, result=None)
    missing = sorted(set(range(len(places))) - set(ended))
    return Outcome("failed", f"ranks {missing} were given up: they did not end when the others had")


def told(error: Exception) -> str:
    """A Ray error in a line, without what Ray advises at length."""
    text = " ".join(str(error).split()).partition(" Some common causes")[0]
    return text.partition("The actor is dead because ")[2] or text[:400]
