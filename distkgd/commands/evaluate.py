"""`distkgd evaluate`: a finished model ranked on a split, in this process or in the ranks that torchrun started."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks


def main(
    model: Annotated[str, typer.Argument(help="Folder of a finished stage or of its model, or hf://OWNER/NAME.")],
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="Which triples to rank.")] = "test",
    data: Annotated[str | None, typer.Option(help="Public set or folder; default: what it was trained on.")] = None,
    ties: Annotated[
        Literal["realistic", "optimistic", "pessimistic"], typer.Option(help="Rank of equal scores.")
    ] = "realistic",
    filter_: Annotated[
        Literal["filtered", "raw"], typer.Option("--filter", help="raw: known answers compete too.")
    ] = "filtered",
    rare: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Relations with fewer training triples are rare.")
    ] = 1000,
    query_bits: Annotated[int, typer.Option(help="8: round queries to it, of packed models.")] = 32,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Rank a finished model on a split, and print its metrics.

    Overall, by direction, relation category and frequency, degree of the answer, and relation.

    Examples:

      distkgd evaluate runs/demo/stages/student --split test --json test.json
      distkgd evaluate runs/demo/stages/student --ties pessimistic --filter raw
      torchrun --standalone --nproc-per-node 2 -m distkgd evaluate runs/demo/stages/student
    """
    with imports():
        import json

        from rich.console import Console

        from distkgd.common.files import write_atomic
        from distkgd.common.paths import check_file
        from distkgd.distributed.node_sharing import on_first
        from distkgd.evaluation.model_metrics import evaluate_model, table

    def body(ranks: "Ranks", display: "Display") -> None:
        if json_ is not None:
            on_first(ranks, lambda: check_file(json_))
        how: dict[str, Any] = {"ties": ties, "filter_": filter_, "rare_below": rare, "query_bits": query_bits}
        report = evaluate_model(model, ranks, split=split, source=data, **how)
        for text in report.get("warnings", []):
            display.warn(text)
        if ranks.first:
            Console(width=None if sys.stdout.isatty() else 110).print(table(report))
            if json_ is not None:
                json_.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(json_, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
                display.line(f"written: {json_}")

    launch(body)
