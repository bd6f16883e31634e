"""What a person at the terminal sees; silent on every rank but the first."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar of steps; only drawn on a terminal."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def update(self, step: int) -> None:
        """Move to `step`."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)


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
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        """A progress bar for `total` steps."""
        if not (self._active and self._console.is_terminal):
            yield Bar(None, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield Bar(progress, progress.add_task(name, total=total))
