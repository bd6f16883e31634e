"""What a person at the terminal sees; silent on every rank but the first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Lines, warnings and progress bars on standard error, so that standard output stays for results."""

    def __init__(self, active: bool) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=not active)
        self._active = active

    def line(self, text: str) -> None:
        """One line of progress."""
        self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that the user should read."""
        self._console.print(f"warning: {text}", markup=False, style="yellow", soft_wrap=True)

    def error(self, text: str) -> None:
        """Why nothing came of it."""
        self._console.print(f"error: {text}", markup=False, style="red", soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar of `total` steps, drawn on a terminal alone; moved to a step by what is yielded."""
        if not (self._active and self._console.is_terminal):
            yield lambda step: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda step: progress.update(task, completed=step)
