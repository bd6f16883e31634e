"""Runs tasks: rounds of all sides in turn, memory in fresh processes, ceilings before and after."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side.data import write_triples
from benchmarks.side_by_side.machine import PEERS, version_of
from benchmarks.side_by_side.pool import ArmError, Pool, missing, open_pool
from benchmarks.side_by_side.results import Row, memory_of, merge, read_rows, row_of
from benchmarks.side_by_side.roofline import Ceilings, best_of
from benchmarks.side_by_side.run_tasks import run_tasks
from benchmarks.side_by_side.tasks import TINY, Arm, Scale, Task, all_tasks
from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.provenance import machine
from distkgd.errors import ConfigError

PAUSE = 0.1  # seconds before a round: by then the idle threads of the side that ran before have gone to sleep


@dataclass
class Rounds:
    """What the arms of a group said round by round, and which of them failed, by the arm's key."""

    said: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def key_of(arm: Arm) -> str:
    """Equal for equal arms."""
    return json.dumps([arm.family, arm.function, arm.options], sort_keys=True)


def measure(
    names: Sequence[str], scale: Scale, display: Display, threads: int, finished: Path | None = None
) -> list[Row]:
    """The rows of the named tasks, of all if none is named.

    finished: folder of a run whose models are measured, in place of the tasks that there are otherwise.

    Raises ConfigError for an unknown name.
    """
    scale = replace(scale, devices=("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    with tempfile.TemporaryDirectory(prefix="distkgd-bench-") as folder, open_pool(threads) as pool:
        tiny = all_tasks(TINY, f"{folder}/tiny")
        known = all_tasks(scale, f"{folder}/text") if finished is None else run_tasks(finished, scale)
        tasks = chosen(known, names)
        if any(task.name == "load" for task in tasks):
            write_triples(Path(folder) / "text", scale.loaded, scale.names)
            write_triples(Path(folder) / "tiny", TINY.loaded, TINY.names)
        for peer in sorted({task.peer.family for task in tasks if missing(task.peer.family)}):
            display.warn(f"{peer} is not installed, its figures are left out: pip install 'distkgd[bench]'")
        for family in {arm.family for task in tasks for arm in arms_of(task)}:
            pool.start(family)
        ceilings = [ask_ceilings(pool, scale)]
        groups = [list(group) for _, group in groupby(tasks, key=lambda task: task.group)]
        measured = []
        for group in groups:
            rounds = run_group(group, scale.rounds, pool)
            memory = {task.name: ask_memory(task, tiny[task.name], pool) for task in group if task.memory is not None}
            measured.append((group, rounds, memory))
            display.line(f"measured: {', '.join(task.name for task in group)}")
        ceilings.append(ask_ceilings(pool, scale))
    best, about = best_of(ceilings), machine() | {"threads": threads}
    rows = []
    for group, rounds, memory in measured:
        for task in group:
            row = figures(task, rounds, best) | memory.get(task.name, {})
            rows.append(row | {"scale": scale.name, "machine": about, "ceilings": vars(best)})
    return rows


def chosen(known: dict[str, Task], names: Sequence[str]) -> list[Task]:
    """The named tasks, in order; a name may also be the beginning of several, up to a slash or colon."""
    for name in names:
        if not any(_means(name, one) for one in known):
            raise ConfigError(f"--task {name}: there is no such task; there are {', '.join(known)}.")
    return [task for task in known.values() if not names or any(_means(name, task.name) for name in names)]


def _means(name: str, task: str) -> bool:
    return task == name or task.startswith((f"{name}/", f"{name}:"))


def arms_of(task: Task) -> list[Arm]:
    """Those that can run here, in the order of a round."""
    return [arm for arm in (task.products, task.ours, task.peer) if arm is not None and not missing(arm.family)]


def run_group(tasks: Sequence[Task], number: int, pool: Pool) -> Rounds:
    """`number` rounds of every arm, each once, in turn: ours, its peer, the next one of ours, …"""
    found = Rounds()
    arms = {key_of(arm): arm for task in tasks for arm in arms_of(task)}
    for key, arm in list(arms.items()):
        try:
            pool.start(arm.family).ask(do="prepare", arm=key, function=arm.function, options=arm.options)
            found.said[key] = []
        except ArmError as error:
            found.failed[key] = str(error)
            del arms[key]
    for _ in range(number):
        for key, arm in list(arms.items()):
            time.sleep(PAUSE)
            try:
                found.said[key].append(pool.start(arm.family).ask(do="run", arm=key))
            except ArmError as error:
                found.failed[key] = str(error)
                del arms[key], found.said[key]
    pool.drop()
    return found


def figures(task: Task, rounds: Rounds, ceilings: Ceilings) -> Row:
    """The row of one task of a group. What we cannot do ourselves is an error; what a peer cannot do is a remark."""
    ours, peer, family = key_of(task.ours), key_of(task.peer), task.peer.family
    if ours in rounds.failed:
        raise ArmError(f"{task.name}: our side failed: {rounds.failed[ours]}")
    reason = "not installed" if missing(family) else rounds.failed.get(peer)
    name, version = {"ours": ("two steps", version_of("distkgd")), "plain": ("torch", version_of("torch"))}.get(
        family, (family, version_of(family) if family in PEERS else None)
    )
    found, products = rounds.said.get(peer, []), [] if task.products is None else rounds.said[key_of(task.products)]
    name, version = (name, version) if task.peer_name is None else (task.peer_name, None)
    named: Any = {"peer_name": name, "peer_version": version, "skipped": reason}
    return row_of(task, rounds.said[ours], found, ceilings, products=products, **named)


def ask_ceilings(pool: Pool, scale: Scale) -> Ceilings:
    """Of the process that measures us."""
    worker = pool.start("ours")
    worker.ask(do="prepare", arm="ceilings", function="ceilings", options={"numbers": scale.ceiling_numbers})
    found = Ceilings(**worker.ask(do="run", arm="ceilings"))
    worker.ask(do="drop")
    return found


def ask_memory(task: Task, tiny: Task, pool: Pool) -> dict[str, float]:
    """Peaks of both sides, each in a fresh process; of the peer where it can do the task."""
    found = []
    for arm, small in ((task.ours, tiny.ours), (task.peer, tiny.peer)):
        request = {"function": arm.function, "options": arm.options, "tiny": small.options}
        try:
            found.append(None if missing(arm.family) else pool.memory(arm.family, request))
        except ArmError:
            found.append(None)
    ours, peer = found
    assert ours is not None and task.memory is not None
    return memory_of(ours, peer, task.memory)


def save(rows: Sequence[Row], scale: Scale, alone: Path | None, merged: Path | None) -> None:
    """Into the file `alone`, or else among the results in `merged`, if either is given."""
    if alone is not None:
        save_list(alone, rows)
    elif merged is not None:
        save_merged(merged, rows, scale)


def save_merged(path: Path, rows: Sequence[Row], scale: Scale) -> None:
    """Into a file of results: rows of the same tasks are replaced, others stay."""
    old = read_rows(path) if path.exists() else []
    merged = merge(old, rows, list(all_tasks(scale, "")))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"rows": merged}, indent=2) + "\n")


def save_list(path: Path, rows: Sequence[Row]) -> None:
    """A file with these rows and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(list(rows), indent=2) + "\n")
