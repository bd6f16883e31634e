"""Files that one process at a time may hold."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distkgd.errors import DistkgdError

SECONDS = 60.0  # for an attempt that was killed to be gone


class BusyError(DistkgdError):
    """A lock that another process holds."""


@contextmanager
def held(path: Path, seconds: float = SECONDS) -> Iterator[None]:
    """The lock at `path`, which the kernel frees with its holder; BusyError when it is not free within `seconds`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with path.open("a", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(f"{path.parent} is in use by another process; end it, or wait.") from None
                time.sleep(0.05)
        yield
