"""How fast we are beside published packages, in one run, as ratios, and beside what this machine could do.

python -m benchmarks.side_by_side --quick --json bench.json        # all tasks, small, within 5 minutes on 2 cores
python -m benchmarks.side_by_side [--task train/transe --task load]  # in full, into benchmarks/results/bench.json
python -m benchmarks.side_by_side inference [--run runs/demo]        # a teacher and its students answer all test
queries
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

from benchmarks.side_by_side.results import TOLERANCE, fallen, notes, read_rows, table
from benchmarks.side_by_side.run import measure, save
from benchmarks.side_by_side.tasks import FULL, QUICK, all_tasks
from distkgd.commands.cli import run_main
from distkgd.common.console import Display
from distkgd.common.paths import check_file

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results" / "bench.json"


def main(
    tasks: Annotated[list[str] | None, typer.Argument(metavar="[TASK]...", help="The same as --task.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, at most 5 minutes on 2 cores.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write these rows here, and nowhere else.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task or the beginning of several; repeatable.")] = None,
    run: Annotated[Path | None, typer.Option(help="Measure the inference of this finished run's models.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only name the tasks.")] = False,
    compare: Annotated[Path | None, typer.Option(help="Older results: exit 1 if a ratio has fallen.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share of the older ratio that is still good.")] = TOLERANCE,
    threads: Annotated[int, typer.Option(min=1, help="Of every implementation.")] = os.cpu_count() or 1,
) -> None:
    """Measure, print the table, write JSON; compare ratios with older ones if asked."""
    scale, console = QUICK if quick else FULL, Console(width=None if sys.stdout.isatty() else 140)
    if list_:
        console.print("\n".join(all_tasks(scale, "")), highlight=False)
        return
    older = [] if compare is None else read_rows(compare)
    if json_ is not None:
        check_file(json_)
    rows = measure([*(tasks or []), *(task or [])], scale, Display(True), threads, run)
    save(rows, scale, json_, None if quick or run is not None else RESULTS)
    console.print(table(rows), "\n".join(notes(rows)), sep="\n", markup=False, highlight=False)
    if worse := fallen(older, rows, tolerance):
        console.print("\n".join(["slower than before:", *worse]), markup=False, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_main(main))
