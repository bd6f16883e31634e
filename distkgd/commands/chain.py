"""`distkgd chain`: a plan on Ray, every stage a gang of actors, independent stages side by side."""

from pathlib import Path
from typing import Annotated

import typer

from distkgd.commands.cli import PlanArguments, imports, split_arguments, terminal


def main(
    arguments: PlanArguments = None,
    data: Annotated[str | None, typer.Option(help="Public set or folder, in place of the config's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, seen by all nodes; default runs/<config name>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the run folder.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Of each stage, one per GPU or --cpus-per-worker; 0: share.")] = 0,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Also its threads, unless the config says.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a stage is started again after a death.")] = 3,
    wait: Annotated[float, typer.Option(min=0, help="Seconds for room for all workers, then fewer do.")] = 60,
    address: Annotated[str | None, typer.Option(help="Of a cluster; default RAY_ADDRESS, else this machine.")] = None,
) -> None:
    """Run a plan on Ray, independent stages side by side, and print its table.

    Examples:

      distkgd chain umls/chain_bkd_complex --out runs/ray_chain
      ray job submit --working-dir . -- python -m distkgd chain wn18rr/dualde_complex --out /shared/runs/first
    """
    with imports():
        from distkgd.config.shipped import DEFAULT
        from distkgd.pipeline.config import free_batches, load_config
        from distkgd.pipeline.ray.driver import run_chain
        from distkgd.pipeline.ray.stage_scheduler import Options
        from distkgd.reporting.report import show
    display, options = terminal(), Options(workers, cpus_per_worker, retries, wait)
    path, overrides = split_arguments(arguments or [])
    config = load_config(path or DEFAULT, overrides, data)
    folder = out or Path("runs") / config.name
    free = free_batches(path, overrides)
    report = run_chain(config, folder, resume=resume, address=address, options=options, display=display, free=free)
    show(report, folder, display)
