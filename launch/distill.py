"""Run a plan: teacher, student and the direct baseline, in this process or in the ranks torchrun started.

python launch/distill.py [CONFIG.yaml] [key=value …] [--data NAME_OR_FOLDER] [--out DIR] [--resume]
python launch/distill.py --data my_triples.tsv --to 32        # no config: split, chosen by rules, forecast, trained
python launch/distill.py --data my_triples.tsv --max-mb 5     # the best numbers and bits that 5 MB carry
torchrun --standalone --nproc-per-node 2 launch/distill.py configs/wn18rr/dualde_complex.yaml student.dim=32
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated

import typer

from distkgd.cli import launch, run_main, split_arguments
from distkgd.common.console import Display
from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.autoconfig import Budget, request_of, run_config, run_own
from distkgd.pipeline.config import free_batches, load_config
from distkgd.reporting.report import show

DEFAULT = Path(__file__).resolve().parent.parent / "configs/default.yaml"  # the demo


def main(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...")] = None,
    data: Annotated[str | None, typer.Option(help="Public set, folder, or one file of triples.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<config name>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the run folder.")] = False,
    to: Annotated[int | None, typer.Option(help="Without a config: numbers per entity of the student.")] = None,
    bits: Annotated[int | None, typer.Option(help="With --to: bits of each of these numbers; default 32.")] = None,
    max_mb: Annotated[float | None, typer.Option(help="Budget: megabytes of the exported student.")] = None,
    max_ms_per_query: Annotated[float | None, typer.Option(help="Budget: of a top-10 query, here.")] = None,
    min_retained: Annotated[float | None, typer.Option(help="Budget: share of the teacher's valid MRR.")] = None,
    split_seed: Annotated[int | None, typer.Option(min=0, help="Of the split of one file; default 0.")] = None,
    allow_unseen: Annotated[bool, typer.Option(help="Hold out entities that train lacks, too.")] = False,
    columns: Annotated[str | None, typer.Option(help="Order in --data's files, as head,tail,relation.")] = None,
    literals: Annotated[bool, typer.Option(help="Literals of RDF in --data are entities, too.")] = False,
) -> None:
    """Run a plan and print its table."""
    path, overrides = split_arguments(arguments or [])
    budget = Budget(max_mb, max_ms_per_query, min_retained)
    split = {"seed": split_seed, "allow_unseen": allow_unseen, "columns": columns, "literals": literals}
    request = request_of(path, overrides, data, to=to, bits=bits, budget=budget, **split)
    config = load_config(path or DEFAULT, overrides, data) if request is None else request.machine()

    def body(ranks: Ranks, display: Display) -> int:
        how, free = (ranks, display, out, resume), free_batches(path, overrides)
        folder, report, code = run_config(config, *how, free) if request is None else run_own(request, *how)
        if ranks.first and report is not None:
            show(report, folder, display)
        return code

    launch(body, config.device, config.threads)


if __name__ == "__main__":
    sys.exit(run_main(main))
