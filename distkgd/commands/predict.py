"""`distkgd predict`: a finished model asked for the missing end of a triple."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    relation: Annotated[
        str | None, typer.Option(help="Name or label, also loosely written or the end of a path.")
    ] = None,
    head: Annotated[list[str] | None, typer.Option(help="Name or label, also several; asks for tails.")] = None,
    tail: Annotated[list[str] | None, typer.Option(help="Name or label, also several; asks for heads.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of answers.")] = 10,
    data: Annotated[str | None, typer.Option(help="Where to look known triples up; default: its own data.")] = None,
    exclude_known: Annotated[bool, typer.Option("--exclude-known", help="Leave known triples out.")] = False,
    query_bits: Annotated[int, typer.Option(help="8: round queries to it, of packed models.")] = 32,
    ids: Annotated[bool, typer.Option("--ids", help="Whole numbers are row numbers, not names.")] = False,
    questions: Annotated[
        Path | None, typer.Option(help="File with two of the columns head, relation, tail: .parquet, .csv or .tsv.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --questions: file of their answers, likewise.")] = None,
) -> None:
    """Ask a finished model: the best answers to (head, relation, ?) or (?, relation, tail).

    Exit code 1 where some names are not known, 2 where none is.

    Examples:

      distkgd predict runs/demo/stages/student --head module:json --relation imports --top 5
      distkgd predict runs/demo/stages/student --relation inherits --tail class:str --tail class:int --exclude-known
      distkgd predict runs/demo/stages/student --questions asked.parquet --out answers.parquet
    """
    with imports():
        from rich.console import Console

        from distkgd.common.paths import check_file
        from distkgd.errors import ConfigError, DataError
        from distkgd.evaluation.prediction import data_of, predict_each, table
        from distkgd.evaluation.questions_file import answer_file
        from distkgd.evaluation.trained_model import load
        from distkgd.models.model_folder import load_model

    if (questions is None) != (out is None) or (questions is None) == (relation is None):
        raise ConfigError("give --relation with --head or --tail, or --questions with --out.")
    if questions is not None and (head or tail):
        raise ConfigError("--questions holds the questions; leave --head and --tail out.")

    def answer(ranks: "Ranks", display: "Display", asked: Path, path: Path) -> int:
        if ranks.world > 1:
            raise ConfigError("--questions is answered by one process; leave torchrun out.")
        check_file(path, "--out")
        m = load(model, data=data, query_bits=query_bits)
        done = answer_file(m, asked, path, k=top, exclude_known=exclude_known, ids=ids)
        display.line(f"{done.questions:,} questions, {done.errors:,} of them with an error: {path}")
        return 0 if not done.errors else 1 if done.errors < done.questions else 2

    def body(ranks: "Ranks", display: "Display") -> int:
        if questions is not None and out is not None:
            return answer(ranks, display, questions, out)
        loaded = load_model(model, ranks)
        graph, note = data_of(loaded, str(model), data)
        console = Console(width=None if sys.stdout.isatty() else 110, quiet=not ranks.first)
        asked: dict[str, Any] = {
            "relation": relation,
            "top": top,
            "exclude_known": exclude_known,
            "ids": ids,
            "query_bits": query_bits,
        }
        answers = list(predict_each(loaded, graph, head, tail, **asked))
        for found in answers:
            if isinstance(found, DataError):
                display.error(str(found))
                continue
            for line in found.notes:
                display.line(line)
            console.print(found.question, markup=False, highlight=False, soft_wrap=True)
            console.print(table(found))
        if note:
            display.line(note)
        unknown = sum(isinstance(found, DataError) for found in answers)
        return 0 if not unknown else 1 if unknown < len(answers) else 2

    launch(body)
