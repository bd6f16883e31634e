"""Ask a finished model for the missing end of a triple.

python launch/predict.py RUN/stages/student --head "dog" --relation "hypernym" [--top 10] [--exclude-known]
python launch/predict.py RUN/stages/student --relation "hypernym" --tail "animal"
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distkgd.display import Display
from distkgd.distributed.ranks import Ranks
from distkgd.launching import launch
from distkgd.model_folder import load_model
from distkgd.predict import data_of, predict, table


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    relation: Annotated[str, typer.Option(help="Name or label, also loosely written or the end of a path.")],
    head: Annotated[str | None, typer.Option(help="Name or label; leave out to ask for heads.")] = None,
    tail: Annotated[str | None, typer.Option(help="Name or label; leave out to ask for tails.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of answers.")] = 10,
    data: Annotated[str | None, typer.Option(help="Where to look known triples up; default: its own data.")] = None,
    exclude_known: Annotated[bool, typer.Option("--exclude-known", help="Leave known triples out.")] = False,
) -> None:
    """Print the best answers to (head, relation, ?) or (?, relation, tail)."""

    def body(ranks: Ranks, display: Display) -> None:
        loaded = load_model(model, ranks)
        graph, note = data_of(loaded, str(model), data)
        found = predict(loaded, graph, head=head, relation=relation, tail=tail, top=top, exclude_known=exclude_known)
        for line in [*found.notes, *([note] if note else [])]:
            display.line(line)
        if ranks.first:
            console = Console(width=None if sys.stdout.isatty() else 110)
            console.print(found.question, markup=False, highlight=False, soft_wrap=True)
            console.print(table(found))

    launch(body)


if __name__ == "__main__":
    typer.run(main)
