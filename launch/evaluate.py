"""Rank a finished model on a split, in this process or in the ranks torchrun started.

python launch/evaluate.py RUN/stages/student [--split test] [--data NAME_OR_FOLDER] [--ties realistic] [--json FILE]
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from distkgd.cli import launch, run_main
from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.paths import check_file
from distkgd.config.fields import LARGEST
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.breakdowns import RARE_BELOW
from distkgd.evaluation.model_metrics import evaluate_model, table
from distkgd.evaluation.ranking import Filter, Ties


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="Which triples to rank.")] = "test",
    data: Annotated[str | None, typer.Option(help="Public set or folder; default: what it was trained on.")] = None,
    ties: Annotated[Ties, typer.Option(help="Rank of equal scores.")] = "realistic",
    filter_: Annotated[Filter, typer.Option("--filter", help="raw: known answers compete too.")] = "filtered",
    rare: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Relations with fewer training triples are rare.")
    ] = RARE_BELOW,
    query_bits: Annotated[int, typer.Option(help="8: round queries to it, of packed models.")] = 32,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Print metrics overall, by direction, relation category and frequency, degree of the answer, and relation."""

    def body(ranks: Ranks, display: Display) -> None:
        if json_ is not None:
            on_first(ranks, lambda: check_file(json_))
        how: dict[str, Any] = {"ties": ties, "filter_": filter_, "rare_below": rare, "query_bits": query_bits}
        report = evaluate_model(model, ranks, split=split, source=data, **how)
        for text in report.get("warnings", []):
            display.warn(text)
        if ranks.first:
            Console(width=None if sys.stdout.isatty() else 110).print(table(report))
            if json_ is not None:
                json_.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(json_, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
                display.line(f"written: {json_}")

    launch(body)


if __name__ == "__main__":
    sys.exit(run_main(main))
