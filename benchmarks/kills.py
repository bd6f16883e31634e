"""Kill -9 at random instants; every run, resumed, must end with the bytes of a run that nobody killed.

    python benchmarks/kills.py [--kills 100] [--world 1,2] [--seed 0] [--out FILE]

Each kill has a run of its own: a plan of a teacher and its DualDE student, in processes forked from this one so that
nothing is imported again. Half of the kills come at instants uniform over the time the run takes, half at the time a
checkpoint is being written. With several ranks every other kill hits one rank alone, and the others must end by
themselves. Between kill and resume every published checkpoint is verified.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import polars as pl
import torch
import typer
from foundation import RESULTS, machine

from distkgd.common.console import Display
from distkgd.data import Graph, Vocabulary
from distkgd.distributed.checkpoint.reader import list_steps, verify
from distkgd.distributed.ranks import join_ranks, leave_ranks
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan

END_SECONDS = 60  # by then a resumed run has ended, and the survivors of a killed rank have noticed
ENTITIES, RELATIONS, TRIPLES = 20_000, 8, 4_000
STAGE: dict[str, Any] = {
    "dim": 16,
    "batch_size": 256,
    "epochs": 5,
    "validate_every": 2,
    "checkpoint_every": 1,
    "dropout": 0.1,
    "negatives": {"kind": "batch", "num": 64},
}
PLAN: dict[str, Any] = {
    "device": "cpu",
    "mlflow": {"enabled": False},
    "teacher": STAGE,
    "student": {**STAGE, "dim": 8, "method": "dualde", "distill": {"stage_two": {"start": 3, "epochs": 2}}},
}


@dataclass
class Kill:
    """What was killed, when, and what came of it.

    in_write: the temporary folder of a checkpoint was there. step: of the newest checkpoint, in all stages together.
    survivor_seconds: until the last rank that was not killed had ended.
    """

    world: int
    aimed: bool
    victims: list[int]
    seconds: float
    stage: str
    step: int
    in_write: bool
    verified: int
    survivor_seconds: float
    same: bool


# --- Runs in forked processes


def random_rows(entities: int, relations: int, triples: int) -> torch.Tensor:
    """Distinct random triples [n, 3]: what is learnt from them does not matter here. n: a few fewer than `triples`."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([entities, relations, entities])
    rows = torch.unique((torch.rand(triples, 3, generator=generator) * sizes).long(), dim=0)
    return rows[torch.randperm(len(rows), generator=generator)]


def graph() -> Graph:
    """Of random triples; made in a rank, for polars does not outlive a fork."""
    rows = random_rows(ENTITIES, RELATIONS, TRIPLES)
    names = (Vocabulary(pl.Series([f"{k}{i}" for i in range(n)])) for k, n in (("e", ENTITIES), ("r", RELATIONS)))
    return Graph("random", rows[40:], rows[:20], rows[20:40], *names, "0" * 64, ())


def resume_plan(folder: Path) -> None:
    """The plan in `folder`, resumed if it was begun, as the rank that the environment names."""
    ranks = join_ranks("cpu")
    run_plan(parse_config(PLAN, "kills"), graph(), ranks, folder, resume=True, display=Display(ranks.first))
    leave_ranks(ranks)


