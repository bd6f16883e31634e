"""`distkgd export`: a finished model, or a crop of it, in a format that other programs read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks

FORMATS = "safetensors (default), numpy, sparse, packed, parquet, faiss, onnx or pykeen."


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    format_: Annotated[str | None, typer.Option("--format", help=FORMATS)] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers per entity.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Round the entities' numbers to so many (1, 2, 3, 4, 8, 16, 32); default: 8."),
    ] = None,
    relation_bits: Annotated[int | None, typer.Option(help="Round the relations' numbers, likewise.")] = None,
    group: Annotated[int | None, typer.Option(min=1, help="Columns of a row that share a step; default: all.")] = None,
) -> None:
    """Write a finished model, or a crop of it, in a format that other programs read.

    The tables, the names of their rows, and config.json. With any option of bits, in format packed.

    Examples:

      distkgd export runs/demo/stages/student exported --format numpy
      distkgd export runs/demo/stages/teacher cropped --dim 32
      distkgd export runs/demo/stages/teacher packed --bits 4
    """
    with imports():
        from distkgd.evaluation.packing_cost import cost_of_packing
        from distkgd.kernels.quantiser import Rounding
        from distkgd.models.export import export_model
        from distkgd.models.model_folder import read_json
    given = {"bits": bits, "relation_bits": relation_bits, "group": group}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rounding = Rounding(**asked) if asked else None
    kind = ("packed" if asked else "safetensors") if format_ is None else format_

    def body(ranks: "Ranks", display: "Display") -> None:
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
