"""Write a finished model, or a crop of it, in a format that other programs read.

python launch/export.py RUN/stages/student OUT [--format safetensors] [--dim 32]
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated

import typer

from distkgd.cli import launch, run_main
from distkgd.common.console import Display
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.int8_cost import cost_of_int8
from distkgd.models.export import FORMATS, export_model


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    format_: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = "safetensors",
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers per entity.")] = None,
) -> None:
    """Write the tables, the names of their rows, and config.json."""

    def body(ranks: Ranks, display: Display) -> None:
        files = export_model(model, out, format_, ranks, dim)
        size = sum(file.stat().st_size for file in files)
        tables = sum(file.stat().st_size for file in files if file.suffix not in (".tsv", ".json", ".md"))
        names = ", ".join(str(file.relative_to(out)) for file in files)
        display.line(f"written: {out} ({names}; {size / 1e6:,.1f} MB, tables {tables:,} bytes)")
        if format_ == "int8":
            display.line(cost_of_int8(model, out, ranks, dim))

    launch(body, device="cpu")


if __name__ == "__main__":
    sys.exit(run_main(main))
