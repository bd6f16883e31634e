"""Two launchers on one run folder: the second must be refused, and the first must end as if it had been alone.

    python benchmarks/two_launchers.py [--trials 20] [--world 1,2] [--seed 0] [--out FILE]

In each trial `launch/distill.py` trains a teacher and its student; at an instant uniform over the time that this takes,
a second one is started on the same folder, in half of the trials with --resume. It must end with exit code 2 and one
line that names the first one's machine, process and start; the first one's tables must have the bytes of a run that
nobody disturbed. Both are forked from this process, so that nothing is imported again.
"""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import kills
import torch
import typer
import yaml
from foundation import RESULTS, machine
from kills import model_digests

from distkgd.ownership import OWNER, read_owner
from launch.distill import main as distill

END_SECONDS = 60
ENTITIES, RELATIONS, TRIPLES = 1_000, 8, 2_000
STAGE = kills.STAGE | {"epochs": 8, "validate_every": 4}  # long enough to be met amid
PLAN: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "mlflow": {"enabled": False},
    "report": {"html": False},
    "teacher": STAGE,
    "student": {**STAGE, "dim": 8, "method": "bkd"},
}


@dataclass
class Trial:
    """What the second launcher met. seconds: after the first one's start; code, line: how it ended.

    named: the line names machine, process and start. first_code, same: how the first one ended, and whether with the
    bytes of an undisturbed run.
    """

    world: int
    resume: bool
    seconds: float
    code: int
    line: str
    named: bool
    first_code: int
    same: bool

    @property
    def unharmed(self) -> bool:
        """Whether the trial ended as it should."""
        return self.code == 2 and self.named and self.first_code == 0 and self.same


def write_data(folder: Path) -> None:
    """Random triples: what is learnt from them does not matter here."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([ENTITIES, RELATIONS, ENTITIES])
    rows = torch.unique((torch.rand(TRIPLES, 3, generator=generator) * sizes).long(), dim=0)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    folder.mkdir()
    for split, part in (("valid", rows[:40]), ("test", rows[40:80]), ("train", rows[80:])):
        lines = (f"e{h}\tr{r}\te{t}\n" for h, r, t in part.tolist())
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")


class Launch:
    """The ranks of one launch of `place`/plan.yaml into `folder`."""

    def __init__(self, place: Path, folder: Path, world: int, resume: bool, log: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log, self.began = log, time.monotonic()
        args = (place, folder, resume, log, port, world)
        self.pids = [os.fork() or run_rank(*args, rank) for rank in range(world)]
        self.codes: dict[int, int] = {}

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    def is_over(self) -> bool:
        """Whether all ranks have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if self.seconds > END_SECONDS:
            for pid in set(self.pids) - set(self.codes):
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"no end after {END_SECONDS} s\n{self.said()}")
        return len(self.codes) == len(self.pids)

    def end(self) -> int:
        """Wait until all ranks have ended; the first exit code that is not 0, or 0."""
        while not self.is_over():
            time.sleep(0.01)
        return next((code for code in self.codes.values() if code), 0)

    def said(self) -> str:
        """By all ranks."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def run_rank(place: Path, folder: Path, resume: bool, log: Path, port: int, world: int, rank: int) -> NoReturn:
    """launch/distill.py as one rank; ends the process."""
    code = 1
    try:
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(to, 1)
        os.dup2(to, 2)
        if world > 1:
            found = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in found.items()}
        distill([str(place / "plan.yaml")], data=str(place / "data"), out=folder, resume=resume)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_trial(place: Path, number: int, world: int, resume: bool, at: float, digests: dict[str, str]) -> Trial | None:
    """One trial, the second launcher `at` seconds after the first one's start; None when the first was over by then."""
    folder = place / str(number)
    first = Launch(place, folder, world, False, place / f"{number}.first.log")
    while (first.seconds < at or read_owner(folder / OWNER) is None) and not first.is_over():
        time.sleep(0.002)
    owner = read_owner(folder / OWNER)
    if owner is None:
        if first.end():
            raise SystemExit(f"the first launch failed alone:\n{first.said()}")
        return None
    seconds = first.seconds
    second = Launch(place, folder, 1, resume, place / f"{number}.second.log")
    code = second.end()
    if first.is_over():
        return None  # they may have missed each other
    first_code, line = first.end(), second.said().strip()
    named = all(text in line for text in (socket.gethostname(), f"process {first.pids[0]} ", owner.started))
    same = model_digests(folder) == digests and not (folder / OWNER).exists()
    line = line.replace(str(place), "").replace(socket.gethostname(), "HOST")
    return Trial(world, resume, round(seconds, 3), code, line, named, first_code, same)


def main(
    trials: Annotated[int, typer.Option(min=1, help="How many, over all world sizes.")] = 20,
    world: Annotated[str, typer.Option(help="Numbers of ranks of the first launcher, with commas.")] = "1,2",
    seed: Annotated[int, typer.Option(help="Of the instants.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = RESULTS / "two_launchers.json",
) -> None:
    """Try, compare; exit code 1 when any first launcher was harmed or any second one was not refused."""
    torch.set_num_threads(1)
    began, generator, done = time.monotonic(), random.Random(seed), list[Trial]()
    worlds = [int(w) for w in world.split(",")]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_data(place / "data")
        (place / "plan.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
        alone: dict[int, tuple[float, dict[str, str]]] = {}
        for w in worlds:
            run = Launch(place, place / f"alone-{w}", w, False, place / f"alone-{w}.log")
            if run.end():
                raise SystemExit(f"the run failed before a second launcher was there:\n{run.said()}")
            alone[w] = run.seconds, model_digests(place / f"alone-{w}")
            print(f"alone on {w} ranks: {run.seconds:.2f} s")
        number = 0
        while len(done) < trials:
            number += 1
            w, resume = worlds[len(done) % len(worlds)], bool(len(done) // len(worlds) % 2)
            trial = run_trial(place, number, w, resume, generator.random() * alone[w][0], alone[w][1])
            shutil.rmtree(place / str(number))
            if trial is not None:
                done.append(trial)
                print(f"{len(done):4d} {json.dumps(asdict(trial))}", flush=True)
    unharmed = sum(trial.unharmed for trial in done)
    instants = statistics.quantiles([trial.seconds for trial in done], n=4) if len(done) > 1 else []
    content = {"machine": machine(), "seconds": round(time.monotonic() - began, 1), "seed": seed, "trials": trials}
    content |= {"unharmed": unharmed, "quartiles_of_instants": instants, "rows": [asdict(trial) for trial in done]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{unharmed} of {trials} trials ended with the first launcher unharmed and the second one refused")
    sys.exit(0 if unharmed == trials else 1)


if __name__ == "__main__":
    typer.run(main)