def run_rank(work: Callable[[], None], log: Path, rank: int, world: int, port: int) -> NoReturn:
    """`work` as one rank, what it says into `log`; ends the process."""
    code = 1
    try:
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(to, 1)
        os.dup2(to, 2)
        if world > 1:
            place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in place.items()}
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run:
    """The ranks of one launch: forked, so that nothing is imported again. `work` runs the plan into `folder`."""

    def __init__(self, folder: Path, world: int, work: Callable[[], None] | None = None, log: str = ".log") -> None:
        self.folder, self.log_file = folder, folder.with_suffix(log)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.began = time.monotonic()
        self.pids: dict[int, int] = {}  # by rank, of those that have not ended
        self.codes: dict[int, int] = {}
        task = work or partial(resume_plan, folder)
        for rank in range(world):
            self.pids[rank] = os.fork() or run_rank(task, self.log_file, rank, world, port)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    def is_over(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in [*self.pids.items()]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.pids[rank]
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return not self.pids

    @property
    def code(self) -> int:
        """The first exit code that is not 0, of the ranks that have ended; or 0."""
        return next((code for code in self.codes.values() if code), 0)

    def wait_for(self, happened: Callable[[], bool], pause: float = 0.001) -> bool:
        """Whether `happened` came true before the run was over."""
        deadline = time.monotonic() + END_SECONDS
        while not happened():
            if self.is_over():
                return False
            if time.monotonic() > deadline:
                self.kill([*self.pids])
                raise SystemExit(f"{self.folder}: no end after {END_SECONDS} s\n{self.log()}")
            time.sleep(pause)
        return True

    def finish(self) -> float:
        """Wait until all ranks have ended; the seconds that took."""
        began = time.monotonic()
        self.wait_for(lambda: False)
        return time.monotonic() - began

    def kill(self, victims: list[int]) -> None:
        """SIGKILL, at once."""
        for rank in victims:
            os.kill(self.pids[rank], signal.SIGKILL)
        for rank in victims:
            _, status = os.waitpid(self.pids.pop(rank), 0)
            self.codes[rank] = os.waitstatus_to_exitcode(status)

    def temporaries(self) -> set[Path]:
        """Checkpoints that are being written."""
        return set(self.folder.glob("stages/*/checkpoint/.step_*.tmp"))

    def log(self) -> str:
        """What the ranks have said."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")


def model_digests(folder: Path) -> dict[str, str]:
    """sha256 of every table file of the finished models."""
    files = sorted(folder.glob("stages/*/model/*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- Kills


@dataclass
class Uninterrupted:
    """A run that nobody kills. write_seconds: how long each checkpoint's temporary folder was there."""

    digests: dict[str, str]
    seconds: float
    write_seconds: list[float]


def run_uninterrupted(folder: Path, world: int) -> Uninterrupted:
    """Train the plan and watch it write."""
    run = Run(folder, world)
    seen: dict[Path, tuple[float, float]] = {}

    def watch() -> bool:
        for path in run.temporaries():
            seen[path] = (seen.get(path, (run.seconds,))[0], run.seconds)
        return False

    run.wait_for(watch)
    if run.code:
        raise SystemExit(f"the run failed before anything was killed:\n{run.log()}")
    return Uninterrupted(model_digests(folder), run.seconds, [last - first for first, last in seen.values()])


def wait_until_aimed(run: Run, whole: Uninterrupted, generator: random.Random) -> bool:
    """Some time inside the writing of some checkpoint; False when the run was over first."""
    left = generator.randrange(len(whole.write_seconds)) + 1
    seen: set[Path] = set()

    def reached() -> bool:
        seen.update(run.temporaries())
        return len(seen) >= left

    if not run.wait_for(reached):
        return False
    time.sleep(generator.random() * statistics.median(whole.write_seconds))
    return not run.is_over()


def kill_and_resume(
    folder: Path, world: int, aimed: bool, victims: list[int], whole: Uninterrupted, generator: random.Random
) -> Kill | None:
    """One kill; None when the run was over before."""
    run = Run(folder, world)
    instant = generator.random() * whole.seconds
    if not (wait_until_aimed(run, whole, generator) if aimed else run.wait_for(lambda: run.seconds >= instant)):
        return None
    if run.is_over() or not set(victims) <= set(run.pids):
        run.finish()
        return None
    seconds = run.seconds
    run.kill(victims)
    in_write = bool(run.temporaries())
    survivor_seconds = run.finish()
    checkpoints = sorted(folder.glob("stages/*/checkpoint/step_*"))
    for path in checkpoints:
        verify(path)
    stages = sorted(folder.glob("stages/*/checkpoint"), reverse=True)  # teacher, student
    step = sum(([0, *list_steps(stage)][-1]) for stage in stages)
    again = Run(folder, world)
    again.finish()
    if again.code:
        raise SystemExit(f"{folder} could not be resumed:\n{again.log()}")
    return Kill(
        world,
        aimed,
        victims,
        round(seconds, 3),
        stages[-1].parent.name if stages else "none",
        step,
        in_write,
        len(checkpoints),
        round(survivor_seconds, 3) if len(victims) < world else 0.0,
        model_digests(folder) == whole.digests,
    )


def summary(kills: list[Kill]) -> dict[str, Any]:
    """The row of one world size."""
    return {
        "kills": len(kills),
        "of_one_rank_alone": sum(len(kill.victims) < kill.world for kill in kills),
        "inside_a_checkpoint_write": sum(kill.in_write for kill in kills),
        "verified_checkpoints": sum(kill.verified for kill in kills),
        "longest_survivor_seconds": max((kill.survivor_seconds for kill in kills), default=0.0),
        "same_bytes": sum(kill.same for kill in kills),
    }


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many, over all world sizes.")] = 100,
    world: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "1,2",
    seed: Annotated[int, typer.Option(help="Of the instants.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = RESULTS / "kills.json",
) -> None:
    """Kill, resume, compare; exit code 1 when any run ended with other bytes."""
    torch.set_num_threads(1)
    began = time.monotonic()
    worlds = [int(w) for w in world.split(",")]
    generator = random.Random(seed)
    done: list[Kill] = []
    with tempfile.TemporaryDirectory() as name:
        whole = {w: run_uninterrupted(Path(name) / f"whole-{w}", w) for w in worlds}
        for w, run in whole.items():
            usual = statistics.median(run.write_seconds)
            print(f"{w} ranks: {run.seconds:.2f} s, {len(run.write_seconds)} writes of {usual:.3f} s (median)")
        attempt = 0
        while len(done) < kills:
            attempt += 1
            number = len(done)
            w = worlds[number % len(worlds)]
            turn = number // len(worlds)
            victims = [generator.randrange(w)] if w > 1 and turn % 4 in (0, 3) else [*range(w)]
            folder = Path(name) / str(attempt)
            kill = kill_and_resume(folder, w, turn % 2 == 0, victims, whole[w], generator)
            shutil.rmtree(folder)
            if kill is not None:
                done.append(kill)
                print(f"{len(done):4d} {json.dumps(asdict(kill))}", flush=True)
    by_world = {str(w): summary([kill for kill in done if kill.world == w]) for w in worlds}
    content = {"seconds": round(time.monotonic() - began, 1), "seed": seed, "by_world": by_world}
    content["uninterrupted_seconds"] = {str(w): round(run.seconds, 2) for w, run in whole.items()}
    rows = ",\n    ".join(json.dumps(asdict(kill)) for kill in done)  # one line each
    head = json.dumps({"machine": machine(), **content}, indent=2).removesuffix("\n}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{head},\n  "kills": [\n    {rows}\n  ]\n}}\n')
    print(json.dumps(by_world, indent=2))
    sys.exit(0 if all(kill.same for kill in done) else 1)


if __name__ == "__main__":
    typer.run(main)
