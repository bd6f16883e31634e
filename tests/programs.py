"""Python programs as processes of their own that need not import anything: forked of one that has done so, once.

`started` is like subprocess.Popen of [sys.executable, *arguments]. Ranks of torchrun are forked in the same way, of
torchrun's own process. A program that is to be seen with a fresh interpreter is started by subprocess.
"""

import atexit
import io
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_alive: list[BaseProcess] = []


def fork_server() -> ForkServerContext:
    """Makes processes that have imported what programs and ranks need."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


class Program:
    """A process that was started, as subprocess.Popen shows one."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Exit code, that of a death by signal being negative; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """`returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """`returncode` once it has ended; subprocess.TimeoutExpired if it has not within `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing, when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def started(
    arguments: Sequence[str], cwd: Path, env: Mapping[str, str], output: Path, errors: Path | None = None
) -> Program:
    """`python ARGUMENTS`, running. arguments: a script and its own, or those of torchrun behind `-m` and its module.

    output: the file to which it adds what it prints; errors: that of its standard error, default `output`.
    """
    files = [str(output), str(errors or output)]
    process = fork_server().Process(target=_run, args=(list(arguments), str(cwd), dict(env), files))
    process.start()
    _alive.append(process)
    return Program(process)


def end_programs() -> None:
    """Kill what still runs."""
    for process in _alive:
        process.kill()
        process.join()


def _run(arguments: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(files, 1):
        said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, number)
        os.close(said)
    if arguments[:2] == ["-m", "torch.distributed.run"]:
        _torchrun(arguments[2:])
    else:
        run_script(arguments)


def run_script(arguments: list[str]) -> None:
    """A script as the main program of this process; ends with what Python does at the end of one."""
    _main(lambda: runpy.run_path(arguments[0], run_name="__main__"), arguments)


def _main(program: Callable[[], object], arguments: list[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # seen as it is said, whatever the fork server was told
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    try:
        program()
    finally:
        atexit._run_exitfuncs()  # which a forked process does not call


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign]
    _main(lambda: run.main(arguments), [run.__file__, *arguments])


def _fork_rank(_handler: Any, command: tuple[str, ...], env: dict[str, str]) -> Program:
    assert command[:2] == (sys.executable, "-u"), command
    process = mp.get_context("fork").Process(target=_rank, args=(list(command[2:]), env))
    process.start()
    return Program(process)


def _rank(arguments: list[str], env: dict[str, str]) -> None:
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # of torchrun; a new program has none
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    Path("/proc/self/comm").write_text(f"rank {env['RANK']}")  # as tools show it: its environment is not to be seen
    run_script(arguments)
