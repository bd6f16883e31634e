"""`distkgd ablate`: a sweep on Ray, a table of ablations or a search; `distkgd reproduce`: a paper's table as one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distkgd.commands.cli import imports, terminal

if TYPE_CHECKING:
    from distkgd.pipeline.sweep.config import SweepConfig, Tree
    from distkgd.pipeline.sweep.sweep import Slots


Resume = Annotated[bool, typer.Option(help="Go on with the sweep in that folder.")]
Seeds = Annotated[str | None, typer.Option(help="Such as 0,1,2, in place of the sweep's.")]
Cpus = Annotated[int, typer.Option(min=1, help="CPUs, and threads, of each trial.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of each trial; 0: device auto is the CPU.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster; default RAY_ADDRESS, or Ray here.")]

TABLES = "tables/"  # among the shipped configs, a file per table or figure of a paper


def main(
    sweep: Annotated[Path, typer.Argument(help="The sweep: a YAML file, or a shipped one (distkgd configs).")],
    out: Annotated[Path | None, typer.Option(help="Its folder; default runs/<name of the sweep>.")] = None,
    resume: Resume = False,
    seeds: Seeds = None,
    cpus_per_trial: Cpus = 1,
    gpus_per_trial: Gpus = 0.0,
    address: Address = None,
) -> None:
    """Run every trial of a sweep that is not over, side by side on Ray, and print the table.

    Example:

      distkgd ablate ablations/codex-s/dualde_table7 --seeds 0,1,2
    """
    with imports():
        from distkgd.pipeline.sweep.config import load_sweep, with_seeds
        from distkgd.pipeline.sweep.sweep import Slots
    config, base = load_sweep(sweep)
    if seeds is not None:
        config = with_seeds(config, seeds)
    _run(config, base, out, resume, Slots(address, cpus_per_trial, gpus_per_trial))


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Such as dualde-table3; default: list all.")] = None,
    size: Annotated[Literal["cpu", "paper"], typer.Option(help="For two cores, or the paper's own, for GPUs.")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it trains and how long that takes here.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Its folder; default runs/NAME-SIZE.")] = None,
    resume: Resume = False,
    seeds: Seeds = None,
    cpus_per_trial: Cpus = 1,
    gpus_per_trial: Gpus = 0.0,
    address: Address = None,
) -> None:
    """Train a table or figure of the papers in the papers' own form, and print it beside the published figures.

    Examples:

      distkgd reproduce
      distkgd reproduce dualde-table3 --dry-run
      distkgd reproduce dualde-table3 --size paper --gpus-per-trial 1
    """
    with imports():
        from distkgd.config.shipped import about, shipped
        from distkgd.errors import ConfigError
        from distkgd.pipeline.sweep.config import load_sweep, with_seeds
        from distkgd.pipeline.sweep.forecast import forecast_trials
        from distkgd.pipeline.sweep.sweep import Slots, found_from_anywhere, table_of
    tables = {one.removeprefix(TABLES): path for one, path in shipped().items() if one.startswith(TABLES)}
    if name is None:
        width = max(map(len, tables))
        typer.echo("\n".join(f"{one:{width}}  {about(path)}".rstrip() for one, path in tables.items()))
        return
    if name not in tables:
        raise ConfigError(f"No table is called {name!r}; there are: {', '.join(tables)}.")
    config, base = load_sweep(tables[name], cpu=size == "cpu")
    config = config.model_copy(update={"name": f"{name}-{size}"})
    if seeds is not None:
        config = with_seeds(config, seeds)
    if dry_run:
        forecast_trials(table_of(config, found_from_anywhere(base)), terminal())
        return
    _run(config, base, out, resume, Slots(address, cpus_per_trial, gpus_per_trial))


def _run(config: "SweepConfig", base: "Tree", out: Path | None, resume: bool, slots: "Slots") -> None:
    from rich.console import Console

    from distkgd.pipeline.sweep.report import table
    from distkgd.pipeline.sweep.sweep import run_sweep

    folder = out or Path("runs") / config.name
    report = run_sweep(config, base, folder, resume=resume, slots=slots, display=terminal())
    Console(width=None if sys.stdout.isatty() else 160).print(table(report))
