"""`distkgd ablate`: a sweep on Ray, which is a table of ablations, or a search for hyper-parameters."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from distkgd.commands.cli import imports, terminal


def main(
    sweep: Annotated[Path, typer.Argument(help="The sweep: a YAML file, or a shipped one (distkgd configs).")],
    out: Annotated[Path | None, typer.Option(help="Its folder; default runs/<name of the sweep>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the sweep in that folder.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2, in place of the sweep's.")] = None,
    cpus_per_trial: Annotated[int, typer.Option(min=1, help="CPUs, and threads, of each trial.")] = 1,
    gpus_per_trial: Annotated[float, typer.Option(min=0, help="GPUs of each trial; 0: device auto is the CPU.")] = 0.0,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default RAY_ADDRESS, or Ray here.")] = None,
) -> None:
    """Run every trial of a sweep that is not over, side by side on Ray, and print the table.

    Example:

      distkgd ablate ablations/codex-s/dualde_table7 --seeds 0,1,2
    """
    with imports():
        from rich.console import Console

        from distkgd.pipeline.sweep.config import load_sweep, with_seeds
        from distkgd.pipeline.sweep.report import table
        from distkgd.pipeline.sweep.sweep import Slots, run_sweep
    config, base = load_sweep(sweep)
    if seeds is not None:
        config = with_seeds(config, seeds)
    slots = Slots(address, cpus_per_trial, gpus_per_trial)
    folder = out or Path("runs") / config.name
    report = run_sweep(config, base, folder, resume=resume, slots=slots, display=terminal())
    Console(width=None if sys.stdout.isatty() else 160).print(table(report))
