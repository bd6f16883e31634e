"""`distkgd export`: a finished model, or a crop of it, in a format that other programs read."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks

FORMATS = "safetensors (default), numpy, sparse, packed, parquet, faiss, onnx, pykeen, projector or word2vec."

BITS = "Round the entities' numbers to so many (1, 2, 3, 4, 8, 16, 32); default: 8."
PLAIN = {"temperature": 1.0, "weights": None, "normalise": "none"}
LABELS = "In place of tables, so many best answers to each training query: labels of method bkd."


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path | None, typer.Argument(help="A folder that does not exist yet; --push needs none.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help=FORMATS)] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers per entity.")] = None,
    bits: Annotated[int | None, typer.Option(help=BITS)] = None,
    relation_bits: Annotated[int | None, typer.Option(help="Round the relations' numbers, likewise.")] = None,
    group: Annotated[int | None, typer.Option(min=1, help="Columns of a row that share a step; default: all.")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload it to Hugging Face's hub, as OWNER/NAME.")] = None,
    labels: Annotated[int | None, typer.Option(min=1, help=LABELS)] = None,
    temperature: Annotated[float, typer.Option(min=1e-6, help="With --labels: of the softmax of scores.")] = 1.0,
    also: Annotated[list[Path] | None, typer.Option(help="With --labels: another model to average.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="With --labels: of each model, in order.")] = None,
    normalise: Annotated[
        Literal["none", "zscore"], typer.Option(help="With --labels: as method mulde has it.")
    ] = "none",
) -> None:
    """Write a finished model, or a crop of it, in a format that other programs read.

    The tables, the names of their rows, config.json, README.md; with any option of bits packed; with --labels, labels.

    Examples:

      distkgd export runs/demo/stages/student exported --format numpy
      distkgd export runs/demo/stages/teacher cropped --dim 32
      distkgd export runs/demo/stages/teacher packed --bits 4
      distkgd export runs/demo/stages/student --push me/my-graph
      distkgd export runs/demo/stages/teacher labels --labels 64
    """
    with imports():
        from distkgd.errors import ConfigError
        from distkgd.evaluation.packing_cost import cost_of_packing
        from distkgd.kernels.quantiser import Rounding
        from distkgd.models.export import export_model
        from distkgd.models.remote import push_to_hub
    given = {"bits": bits, "relation_bits": relation_bits, "group": group}
    how: dict[str, Any] = {"temperature": temperature, "weights": weight or None, "normalise": normalise}
    if labels is not None or also or how != PLAIN:
        _write_labels([model, *(also or [])], out, labels, how, [format_, dim, push, *given.values()])
        return
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


def _write_labels(
    models: "Sequence[Path]", out: Path | None, k: int | None, how: dict[str, Any], of_tables: "Sequence[Any]"
) -> None:
    """Soft labels in files; `how` as `write_labels` takes it, `of_tables`: options that must not be given."""
    with imports():
        from distkgd.errors import ConfigError, UnsupportedError
        from distkgd.evaluation.soft_labels import write_labels

    def body(ranks: "Ranks", display: "Display") -> None:
        if ranks.world > 1:
            raise UnsupportedError(
                f"labels are written by one process, not by {ranks.world}; start it without torchrun."
            )
        if k is None:
            raise ConfigError(
                "--temperature, --also, --weight and --normalise are for --labels; give it, or drop them."
            )
        if any(option is not None for option in of_tables):
            raise ConfigError("--labels writes no tables; drop the options of format, dim, bits and --push.")
        if out is None:
            raise ConfigError("say where the labels go: OUT, a folder that does not exist yet.")
        number = write_labels(models, out, k=k, **how)
        size = sum(file.stat().st_size for file in out.iterdir())
        display.line(f"written: {out} (labels of {number:,} training queries, {size / 1e6:,.1f} MB)")

    launch(body, device="cpu")


def _told(folder: Path, files: "Sequence[Path]") -> "Iterator[str]":
    """What was written, and what of it is widened."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in files)
    tables = sum((folder / file).stat().st_size for of_table in config["files"].values() for file in of_table)
    names = ", ".join(str(file.relative_to(folder)) for file in files)
    yield f"written: {folder} ({names}; {size / 1e6:,.1f} MB, tables {tables:,} bytes)"
    yield from config.get("widened", [])
