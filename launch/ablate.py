"""Run a sweep: a table of ablations, or a search for hyper-parameters, on Ray.

python launch/ablate.py SWEEP.yaml [--out DIR] [--resume] [--seeds 0,1,2] [--cpus-per-trial 1] [--gpus-per-trial 0]
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distkgd.cli import run_main, terminal
from distkgd.pipeline.sweep.config import load_sweep, with_seeds
from distkgd.pipeline.sweep.report import table
from distkgd.pipeline.sweep.sweep import Slots, run_sweep


def main(
    sweep: Annotated[Path, typer.Argument(help="The sweep (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Its folder; default runs/<name of the sweep>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the sweep in that folder.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2, in place of the sweep's.")] = None,
    cpus_per_trial: Annotated[int, typer.Option(min=1, help="CPUs, and threads, of each trial.")] = 1,
    gpus_per_trial: Annotated[float, typer.Option(min=0, help="GPUs of each trial; 0: device auto is the CPU.")] = 0.0,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default RAY_ADDRESS, or Ray here.")] = None,
) -> None:
    """Run every trial that is not over, and print the table."""
    config, base = load_sweep(sweep)
    if seeds is not None:
        config = with_seeds(config, seeds)
    slots = Slots(address, cpus_per_trial, gpus_per_trial)
    folder = out or Path("runs") / config.name
    report = run_sweep(config, base, folder, resume=resume, slots=slots, display=terminal())
    Console(width=None if sys.stdout.isatty() else 160).print(table(report))


if __name__ == "__main__":
    sys.exit(run_main(main))
