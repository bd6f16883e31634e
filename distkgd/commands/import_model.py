"""`distkgd import`: a model folder of a model that another library trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks


def main(
    source: Annotated[str, typer.Argument(help="LIBRARY:PATH; libraries: pykeen, libkge, rotate, dglke, plain.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    data: Annotated[str | None, typer.Option(help="Data set whose entities, in its order, the rows become.")] = None,
    names: Annotated[Path | None, typer.Option(help="Folder of the names' files, where they are elsewhere.")] = None,
    scorer: Annotated[str | None, typer.Option(help="The scorer, where the files do not say it.")] = None,
    margin: Annotated[float | None, typer.Option(help="Its margin, likewise (plain).")] = None,
    norm: Annotated[int | None, typer.Option(help="Its norm, 1 or 2, likewise.")] = None,
    layout: Annotated[
        Literal["interleaved", "halves"] | None, typer.Option(help="Of pairs of numbers (plain).")
    ] = None,
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Run what a pickle says.")] = False,
) -> None:
    """Make a model folder of a model that another library trained; its scores stay what they are.

    Examples:

      distkgd import pykeen:results imported --trust-pickle --data wn18rr
      distkgd import rotate:models/RotatE_wn18rr_0 imported --names data/wn18rr
    """
    with imports():
        from distkgd.data import anchored, load_graph
        from distkgd.errors import UnsupportedError
        from distkgd.models.importers import Given, import_model

    def body(ranks: "Ranks", display: "Display") -> None:
        if ranks.world > 1:
            raise UnsupportedError(f"an import runs in one process, not in {ranks.world}; start it without torchrun.")
        given = Given(scorer, margin, norm, layout, names, trust_pickle)
        graph = None if data is None else load_graph(data)
        model, notes = import_model(source, out, given, ranks, graph, "" if data is None else anchored(data))
        for note in notes:
            display.line(note)
        display.line(f"written: {out} ({model.scorer}, {len(model.entity):,} entities)")

    launch(body, device="cpu")
