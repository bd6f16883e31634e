"""Two launchers on one run folder: the second must be refused, and the first must end as if it had been alone.

    python benchmarks/two_launchers.py [--trials 20] [--world 1,2] [--seed 0] [--out FILE]

In each trial `launch/distill.py` trains a teacher and its student; at an instant uniform over the time that this takes,
a second one is started on the same folder, in half of the trials with --resume. It must end with exit code 2 and one
line that names the first one's machine, process and start; the first one's tables must have the bytes of a run that
nobody disturbed. Both are forked from this process, so that nothing is imported again.
"""

import json
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import kills
import torch
import typer
import yaml
from foundation import RESULTS, machine
from kills import Run, model_digests

from distkgd.distributed.ownership import OWNER, read_owner
from launch.distill import main as distill

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
    """A file per split, which `distill` reads."""
    rows = kills.random_rows(ENTITIES, RELATIONS, TRIPLES)
    folder.mkdir()
    for split, part in (("valid", rows[:40]), ("test", rows[40:80]), ("train", rows[80:])):
        lines = (f"e{h}\tr{r}\te{t}\n" for h, r, t in part.tolist())
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")


def launch(place: Path, name: str, world: int, resume: bool, log: str) -> Run:
    """Start the ranks of one launch of `place`/plan.yaml into `place`/`name`."""
    folder = place / name
    command = partial(distill, [str(place / "plan.yaml")], data=str(place / "data"), out=folder, resume=resume)
    return Run(folder, world, command, log)


def run_trial(place: Path, name: str, world: int, resume: bool, at: float, digests: dict[str, str]) -> Trial | None:
    """One trial, the second launcher `at` seconds after the first one's start; None when the first was over by then."""
    first = launch(place, name, world, False, ".first.log")
    owned = first.folder / OWNER
    if not first.wait_for(lambda: first.seconds >= at and owned.exists()):
        if first.code:
            raise SystemExit(f"the first launch failed alone:\n{first.log()}")
        return None
    owner, pid, seconds = read_owner(owned), first.pids.get(0), first.seconds
    second = launch(place, name, 1, resume, ".second.log")
    second.finish()
    if owner is None or first.is_over():
        return None  # they may have missed each other
    first.finish()
    line = second.log().strip()
    named = all(text in line for text in (socket.gethostname(), f"process {pid} ", owner.started))
    same = model_digests(first.folder) == digests and not owned.exists()
    line = line.replace(str(place), "").replace(socket.gethostname(), "HOST")
    return Trial(world, resume, round(seconds, 3), second.code, line, named, first.code, same)


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
            run = launch(place, f"alone-{w}", w, False, ".log")
            run.finish()
            if run.code:
                raise SystemExit(f"the run failed before a second launcher was there:\n{run.log()}")
            alone[w] = run.seconds, model_digests(run.folder)
            print(f"alone on {w} ranks: {run.seconds:.2f} s")
        number = 0
        while len(done) < trials:
            number += 1
            w, resume = worlds[len(done) % len(worlds)], bool(len(done) // len(worlds) % 2)
            trial = run_trial(place, str(number), w, resume, generator.random() * alone[w][0], alone[w][1])
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
