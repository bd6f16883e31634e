"""What few bits cost in training: a step of a student of few bits beside one of the same dim in float32.

python -m benchmarks.bits [--repeats 15]        # of WN18RR's size; benchmarks/results/bits_step.json
"""

import statistics
from typing import Any

import torch
import typer

from benchmarks.foundation import save
from benchmarks.side_by_side.jobs import bare_job, random_triples, seconds_in_turn
from distkgd.distributed.ranks import Ranks
from distkgd.kernels.memory import keep_freed_memory

ENTITIES, RELATIONS, TRIPLES = 40_943, 11, 86_835
STAGE: dict[str, Any] = {
    "scorer": "complex",
    "batch_size": 256,
    "negatives": {"kind": "batch", "num": 4096},
    "optimizer": {"name": "adagrad", "lr": 0.1},
    "reciprocal": False,
}
TAUGHT: dict[str, Any] = {"method": "bkd", "distill": {"hard_weight": 0.0}}
SIZES = (32, 1, 2, 4)
CASES: dict[str, dict[str, Any]] = {"direct": {}, "taught": TAUGHT}


def main(repeats: int = 15) -> None:
    """Wall seconds of one thread, the steps taking turns in one process; medians of the ratios of neighbours."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ranks, rows = Ranks(), []
    train = random_triples(ENTITIES, TRIPLES, RELATIONS, ranks)
    for dim in (256, 512):
        for name, method in CASES.items():
            stages = [STAGE | method | {"dim": dim, "bits": bits, "relation_bits": min(32, 2 * bits)} for bits in SIZES]
            jobs = [bare_job(one, train, ENTITIES, RELATIONS, ranks, dim if method else 0) for one in stages]
            plain, *others = seconds_in_turn(jobs, repeats)
            for bits, mine in zip(SIZES[1:], others, strict=True):
                ratios = sorted(few / whole for few, whole in zip(mine, plain, strict=True))
                row = {"case": name, "dim": dim, "bits": bits, "ratio": statistics.median(ratios)}
                row |= {"smallest": ratios[0], "largest": ratios[-1]}
                rows.append(row | {"float32_ms": 1000 * statistics.median(plain)})
                spread = f"{row['ratio']:.2f} ({row['smallest']:.2f}–{row['largest']:.2f})"
                whole_ms = f"{rows[-1]['float32_ms']:.0f} ms"
                print(f"{name}, {dim} numbers, {bits} bits: {spread} × the float32 step of {whole_ms}", flush=True)
    save("bits_step", {"batch": 256, "negatives": 4096, "repeats": repeats, "cases": rows})


if __name__ == "__main__":
    typer.run(main)
