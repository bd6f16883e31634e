"""What all launchers share: arguments, ranks, and errors a person can read."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from distkgd.display import Display
from distkgd.distributed.ranks import Ranks, join_ranks, leave_ranks
from distkgd.distributed.rendezvous import RendezvousError
from distkgd.errors import ConfigError, DistkgdError, Stopped
from distkgd.kernels.memory import keep_freed_memory
from distkgd.report import table


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A config path (at most one) and `key=value` overrides, in any order."""
    paths = [a for a in arguments if "=" not in a]
    if len(paths) > 1:
        raise ConfigError(f"Give one config file, not {len(paths)}: {', '.join(paths)}. Overrides look like key=value.")
    return (Path(paths[0]) if paths else None), [a for a in arguments if "=" in a]


def terminal() -> Display:
    """The terminal, silent on every rank but the first; works before the ranks have joined."""
    return Display(os.environ.get("RANK", "0") == "0")


def show(report: Mapping[str, Any], folder: Path, display: Display) -> None:
    """Print the table of a finished plan, and where its page lies."""
    Console(width=None if sys.stdout.isatty() else 110).print(table(report))
    page = folder / "report.html"
    display.line(f"report: {page if page.exists() else folder / 'report.md'}")


def refuse(error: DistkgdError) -> NoReturn:
    """Say what is wrong and leave with exit code 2."""
    terminal().error(str(error))
    sys.exit(2)


def launch(body: Callable[[Ranks, Display], int | None], device: str = "auto", threads: int = 0) -> None:
    """Join the ranks, run `body`, leave with the exit code that it returns (None: 0).

    User errors become one line and exit code 2, a stop 128 + its signal.
    """
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    display = terminal()
    code, ranks = 0, None
    try:
        ranks = join_ranks(device)
        code = body(ranks, display) or 0
        leave_ranks(ranks)
    except RendezvousError as error:
        Display(True).error(str(error))
        code = 2
    except DistkgdError as error:
        display.error(str(error))
        code = 2
    except Stopped as stopped:
        display.line(str(stopped))
        if ranks is not None:
            leave_ranks(ranks)
        code = 128 + stopped.signal_number
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks is not None and ranks.world > 1:
        # gloo's threads can abort the interpreter while it finalises.
        os._exit(code)
    sys.exit(code)
