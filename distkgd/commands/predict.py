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
    model: Annotated[str, typer.Argument(help="Folder of a finished stage or of its model, or hf://OWNER/NAME.")],
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

        from distkgd.errors import ConfigError, DataError
        from distkgd.evaluation.prediction import data_of, predict_each, table
        from distkgd.models.model_folder import load_model
        from distkgd.models.remote import local_model

    file = questions is not None
    if file != (out is not None) or file == (relation is not None) or (file and (head or tail)):
        raise ConfigError("give --relation with --head or --tail, or in their place --questions with --out.")
    how: dict[str, Any] = {"exclude_known": exclude_known, "ids": ids}

    def body(ranks: "Ranks", display: "Display") -> int:
        if questions is not None and out is not None:
            return answer(model, questions, out, ranks, display, data, query_bits, how | {"k": top})
        loaded = load_model(local_model(model), ranks)
        graph, note = data_of(loaded, model, data)
        console = Console(width=None if sys.stdout.isatty() else 110, quiet=not ranks.first)
        answers = list(predict_each(loaded, graph, head, tail, query_bits, relation=relation, top=top, **how))
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
        return _exit_code(sum(isinstance(found, DataError) for found in answers), len(answers))

    launch(body)


def answer(
    model: str,
    questions: Path,
    out: Path,
    ranks: "Ranks",
    display: "Display",
    data: str | None,
    query_bits: int,
    how: dict[str, Any],
) -> int:
    """Answer a file of questions into a file; the exit code."""
    from distkgd.common.paths import check_file
    from distkgd.errors import ConfigError
    from distkgd.evaluation.questions_file import answer_file
    from distkgd.evaluation.trained_model import load

    if ranks.world > 1:
        raise ConfigError("--questions is answered by one process; leave torchrun out.")
    check_file(out, "--out")
    done = answer_file(load(model, data=data, query_bits=query_bits), questions, out, **how)
    display.line(f"{done.questions:,} questions, {done.errors:,} of them with an error: {out}")
    return _exit_code(done.errors, done.questions)


def _exit_code(errors: int, questions: int) -> int:
    return 0 if not errors else 1 if errors < questions else 2
