"""Signals that ask a training loop to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(eq=False)
class StopRequest:
    """The signal that asked this process to stop, or 0."""

    signal_number: int = 0


_listening: list[StopRequest] = []  # the loops of this process


def ask_to_stop(signal_number: int) -> None:
    """What that signal would do to the loops of this process, also to those outside its main thread."""
    for request in list(_listening):
        request.signal_number = signal_number


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
    request = StopRequest()
    before: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, before[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    except ValueError:
        # Not the main thread (a Ray actor): its owner decides when to stop, and says so with `ask_to_stop`.
        before.clear()
    _listening.append(request)
    try:
        yield request
    finally:
        _listening.remove(request)
        for number, handler in before.items():
            signal.signal(number, handler)
