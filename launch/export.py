"""Write a finished model in a format that other programs read, in flat memory.

python launch/export.py RUN/stages/student OUT [--format safetensors]
"""

from pathlib import Path
from typing import Annotated

import typer

from distkgd.display import Display
from distkgd.distributed.ranks import Ranks
from distkgd.export import FORMATS, export_model
from distkgd.launching import launch


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    format_: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = "safetensors",
) -> None:
    """Write one file per table, the names of its rows, and config.json."""

    def body(ranks: Ranks, display: Display) -> None:
        files = export_model(model, out, format_, ranks)
        size = sum(file.stat().st_size for file in files)
        tables = sum(file.stat().st_size for file in files if file.suffix not in (".tsv", ".json"))
        display.line(
            f"written: {out} ({', '.join(file.name for file in files)}; {size / 1e6:,.1f} MB, tables {tables:,} bytes)"
        )

    launch(body, device="cpu")


if __name__ == "__main__":
    typer.run(main)
