"""Run a plan: teacher, student and the direct baseline, in this process or in the ranks torchrun started.

python launch/distill.py [CONFIG.yaml] [key=value …] [--data NAME_OR_FOLDER] [--out DIR] [--resume]
torchrun --standalone --nproc-per-node 2 launch/distill.py configs/wn18rr/dualde_complex.yaml student.dim=32
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distkgd.config import load_config
from distkgd.display import Display
from distkgd.distributed.nodes import shared_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.graph import load_graph
from distkgd.launching import launch, refuse, split_arguments
from distkgd.plan import run_plan
from distkgd.report import table

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "default.yaml"


def main(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...")] = None,
    data: Annotated[str | None, typer.Option(help="Public set or folder, in place of the config's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<config name>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the run folder.")] = False,
) -> None:
    """Run a plan and print its table."""
    try:
        path, overrides = split_arguments(arguments or [])
        config = load_config(path or DEFAULT, overrides, data)
    except ConfigError as error:
        refuse(error)

    def body(ranks: Ranks, display: Display) -> None:
        graph = shared_graph(ranks, lambda: load_graph(config.data))
        for warning in graph.warnings:
            display.warn(warning)
        folder = out or Path("runs") / config.name
        report = run_plan(config, graph, ranks, folder, resume=resume, display=display)
        if ranks.first:
            Console(width=None if sys.stdout.isatty() else 110).print(table(report))
            display.line(f"report: {folder / ('report.html' if config.report.html else 'report.md')}")

    launch(body, config.device, config.threads)


if __name__ == "__main__":
    typer.run(main)
