"""Make report.html of a finished run again.

python launch/report.py RUN [--data NAME_OR_FOLDER] [--queries 200]
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated

import typer

from distkgd.cli import run_main, terminal
from distkgd.reporting.html import remake


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, with its report.json.")],
    data: Annotated[str | None, typer.Option(help="The run's data set, where it is no longer where it was.")] = None,
    queries: Annotated[int | None, typer.Option(min=0, help="Asked of the models; default: as the run has it.")] = None,
) -> None:
    """Write RUN/report.html and frontier.html from the files of the run folder."""
    path, notes = remake(run, data, queries)
    for note in notes:
        terminal().warn(note)
    terminal().line(f"report: {path}")


if __name__ == "__main__":
    sys.exit(run_main(main))
