"""Which stages of a plan may run now, on how many workers, and what happened when. No Ray here."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from distkgd.common.files import write_atomic
from distkgd.pipeline.stages import Stage

TIMELINE = "timeline.json"
ASIDE = "aside"  # begins the outcome of a student that waits for an unfinished teacher


def waits_for(stage: Stage, stages: Sequence[Stage]) -> set[str]:
    """The stages of the plan that must be finished first; paths of models are not among them."""
    return {other.name for other in stages} & set(stage.needs)


def heights(stages: Sequence[Stage]) -> dict[str, int]:
    """Stage -> how many stages the longest way from it to an end of the plan has, itself included."""
    found: dict[str, int] = {}
    for stage in reversed(stages):  # every stage comes after those it needs
        after = [found[other.name] for other in stages if stage.name in other.needs]
        found[stage.name] = 1 + max(after, default=0)
    return found


def ready(stages: Sequence[Stage], finished: Collection[str], begun: Collection[str]) -> list[Stage]:
    """The stages that could begin now, those first after which most is still to come."""
    height = heights(stages)
    free = [s for s in stages if s.name not in begun and waits_for(s, stages) <= set(finished)]
    return sorted(free, key=lambda stage: -height[stage.name])


def early(
    stages: Sequence[Stage], finished: Collection[str], running: Collection[str], has_rows: Callable[[str], bool]
) -> list[Stage]:
    """The stages that may begin before their teacher is finished: it is at work, all it needs is finished, and it has
    rows that its student could begin on. has_rows: name of a stage -> whether it has."""
    by_name, found = {stage.name: stage for stage in stages}, []
    for stage in stages:
        missing = waits_for(stage, stages) - set(finished)
        if not stage.overlap or stage.name in (*finished, *running) or len(missing) != 1 or not missing <= set(running):
            continue
        teacher = by_name[missing.pop()]
        if waits_for(teacher, stages) <= set(finished) and has_rows(teacher.name):
            found.append(stage)
    return found


def allot(num_ready: int, free: int, wanted: int, idle: bool) -> list[int]:
    """How many workers the first of the ready stages get; stages beyond the list wait.

    free: workers that fit beside what is running. wanted: of each stage; 0: an even share of `free`, the first ones
    get what is left over. idle: nothing is running, so that one stage begins even where nothing seems free: a cluster
    may grow when asked, and a shrunk one gives less.
    """
    if not num_ready:
        return []
    if wanted:
        sizes = [wanted] * min(num_ready, free // wanted)
    else:
        number = min(num_ready, free)
        sizes = [free // number + (i < free % number) for i in range(number)]
    return sizes or ([max(wanted, 1)] if idle else [])


class Timeline:
    """Attempts at stages: when, where, on how many workers, and how they ended. Kept in the run folder.

    An event has stage, attempt (1, 2, …), world, nodes (each worker's host), pids, started and ended (Unix seconds),
    and outcome: None while it lasts, "done", "aside" or why it ended otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / TIMELINE
        self._lock = Lock()
        self.events: list[dict[str, Any]] = []
        if self._path.exists():
            self.events = json.loads(self._path.read_text(encoding="utf-8"))
        for event in self.events:
            if event["outcome"] is None:
                event |= {"ended": time.time(), "outcome": "lost with its coordinator"}

    def begin(self, stage: str, nodes: Sequence[str], pids: Sequence[int], started: float) -> dict[str, Any]:
        """A gang is at work; its event, to be given to `end`. started: when it got its room."""
        with self._lock:
            earlier = sum(event["stage"] == stage for event in self.events)
            event = {
                "stage": stage,
                "attempt": earlier + 1,
                "world": len(nodes),
                "nodes": list(nodes),
                "pids": list(pids),
                "started": started,
                "ended": None,
                "outcome": None,
            }
            self.events.append(event)
            self.events.sort(key=lambda one: one["started"])
            self._write()
            return event

    def end(self, event: dict[str, Any], outcome: str) -> None:
        """The gang has ended."""
        with self._lock:
            event |= {"ended": time.time(), "outcome": outcome}
            self._write()

    def _write(self) -> None:
        write_atomic(self._path, json.dumps(self.events, indent=1) + "\n")

    def worlds(self) -> int | str:
        """Of the attempts that ended well: the number of ranks, or the least and the most."""
        found = sorted({event["world"] for event in self.events if event["outcome"] == "done"})
        return f"{found[0]}–{found[-1]}" if len(found) > 1 else (found[0] if found else 1)

    def sentence(self) -> str:
        """Who ran when, in seconds from the first start."""
        if not self.events:
            return ""
        zero = min(event["started"] for event in self.events)
        return "Timeline: " + "; ".join(spell(event, zero) for event in self.events) + "."


def spell(event: Mapping[str, Any], zero: float) -> str:
    """An attempt in a few words."""
    ended = event["ended"] or event["started"]
    workers = f"{event['world']} worker" + ("s" if event["world"] > 1 else "")
    outcome = event["outcome"] or ""
    failed = "" if outcome == "done" else ", stepped aside" if outcome.startswith(ASIDE) else ", broken off"
    return f"{event['stage']} {event['started'] - zero:.1f}–{ended - zero:.1f} s on {workers}{failed}"
