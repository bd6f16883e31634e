"""Write a finished model, or a crop of it, in a format that other programs read.

python launch/export.py RUN/stages/student OUT [--format safetensors] [--dim 32] [--bits 4]
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
from distkgd.evaluation.packing_cost import cost_of_packing
from distkgd.kernels.quantiser import BITS, Rounding
from distkgd.models.export import FORMATS, export_model
from distkgd.models.model_folder import read_json


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    format_: Annotated[
        str | None, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}; default: safetensors.")
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers per entity.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help=f"Round the entities' numbers to so many ({', '.join(map(str, BITS))}); default: 8."),
    ] = None,
    relation_bits: Annotated[int | None, typer.Option(help="Round the relations' numbers, likewise.")] = None,
    group: Annotated[int | None, typer.Option(min=1, help="Columns of a row that share a step; default: all.")] = None,
) -> None:
    """Write the tables, the names of their rows, and config.json. With any option of bits, in format packed."""
    given = {"bits": bits, "relation_bits": relation_bits, "group": group}
    asked = {name: value for name, value in given.items() if value is not None}
    rounding = Rounding(**asked) if asked else None
    kind = ("packed" if asked else "safetensors") if format_ is None else format_

    def body(ranks: Ranks, display: Display) -> None:
        files = export_model(model, out, kind, ranks, dim, rounding)
        size = sum(file.stat().st_size for file in files)
        tables = sum(file.stat().st_size for file in files if file.suffix not in (".tsv", ".json", ".md"))
        names = ", ".join(str(file.relative_to(out)) for file in files)
        display.line(f"written: {out} ({names}; {size / 1e6:,.1f} MB, tables {tables:,} bytes)")
        for text in read_json(out / "config.json").get("widened", []):
            display.line(text)
        if kind == "packed":
            display.line(cost_of_packing(model, out, ranks, dim))

    launch(body, device="cpu")


if __name__ == "__main__":
    sys.exit(run_main(main))
