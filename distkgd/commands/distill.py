"""`distkgd distill`: a plan, in this process or in the ranks that torchrun started."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distkgd.commands.cli import PlanArguments, imports, launch, split_arguments

if TYPE_CHECKING:
    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks


def main(
    arguments: PlanArguments = None,
    data: Annotated[str | None, typer.Option(help="Public set, folder, or one file of triples.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<config name>.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the run in the run folder; its student may have more epochs now.")
    ] = False,
    to: Annotated[int | None, typer.Option(help="Without a config: numbers per entity of the student.")] = None,
    bits: Annotated[int | None, typer.Option(help="With --to: bits of each of these numbers; default 32.")] = None,
    max_mb: Annotated[float | None, typer.Option(help="Budget: megabytes of the exported student.")] = None,
    max_ms_per_query: Annotated[float | None, typer.Option(help="Budget: of a top-10 query, here.")] = None,
    min_retained: Annotated[float | None, typer.Option(help="Budget: share of the teacher's valid MRR.")] = None,
    split_seed: Annotated[int | None, typer.Option(min=0, help="Of the split of one file; default 0.")] = None,
    allow_unseen: Annotated[bool, typer.Option(help="Hold out entities that train lacks, too.")] = False,
    columns: Annotated[str | None, typer.Option(help="Order in --data's files, as head,tail,relation.")] = None,
    literals: Annotated[bool, typer.Option(help="Literals of RDF in --data are entities, too.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say plan, memory, time and bytes; train and write nothing.")
    ] = False,
) -> None:
    """Train a teacher, its student and the student's twin without a teacher, and print their table.

    Examples:

      distkgd distill --data my_triples.tsv --to 32        # no config: split, chosen by rules, forecast, trained
      distkgd distill --data my_triples.tsv --max-mb 5     # the best numbers and bits that 5 MB carry
      distkgd distill wn18rr/dualde_complex student.dim=32 --dry-run
      torchrun --standalone --nproc-per-node 2 -m distkgd distill wn18rr/dualde_complex
    """
    with imports():
        from distkgd.config.shipped import DEFAULT
        from distkgd.pipeline.autoconfig import Budget, request_of, run_config, run_own
        from distkgd.pipeline.config import free_batches, load_config
        from distkgd.reporting.report import show
    path, overrides = split_arguments(arguments or [])
    budget = Budget(max_mb, max_ms_per_query, min_retained)
    split: dict[str, Any] = {"seed": split_seed, "allow_unseen": allow_unseen, "columns": columns, "literals": literals}
    request = request_of(path, overrides, data, to=to, bits=bits, budget=budget, **split)
    config = load_config(path or DEFAULT, overrides, data) if request is None else request.machine()

    def body(ranks: "Ranks", display: "Display") -> int:
        how: dict[str, Any] = {"ranks": ranks, "display": display, "out": out, "resume": resume, "dry_run": dry_run}
        free = free_batches(path, overrides)
        ended = run_config(config, free=free, **how) if request is None else run_own(request, **how)
        if ranks.first and ended.report is not None:
            show(ended.report, ended.folder, display)
        return ended.code

    launch(body, config.device, config.threads)
