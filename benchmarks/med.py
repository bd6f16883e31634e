"""What a croppable model costs; results in benchmarks/results/, with the machine and versions.

python benchmarks/med.py step               # a step with 64 sub-models (10, 20, …, 640) beside a plain one
python benchmarks/med.py singly             # a step of 16 sub-models beside one of each direct model, CoDEx-S's size
python benchmarks/med.py curve med_codex-s  # of a table of tables.py: MRR of sub-models, crops and direct models by dim
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import typer
from foundation import ROOT, save
from tables import key, spelled_out

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `benchmarks` is found

from benchmarks.side_by_side.jobs import bare_job, random_triples, seconds_in_turn
from benchmarks.side_by_side.machine import status_bytes
from distkgd.common.intervals import paired_interval
from distkgd.distributed.ranks import Ranks
from distkgd.kernels.memory import keep_freed_memory
from distkgd.training.job import Progress
from distkgd.training.loop import train_step

ENTITIES, RELATIONS, TRIPLES, DIM = 14_541, 237, 100_000, 640
NEGATIVES = {
    "triple": {"kind": "triple", "num": 64, "sides": "uniform"},  # the paper's
    "chunk": {"kind": "chunk", "num": 256, "chunk": 64},
    "batch": {"kind": "batch", "num": 1024},
}
CASES = [
    (scorer, negatives, loss)
    for scorer in ("complex", "transe")
    for negatives in NEGATIVES
    for loss in ("softmax", "softplus")
]
app = typer.Typer(help=__doc__)


def stage(scorer: str, negatives: str, loss: str, croppable: bool) -> dict[str, Any]:
    """Batch of 1024 triples, both ends asked for, or with negatives of their own either one."""
    found = {"scorer": scorer, "dim": DIM, "batch_size": 1024, "negatives": NEGATIVES[negatives]}
    found |= {"loss": {"name": loss}, "reciprocal": False, "optimizer": {"name": "adagrad", "lr": 0.1}}
    span = {"from": DIM // 64, "to": DIM, "step": DIM // 64}
    return found | ({"method": "med", "distill": {"dims": span}} if croppable else {})


@app.command()
def step(repeats: int = 7, threads: int = 2, only: str = "") -> None:
    """Ratio of wall and of CPU seconds, the two kinds of steps taking turns in one process."""
    command = [sys.executable, str(Path(__file__).resolve()), "measure", str(repeats), only]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    for row in rows:
        print(
            f"{row['scorer']}, {row['negatives']}, {row['loss']}: "
            f"{row['ratio']:.2f}x wall, {row['cpu_ratio']:.2f}x CPU "
            f"({1000 * row['croppable']:.0f} ms beside {1000 * row['plain']:.0f} ms), peak {row['peak'] / 1e6:,.0f} MB"
        )
    if not only:
        save("med_step", {"threads": threads, "dim": DIM, "sub_models": 64, "batch": 1024, "cases": rows})


@app.command()
def curve(table: str) -> None:
    """Test MRR of each dim, means over the seeds; and training seconds, those of all direct models together."""
    content = json.loads((ROOT / f"benchmarks/results/table_{table}.json").read_text(encoding="utf-8"))
    arms, seeds, runs = content["arms"], content["seeds"], content["runs"]
    direct = {row["dim"]: row["test_mrr"] for name, row in arms.items() if name.startswith("direct")}
    sub_models, crops = by_dim(arms["med"]), by_dim(arms["direct"])
    crops[arms["direct"]["dim"]] = arms["direct"]["test_mrr"]
    print(
        "| dim | sub-model | crop of a plain model | trained directly | gain over direct (95%) |\n|---|---|---|---|---|"
    )
    for dim, found in sub_models.items():
        gain = paired_interval([mine - theirs for mine, theirs in zip(found, direct[dim], strict=True)])
        means = " | ".join(f"{statistics.mean(x):.4f}" for x in (found, crops[dim], direct[dim]))
        print(f"| {dim} | {means} | {spelled_out(gain)} |")

    def seconds(arm: str, trial: int, seed: int) -> float:
        return float(sum(stage["train_seconds"] for stage in runs[key(arm, trial, seed)]["stages"]))

    rounds = {f"trial {n}, seed {seeds[0]}": (dict.fromkeys(arms, n), seeds[0]) for n in range(content["trials"])}
    chosen = {name: row["trial"] for name, row in arms.items()}
    rounds |= {f"chosen trials, seed {seed}": (chosen, seed) for seed in seeds[1:]}
    for name, (trials, seed) in rounds.items():
        croppable, *singly = (seconds(arm, trials[arm], seed) for arm in sorted(arms, key=lambda arm: arm != "med"))
        said = f"croppable {croppable:.0f} s, all direct ones {sum(singly):.0f} s: {croppable / sum(singly):.3f}"
        print(f"{name}, training: {said}")


def by_dim(row: dict[str, Any]) -> dict[int, list[float]]:
    """{dim: test MRR for each seed} of an arm with a curve."""
    return {int(dim): [one["test"][dim]["mrr"] for one in row["curve"]] for dim in row["curve"][0]["test"]}


@app.command()
def singly(repeats: int = 7) -> None:
    """A step of the croppable model of med_codex-s over the steps of all its direct models, one after the other."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ranks = Ranks()
    train = random_triples(2034, 32_888, 42, ranks)
    plain = {"scorer": "complex", "batch_size": 256, "optimizer": {"name": "adagrad", "lr": 0.1}}
    plain |= {"loss": {"name": "softmax"}, "regulariser": {"name": "n3", "weight": 0.01}}
    stages = [plain | {"dim": dim} for dim in range(8, 129, 8)]
    stages.append(plain | {"dim": 128, "method": "med", "distill": {"dims": {"from": 8, "to": 128, "step": 8}}})
    jobs = [bare_job(one, train, 2034, 42, ranks) for one in stages]
    *direct, croppable = (1000 * statistics.median(mine) for mine in seconds_in_turn(jobs, repeats))
    print(f"croppable {croppable:.1f} ms, all direct ones {sum(direct):.1f} ms: {croppable / sum(direct):.2f}")
    save("med_singly", {"croppable": croppable, "direct": direct, "ratio": croppable / sum(direct)})


@app.command(hidden=True)
def measure(repeats: int, only: str) -> None:
    """One JSON line per case."""
    keep_freed_memory()
    ranks = Ranks()
    train = random_triples(ENTITIES, TRIPLES, RELATIONS, ranks)
    for scorer, negatives, loss in CASES:
        if only not in f"{scorer}-{negatives}-{loss}":
            continue
        jobs = [bare_job(stage(scorer, negatives, loss, c), train, ENTITIES, RELATIONS, ranks) for c in (False, True)]
        wall: list[list[float]] = [[], []]
        cpu: list[list[float]] = [[], []]
        for index in range(repeats + 1):
            for i, job in enumerate(jobs):
                started, worked = time.monotonic(), time.process_time()
                train_step(job, Progress(step=index), 0)
                if index:
                    wall[i].append(time.monotonic() - started)
                    cpu[i].append(time.process_time() - worked)
        plain, croppable = map(statistics.median, wall)
        row = {"scorer": scorer, "negatives": negatives, "loss": loss, "plain": plain, "croppable": croppable}
        row |= {"ratio": statistics.median(b / a for a, b in zip(*wall, strict=True))}
        row |= {"cpu_ratio": statistics.median(b / a for a, b in zip(*cpu, strict=True))}
        row |= {"peak": status_bytes("VmHWM"), "threads": torch.get_num_threads()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app()
