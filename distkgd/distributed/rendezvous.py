"""How the ranks of one generation find each other, and how they know a run folder as their own launch's.

torchrun starts all ranks anew after a death or a change of members, and gives every such generation the same store.
The addresses of the dead lie there under the very keys that the living use, and the number of restarts, which could
tell them apart, does not count changes of members. So each generation draws a prefix of its own and agrees on it.
"""

import json
import os
import time
import uuid
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from distkgd.errors import RendezvousError

POLL_SECONDS = 0.02


def meet(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """`store` under a prefix that only the `world` ranks of this generation know. All of them call it.

    Rank 0 draws the prefix. It tells it to whoever says hello with a fresh nonce, until every rank has confirmed: a
    hello of the dead is answered, too, but nobody listens, and the living say hello over it.
    """
    store = PrefixStore("distkgd", store)
    deadline = time.monotonic() + timeout.total_seconds()
    prefix = _invite(store, world, deadline) if rank == 0 else _ask(store, rank, deadline)
    return PrefixStore(prefix, store)


def _invite(store: Store, world: int, deadline: float) -> str:
    prefix = uuid.uuid4().hex
    missing = list(range(1, world))
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"reply/{store.get(f'hello/{rank}').decode()}", prefix)
        missing = [rank for rank in missing if not store.check([f"confirm/{prefix}/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise RendezvousError(
                f"of {world} ranks these did not come: {', '.join(map(str, missing))}; "
                "look for their errors above or on their machines, and whether those reach this one."
            )
        time.sleep(POLL_SECONDS)
    return prefix


def _ask(store: Store, rank: int, deadline: float) -> str:
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    while not store.check([f"reply/{nonce}"]):
        if time.monotonic() > deadline:
            raise RendezvousError(f"rank {rank} heard nothing from rank 0; look for that one's error.")
        time.sleep(POLL_SECONDS)
    prefix = str(store.get(f"reply/{nonce}"), "ascii")
    store.set(f"confirm/{prefix}/{rank}", "here")
    return prefix


def launch_agent() -> str | None:
    """`process_id` of the torchrun process that started this one. None without it.

    Not TORCHELASTIC_RUN_ID: that is "none" or what a user has typed, perhaps the same each time.
    """
    return process_id(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None


def process_id(pid: int | None = None) -> str | None:
    """A process's machine, number and start, as no other ever has; default: this one's. None where it is not known."""
    pid = os.getpid() if pid is None else pid
    try:
        return f"{machine()}/{pid}/{_started(pid)}"
    except OSError:
        return None  # not Linux, or gone: go on with --resume


def is_alive(process: str) -> bool | None:
    """Whether the process of a `process_id` runs; None where that cannot be seen from here."""
    try:
        place, pid, started = process.split("/")[:3]
        if place != machine():
            return None
        return _started(int(pid)) == started
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, ValueError):
        return None


def machine() -> str:
    """What tells machines apart, and containers of one machine, which may share its boot but not their process numbers.

    OSError where it is not known: not on Linux.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    """In clock ticks since boot; FileNotFoundError or ProcessLookupError for a process that has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return fields[19]


def same_launch(path: Path, agents: Collection[str]) -> bool:
    """Whether one of `agents` wrote the file at `path` ({"agents": […]}), in this generation or an earlier one."""
    try:
        return not set(agents).isdisjoint(json.loads(path.read_text(encoding="utf-8"))["agents"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # then the user is asked for --resume
