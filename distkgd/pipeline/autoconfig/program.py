"""`distkgd.distill` and `distkgd.train`: what `distkgd distill` does, in a program or a notebook."""

import copy
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distkgd.common.console import Display
from distkgd.common.paths import AnyPath
from distkgd.config.tree import apply
from distkgd.distributed.ranks import Ranks, join_ranks, leave_ranks
from distkgd.errors import ConfigError, Stopped
from distkgd.pipeline.autoconfig.command import Outcome, run_config, run_own
from distkgd.pipeline.autoconfig.request import Budget, DistillRequest, request_of
from distkgd.pipeline.config import RunConfig, free_batches, load_config, parse_config
from distkgd.pipeline.finished_run import Run


def distill(
    data: AnyPath,
    to: int | None = None,
    *,
    bits: int | None = None,
    max_mb: float | None = None,
    max_ms_per_query: float | None = None,
    min_retained: float | None = None,
    overrides: Sequence[str] = (),
    out: AnyPath | None = None,
    resume: bool = False,
    split_seed: int | None = None,
    allow_unseen: bool = False,
    columns: str | None = None,
    literals: bool = False,
    show: bool = False,
) -> Run:
    """Train a teacher, a student of `to` numbers per entity and the direct model beside it, all chosen by rules.

    data: one file of triples, which is split, a folder of three, or a public data set by name.
    bits: of each number of the student. max_mb, max_ms_per_query, min_retained: a budget, with `to` or in its place.
    overrides: `key=value` each, put over what the rules choose.
    out: run folder, default runs/NAME. resume: go on with the run that is in it.
    split_seed, allow_unseen, columns, literals: as for `distkgd distill`.
    show: lines and bars of progress on standard error, and the reasons of warnings; else they stand in the report.

    Raises ConfigError, DataError and their like for what cannot be done, before anything is written; ConfigError too
    where no training could meet the budget. After a keyboard interrupt `resume=True` goes on.
    """
    budget = Budget(max_mb, max_ms_per_query, min_retained)
    how: dict[str, Any] = {"seed": split_seed, "allow_unseen": allow_unseen, "columns": columns, "literals": literals}
    request = request_of(None, overrides, str(data), to=to, bits=bits, budget=budget, **how)
    if request is None:
        raise ConfigError(f"say how small the student of {data} shall be: to=32 (numbers per entity), or a budget.")
    return _run_request(request, out, resume, show)


def train(
    config: AnyPath | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    data: AnyPath | None = None,
    out: AnyPath | None = None,
    resume: bool = False,
    show: bool = False,
) -> Run:
    """Run the plan of a config: the path of a YAML file, the same as a mapping, or a `RunConfig`.

    overrides: `key=value` each, put over a file or mapping. data: in place of the config's; of a config file it may
    also be one file of triples, which is split. All else is as in `distill`.
    """
    free: frozenset[str] = frozenset()
    if isinstance(config, RunConfig):
        if overrides:
            raise ConfigError("overrides are for a file or a mapping; a RunConfig has been checked: model_copy it.")
        parsed = config if data is None else config.model_copy(update={"data": str(data)})
    elif isinstance(config, Mapping):
        tree = copy.deepcopy(dict(config)) | ({} if data is None else {"data": str(data)})
        for override in overrides:
            apply(tree, override)
        parsed = parse_config(tree, "the config")
    else:
        path = Path(config)
        request = request_of(path, overrides, None if data is None else str(data))
        if request is not None:
            return _run_request(request, out, resume, show)
        parsed, free = load_config(path, overrides, None if data is None else str(data)), free_batches(path, overrides)
    with one_run(parsed, show) as (ranks, display):
        return _finished(run_config(parsed, ranks, display, _folder(out), resume, free))


def _run_request(request: DistillRequest, out: AnyPath | None, resume: bool, show: bool) -> Run:
    with one_run(request.machine(), show) as (ranks, display):
        return _finished(run_own(request, ranks, display, _folder(out), resume))


@contextmanager
def one_run(config: RunConfig, show: bool) -> Iterator[tuple[Ranks, Display]]:
    """The ranks and the display of a run; the process is left as it was."""
    threads = torch.get_num_threads()
    ranks = join_ranks(config.device)
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        yield ranks, Display(show and ranks.first)
        leave_ranks(ranks)
    except Stopped as stopped:
        leave_ranks(ranks)
        if stopped.signal_number == signal.SIGINT:
            raise KeyboardInterrupt(f"{stopped} In a program: resume=True.") from None
        raise
    finally:
        torch.set_num_threads(threads)


def _folder(out: AnyPath | None) -> Path | None:
    return None if out is None else Path(out)


def _finished(outcome: Outcome) -> Run:
    if outcome.report is None:
        raise ConfigError(outcome.reason)
    return Run(outcome.folder, outcome.report)
