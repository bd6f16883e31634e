"""`distkgd export`: a finished model, or a crop of it, in a format that other programs read."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks

FORMATS = "safetensors (default), numpy, sparse, packed, parquet, faiss, onnx, pykeen, projector or word2vec."


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path | None, typer.Argument(help="A folder that does not exist yet; --push needs none.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help=FORMATS)] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers per entity.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Round the entities' numbers to so many (1, 2, 3, 4, 8, 16, 32); default: 8."),
    ] = None,
    relation_bits: Annotated[int | None, typer.Option(help="Round the relations' numbers, likewise.")] = None,
    group: Annotated[int | None, typer.Option(min=1, help="Columns of a row that share a step; default: all.")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload it to Hugging Face's hub, as OWNER/NAME.")] = None,
) -> None:
    """Write a finished model, or a crop of it, in a format that other programs read.

    The tables, the names of their rows, config.json, and README.md. With any option of bits, in format packed.

    Examples:

      distkgd export runs/demo/stages/student exported --format numpy
      distkgd export runs/demo/stages/teacher cropped --dim 32
      distkgd export runs/demo/stages/teacher packed --bits 4
      distkgd export runs/demo/stages/student --push me/my-graph
    """
    with imports():
        from distkgd.errors import ConfigError
        from distkgd.evaluation.packing_cost import cost_of_packing
        from distkgd.kernels.quantiser import Rounding
        from distkgd.models.export import export_model
        from distkgd.models.remote import push_to_hub
    given = {"bits": bits, "relation_bits": relation_bits, "group": group}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rounding = Rounding(**asked) if asked else None
    kind = ("packed" if asked else "safetensors") if format_ is None else format_

    def body(ranks: "Ranks", display: "Display") -> None:
        if push is None and out is None:
            raise ConfigError("say where the export goes: OUT, a folder that does not exist yet, or --push OWNER/NAME.")
        if push is not None and kind == "pykeen":
            raise ConfigError("an export for PyKEEN is a pickle, which is not pushed; choose another format.")
        with TemporaryDirectory(prefix="distkgd-") as scratch:
            folder = out or Path(scratch) / "export"
            files = export_model(model, folder, kind, ranks, dim, rounding)
            for text in _told(folder, files):
                display.line(text)
            if kind == "packed":
                display.line(cost_of_packing(model, folder, ranks, dim))
            if push is not None:
                display.line(f"pushed: {push_to_hub(folder, push)}")

    launch(body, device="cpu")


def _told(folder: Path, files: "Sequence[Path]") -> "Iterator[str]":
    """What was written, and what of it is widened."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in files)
    tables = sum((folder / file).stat().st_size for of_table in config["files"].values() for file in of_table)
    names = ", ".join(str(file.relative_to(folder)) for file in files)
    yield f"written: {folder} ({names}; {size / 1e6:,.1f} MB, tables {tables:,} bytes)"
    yield from config.get("widened", [])
