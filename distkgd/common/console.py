"""What a person at the terminal sees; silent on every rank but the first."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distkgd.errors import DistkgdError


class Display:
    """Lines, warnings and progress bars on standard error, so that standard output stays for results."""

    def __init__(self, active: bool) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=not active)
        self.active = active
        self._logs = True
        self._said: list[str] = []  # before there was a log
        self.log: Path | None = None  # the file that the lines of this run are kept in

    def line(self, text: str) -> None:
        """One line of progress, with the time while a run is on."""
        self._keep(text)
        text = text if self.log is None else f"{time.strftime('%H:%M:%S')} {text}"
        self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that the user should read."""
        self._keep(f"warning: {text}")
        self._console.print(f"warning: {text}", markup=False, style="yellow", soft_wrap=True)

    def error(self, text: str) -> None:
        """Why nothing came of it."""
        self._keep(f"error: {text}")
        self._console.print(f"error: {text}", markup=False, style="red", soft_wrap=True)

    @contextmanager
    def kept(self, log: Path, rank: int) -> Iterator[None]:
        """From here on all lines go to a file too, after those said so far; so does the traceback of what ends it.

        rank: the first one's lines are kept, and of others what ends them.
        """
        self.log, self._logs = log, rank == 0
        said, self._said = self._said, []
        if self._logs:
            self._append("".join(said))
        try:
            yield
        except Exception as error:
            if self._logs or not isinstance(error, DistkgdError):  # those are met by all ranks alike
                self._append(_stamped(f"rank {rank}: " + "".join(traceback.format_exception(error)).rstrip()))
            raise

    def _keep(self, text: str) -> None:
        if self.log is None:
            self._said.append(_stamped(text))
        elif self._logs:
            self._append(_stamped(text))

    def _append(self, text: str) -> None:
        if self.log is None:
            return
        try:
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:  # a run does not end for that
            self._console.print(f"warning: {self.log}: {error.strerror}; what is said is no longer kept", markup=False)
            self._logs = False

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar of `total` steps, drawn on a terminal alone; moved to a step by what is yielded."""
        if not (self.active and self._console.is_terminal):
            yield lambda step: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda step: progress.update(task, completed=step)


def _stamped(text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
