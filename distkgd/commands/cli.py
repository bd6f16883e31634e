"""What all commands share: arguments, imports, ranks, and errors a person can read.

Torch and its like are imported by the bodies of commands alone, so that help and completion come at once.
"""

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from distkgd.common.console import Display
from distkgd.errors import ConfigError, DistkgdError, RendezvousError, Stopped

if TYPE_CHECKING:
    from distkgd.distributed.ranks import Ranks

PATIENCE = 1.0  # seconds
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # of a disk, and no file is named

# Of commands that run a plan.
PlanArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file or a shipped config (distkgd configs), and what goes over it; default: the demo.",
    ),
]


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A config path (at most one) and `key=value` overrides, in any order."""
    paths = [a for a in arguments if "=" not in a]
    if len(paths) > 1:
        raise ConfigError(f"Give one config file, not {len(paths)}: {', '.join(paths)}. Overrides look like key=value.")
    return (Path(paths[0]) if paths else None), [a for a in arguments if "=" in a]


def terminal() -> Display:
    """The terminal, silent on every rank but the first; works before the ranks have joined."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return Display(alone or os.environ.get("RANK", "0") == "0")


@contextmanager
def imports() -> Iterator[None]:
    """For the imports of a command, which take seconds: Ctrl-C ends the process at once, whatever they catch."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def guarded(main: Callable[..., None]) -> Callable[..., None]:
    """`main`, but whatever a user can meet ends the process, by `told`."""

    @wraps(main)
    def run(**given: Any) -> None:
        try:
            main(**given)
        except SystemExit:
            raise
        except BaseException as error:
            sys.exit(told(error, terminal()))

    return run


def run_main(main: Callable[..., None], arguments: Sequence[str] | None = None) -> int:
    """Run one command's `main` on a command line (default: this process's); its exit code, as `run_app` has it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded(main))
    return run_app(app, arguments)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None, name: str | None = None) -> int:
    """Run an app of `guarded` commands on a command line (default: this process's); its exit code.

    Whatever a user can meet ends in one line on standard error: wrong input and places that cannot be written with 2,
    Ctrl-C with 130, a stop with 128 + its signal. Our own mistakes are raised. name: of the program, in its help.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name ends a run on a terminal that cannot show it
    if broken := [argument for argument in given if argument.encode(errors="replace").decode() != argument]:
        terminal().error(f"{broken[0]!r} is not UTF-8; give it in the encoding of this terminal.")
        return 2
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what the doors set for their imports is over
    try:
        app(args=given, prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def told(error: BaseException, display: Display) -> int:
    """Say in one line what has ended a launcher, and return its exit code; what no user can have done is raised."""
    match error:
        case Stopped():
            display.line(str(error))
            return 128 + error.signal_number
        case KeyboardInterrupt():
            display.line("Interrupted; a run of distill, chain or ablate that had begun goes on with --resume.")
            return 128 + int(signal.SIGINT)
        case RendezvousError():
            Display(True).error(str(error))
        case DistkgdError():
            display.error(str(error))
            if not display.active:  # torchrun ends all ranks with the first that is gone: the first one has its say
                time.sleep(PATIENCE)
        case BrokenPipeError() if _unread():
            pass
        case OSError() if error.filename is not None or error.errno in FULL:
            where = f"{error.filename}: " if error.filename is not None else ""
            Display(True).error(f"{where}{error.strerror or error}.")  # by whichever rank has met it
        case _:
            raise error
    return 2


def _unread() -> bool:
    """Whether nobody reads standard output any more; then what is left of it goes nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def tell_torchrun(error: Exception, display: Display) -> None:
    """Leave for torchrun, where it has started this rank, the one line that its summary shows of it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    where = "" if display.log is None else f" (its log: {display.log})"
    text = f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}{where}"
    content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(file).write_text(json.dumps(content), encoding="utf-8")


def launch(body: Callable[["Ranks", Display], int | None], device: str = "auto", threads: int = 0) -> NoReturn:
    """Join the ranks, run `body`, leave with the exit code that it returns (None: 0), or as `told` says."""
    with imports():
        import torch

        from distkgd.distributed.ranks import join_ranks, leave_ranks
        from distkgd.kernels.memory import keep_freed_memory
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    display = terminal()
    code, ranks = 0, None
    try:
        ranks = join_ranks(device)
        code = body(ranks, display) or 0
        leave_ranks(ranks)
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            tell_torchrun(error, display)
        code = told(error, display)
        if isinstance(error, Stopped) and ranks is not None:
            leave_ranks(ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks is not None and ranks.world > 1:
        # gloo's threads can abort the interpreter while it finalises.
        os._exit(code)
    sys.exit(code)
