"""One nested model of four dims in four widths beside sixteen models trained one by one; no teachers, one seed.

    python benchmarks/nested.py codex-s [--out runs/nested]     # or wn18rr; benchmarks/results/nested_DATA.json

All have the same epochs, batches, negatives, rate and regulariser (those of benchmarks/tables/med_DATA.yaml); runs that
are there already are taken from `--out`. Test MRR is shown; nothing was chosen by it. What the one costs of the sixteen
is that of their steps, the jobs taking turns in one process.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from foundation import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `benchmarks` is found

from benchmarks.side_by_side.jobs import bare_job, seconds_in_turn
from distkgd.common.console import Display
from distkgd.data import Graph, load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.kernels.memory import keep_freed_memory
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan

DIMS, BITS = (16, 32, 64, 128), (1, 2, 4, 8)
ADAGRAD = {"name": "adagrad", "lr": 0.5}
LINEAR = {"name": "linear", "final": 0.05}
COMMON: dict[str, dict[str, Any]] = {
    "codex-s": {"epochs": 16, "validate_every": 4, "optimizer": ADAGRAD, "regulariser": {"name": "n3", "weight": 0.01}},
    "wn18rr": {
        "reciprocal": False,
        "init_scale": 0.05,
        "epochs": 10,
        "validate_every": 5,
        "negatives": {"kind": "batch", "num": 1024},
        "optimizer": ADAGRAD | {"lr": 0.3},
        "regulariser": {"name": "n3", "weight": 0.05},
    },
}
NESTED = {"mutual": False, "evolution": False, "dynamic": False, "dims": list(DIMS), "bits": list(BITS)}
# The larger a crop, the less its own loss adds to the smaller ones' (benchmarks/LOG.md).
WEIGHTS: dict[str, dict[str, Any]] = {
    "codex-s": {"weights": [1, 0.35, 0.1, 0.03], "small_regulariser": 5},
    "wn18rr": {"weights": [1, 0.35, 0.1, 0.03], "small_regulariser": 3, "sharpness": 0.75},
}


def main(data: str, out: Path = Path("runs/nested"), threads: int = 1, repeats: int = 15) -> None:
    """Train what is not there yet, print every cell, write the results."""
    graph = load_graph(data)
    nested = trained(data, graph, out, threads, "nested")
    cells = []
    for bits in BITS:
        for dim in DIMS:
            direct = trained(data, graph, out, threads, f"{dim}x{bits}")
            mine, theirs = nested.bits_curve["test"][bits][dim]["mrr"], direct.mrr("test")
            assert mine is not None and theirs is not None
            cells.append({"dim": dim, "bits": bits, "nested": mine, "direct": theirs, "loss": theirs - mine})
            print(f"{dim} x {bits} bit: nested {mine:.4f}, by itself {theirs:.4f}, {mine - theirs:+.4f}", flush=True)
    torch.set_num_threads(threads)
    keep_freed_memory()
    jobs = [
        bare_job(students(data)[name], graph.train, graph.num_entities, graph.num_relations, Ranks())
        for name in students(data)
    ]
    whole, *singly = (statistics.median(one) for one in seconds_in_turn(jobs, repeats))
    losses = [cell["loss"] for cell in cells]
    found = {"step_ms": 1000 * whole, "direct_steps_ms": 1000 * sum(singly), "share": whole / sum(singly)}
    found |= {"mean_loss": statistics.mean(losses), "worst_loss": max(losses)}
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    save(f"nested_{data}", found | {"threads": threads, "cells": cells})


def students(data: str) -> dict[str, dict[str, Any]]:
    """{name: its stage}: the nested model, then the sixteen."""
    plain = COMMON[data] | {"scorer": "complex", "batch_size": 256, "schedule": LINEAR, "relation_bits": 8}
    singly = {f"{dim}x{bits}": plain | {"dim": dim, "bits": bits} for bits in BITS for dim in DIMS}
    return {"nested": plain | {"dim": DIMS[-1], "method": "med", "distill": NESTED | WEIGHTS[data]}} | singly


def trained(data: str, graph: Graph, out: Path, threads: int, name: str) -> StageResult:
    """What a student of `students` came to."""
    tree = {"data": data, "seed": 0, "student": students(data)[name], "threads": threads, "baseline": False}
    config = parse_config(tree | {"mlflow": {"enabled": False}, "report": {"html": False}}, name)
    return run_plan(config, graph, Ranks(), out / data / name, resume=True, display=Display(False)).student


if __name__ == "__main__":
    typer.run(main)
