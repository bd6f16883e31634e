"""`distkgd report`: report.html of a finished run, made again."""

from pathlib import Path
from typing import Annotated

import typer

from distkgd.commands.cli import imports, terminal


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, with its report.json.")],
    data: Annotated[str | None, typer.Option(help="The run's data set, where it is no longer where it was.")] = None,
    queries: Annotated[int | None, typer.Option(min=0, help="Asked of the models; default: as the run has it.")] = None,
) -> None:
    """Write RUN/report.html and frontier.html again, from the files of the run folder.

    Example:

      distkgd report runs/demo --queries 200
    """
    with imports():
        from distkgd.reporting.html import remake
    path, notes = remake(run, data, queries)
    for note in notes:
        terminal().warn(note)
    terminal().line(f"report: {path}")
