"""Run a plan on Ray: the same as launch/distill.py, every stage a gang of actors, independent stages side by side.

python launch/chain.py [CONFIG.yaml] [key=value …] [--data NAME_OR_FOLDER] [--out DIR] [--resume] [--workers N]
ray job submit --working-dir . -- python launch/chain.py configs/wn18rr/dualde_complex.yaml --out /shared/runs/first
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated

import typer

from distkgd.cli import run_main, split_arguments, terminal
from distkgd.pipeline.config import free_batches, load_config
from distkgd.pipeline.ray.driver import run_chain
from distkgd.pipeline.ray.stage_scheduler import Options
from distkgd.reporting.report import show

DEFAULT = Path(__file__).resolve().parent.parent / "configs/default.yaml"  # the demo


def main(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...")] = None,
    data: Annotated[str | None, typer.Option(help="Public set or folder, in place of the config's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, seen by all nodes; default runs/<config name>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the run folder.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Of each stage, one per GPU or --cpus-per-worker; 0: share.")] = 0,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Also its threads, unless the config says.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a stage is started again after a death.")] = 3,
    wait: Annotated[float, typer.Option(min=0, help="Seconds for room for all workers, then fewer do.")] = 60,
    address: Annotated[str | None, typer.Option(help="Of a cluster; default RAY_ADDRESS, else this machine.")] = None,
) -> None:
    """Run a plan on Ray and print its table."""
    display, options = terminal(), Options(workers, cpus_per_worker, retries, wait)
    path, overrides = split_arguments(arguments or [])
    config = load_config(path or DEFAULT, overrides, data)
    folder = out or Path("runs") / config.name
    how = {"resume": resume, "address": address, "options": options, "display": display}
    report = run_chain(config, folder, **how, free=free_batches(path, overrides))
    show(report, folder, display)


if __name__ == "__main__":
    sys.exit(run_main(main))
