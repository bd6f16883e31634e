"""What RotE, RotH and their like cost in training at 32 numbers: a step of each beside ComplEx's.

python -m benchmarks.low_dim [--repeats 15]     # of WN18RR's size; benchmarks/results/low_dim_step.json
"""

import statistics
from typing import Any

import torch
import typer

from benchmarks.bits import ENTITIES, RELATIONS, TRIPLES
from benchmarks.foundation import save
from benchmarks.side_by_side.jobs import bare_job, random_triples, seconds_in_turn
from distkgd.distributed.ranks import Ranks
from distkgd.kernels.memory import keep_freed_memory

STAGE: dict[str, Any] = {
    "dim": 32,
    "batch_size": 250,  # both ends of each: batches of 500 questions
    "negatives": {"kind": "triple", "num": 50},
    "loss": {"name": "bce"},
    "optimizer": {"name": "adam", "lr": 0.003},
}
ANCHORED = {"negatives": STAGE["negatives"] | {"anchors": 5}}
CASES: dict[str, dict[str, Any]] = {name: {"scorer": name} for name in ("complex", "rote", "refe", "roth", "atth")}
CASES |= {f"{name}, 5 drawn anchors": {"scorer": name} | ANCHORED for name in ("rote", "roth")}


def main(repeats: int = 15) -> None:
    """Triples/s of one thread as shares of ComplEx's, the steps taking turns in one process; medians of neighbours."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ranks, rows = Ranks(), []
    train = random_triples(ENTITIES, TRIPLES, RELATIONS, ranks)
    jobs = [bare_job(STAGE | case, train, ENTITIES, RELATIONS, ranks, 0) for case in CASES.values()]
    plain, *others = seconds_in_turn(jobs, repeats)
    for name, mine in zip(list(CASES)[1:], others, strict=True):
        shares = sorted(complex_ / own for complex_, own in zip(plain, mine, strict=True))
        row = {"case": name, "share": statistics.median(shares), "smallest": shares[0], "largest": shares[-1]}
        rows.append(row | {"complex_ms": 1000 * statistics.median(plain)})
        print(f"{name}: {row['share']:.2f} ({shares[0]:.2f}–{shares[-1]:.2f}) of ComplEx's triples/s", flush=True)
    save("low_dim_step", {"batch": 250, "negatives": 50, "repeats": repeats, "cases": rows})


if __name__ == "__main__":
    typer.run(main)
