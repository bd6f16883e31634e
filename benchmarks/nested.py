"""One nested model of four dims in four widths beside sixteen models trained one by one; no teachers, one seed.

    python benchmarks/nested.py codex-s [--out runs/nested]     # or wn18rr; benchmarks/results/nested_DATA.json

All have the same epochs, batches, negatives, rate and regulariser (those of benchmarks/tables/med_DATA.yaml); runs that
are there already are taken from `--out`. Test MRR is shown; nothing was chosen by it.
"""

import statistics
from pathlib import Path
from typing import Any

import typer
from foundation import save

from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
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


def main(data: str, out: Path = Path("runs/nested"), threads: int = 1) -> None:
    """Train what is not there yet, print every cell, write the results."""

    def trained(name: str, **more: Any) -> StageResult:
        student = COMMON[data] | {"scorer": "complex", "batch_size": 256, "schedule": LINEAR, "relation_bits": 8} | more
        tree = {"data": data, "seed": 0, "student": student, "threads": threads, "baseline": False}
        config = parse_config(tree | {"mlflow": {"enabled": False}, "report": {"html": False}}, name)
        return run_plan(config, graph, Ranks(), out / data / name, resume=True, display=Display(False)).student

    graph = load_graph(data)
    nested = trained("nested", dim=DIMS[-1], method="med", distill=NESTED | WEIGHTS[data])
    seconds, cells = 0.0, []
    for bits in BITS:
        for dim in DIMS:
            direct = trained(f"{dim}x{bits}", dim=dim, bits=bits)
            seconds += direct.train_seconds
            mine, theirs = nested.bits_curve["test"][bits][dim]["mrr"], direct.mrr("test")
            assert mine is not None and theirs is not None
            cells.append({"dim": dim, "bits": bits, "nested": mine, "direct": theirs, "loss": theirs - mine})
            print(f"{dim} x {bits} bit: nested {mine:.4f}, by itself {theirs:.4f}, {mine - theirs:+.4f}", flush=True)
    losses = [cell["loss"] for cell in cells]
    found = {"seconds": nested.train_seconds, "direct_seconds": seconds, "share": nested.train_seconds / seconds}
    found |= {"mean_loss": statistics.mean(losses), "worst_loss": max(losses)}
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    save(f"nested_{data}", found | {"threads": threads, "cells": cells})


if __name__ == "__main__":
    typer.run(main)
