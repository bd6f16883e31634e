"""Make a model folder of a model that another library trained.

python launch/import.py pykeen:RESULTS OUT --trust-pickle --data wn18rr
python launch/import.py rotate:models/RotatE_wn18rr_0 OUT --names data/wn18rr
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from distkgd.cli import launch, run_main
from distkgd.common.console import Display
from distkgd.data import anchored, load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import UnsupportedError
from distkgd.models.importers import IMPORTERS, Given, import_model


def main(
    source: Annotated[str, typer.Argument(help=f"LIBRARY:PATH; libraries: {', '.join(IMPORTERS)}.")],
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
    """Write a model folder whose scores are those of the other library."""

    def body(ranks: Ranks, display: Display) -> None:
        if ranks.world > 1:
            raise UnsupportedError(f"an import runs in one process, not in {ranks.world}; start it without torchrun.")
        given = Given(scorer, margin, norm, layout, names, trust_pickle)
        graph = None if data is None else load_graph(data)
        model, notes = import_model(source, out, given, ranks, graph, "" if data is None else anchored(data))
        for note in notes:
            display.line(note)
        display.line(f"written: {out} ({model.scorer}, {len(model.entity):,} entities)")

    launch(body, device="cpu")


if __name__ == "__main__":
    sys.exit(run_main(main))
