"""Who works in a run folder: one launch at a time, which owner.json in that folder names to all others.

A lock of the kernel on owner.json tells whether its holder lives, for it dies with the process. Where locks do not
reach (other machines on some shared disks, disks without locks) the file's time does, which a living owner renews. The
file goes with its owner; one that was killed leaves it behind, and the next launch takes the folder over.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from distkgd.common.paths import check_folder, make_folder, naming, unmake
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rendezvous import is_alive, launch_agent, process_id
from distkgd.errors import ConfigError, Stopped

OWNER = "owner.json"
PATIENCE = 60.0  # seconds for a process that was killed to be gone
BEAT, SILENCE = 10.0, 60.0  # seconds between signs of life, and without one until an owner elsewhere counts as dead
LONG_AGO = 3600.0  # without a sign of life, nobody waits for the next one
POLL_SECONDS = 0.1
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """Of a run folder. started: local time. process: `process_id`; agents: of what may start it anew."""

    host: str
    pid: int
    started: str
    process: str | None
    agents: list[str]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"

    def same_launch(self, other: "Owner") -> bool:
        """Whether one of the two has taken the place of the other."""
        return not set(self.agents).isdisjoint(other.agents)


def read_owner(path: Path) -> Owner | None:
    """What an owner.json says; None where there is none, or not yet a whole one."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def refuse_owned(folder: Path) -> None:
    """ConfigError where another launch is at work in `folder`, before anything has cost time; `owned` is what decides.

    Ranks that torchrun may have started anew are left to `owned`.
    """
    owner = read_owner(folder / OWNER)
    if owner is None or launch_agent() is not None or owner.process in (None, process_id()):
        return
    if is_alive(owner.process):
        raise ConfigError(_in_use(folder, owner))


@contextmanager
def owned(folder: Path, ranks: Ranks, say: Callable[[str], None], launcher: str | None = None) -> Iterator[list[str]]:
    """Be the one launch that works in `folder`, which is made; yields the launch's agents. All ranks call it.

    launcher: `process_id` of what starts this process anew after a death, and more; default: torchrun, if any.
    say: takes a line where a dead owner is followed. Raises ConfigError, which names the owner, where it lives.
    """
    agents = sorted({agent for agent in ranks.gather_objects(launcher or launch_agent()) if agent})
    holds: list[_Hold] = []
    on_first(ranks, lambda: holds.append(_Hold(folder, agents, say)))
    restarts = False  # then the file stays, so that nobody comes in between
    try:
        yield agents
    except (Stopped, KeyboardInterrupt, ConfigError):  # no new start would cure the last
        raise
    except BaseException:
        restarts = bool(agents) and launcher is None
        raise
    finally:
        for hold in holds:
            hold.end(keep=restarts)


class _Hold:
    """This process's hold on a folder, with a thread that gives signs of life."""

    def __init__(self, folder: Path, agents: list[str], say: Callable[[str], None]) -> None:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        mine = Owner(socket.gethostname(), os.getpid(), now, process_id(), agents)
        self._path = folder / OWNER
        check_folder(folder)
        self._made = make_folder(folder)
        self._file = _taken(self._path, mine, say)
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # a disk that is away for a while; training notices if it stays away
                os.utime(self._file.fileno())

    def end(self, keep: bool) -> None:
        """Give the folder up; one that was made for nothing goes, too."""
        self._over.set()
        self._beats.join()
        if not keep and _is_at(self._path, self._file):
            self._path.unlink()  # before the lock is free: whoever waits for it finds that the file is another
        self._file.close()
        unmake(self._made)


def _taken(path: Path, mine: Owner, say: Callable[[str], None]) -> IO[str]:
    """owner.json, locked as far as its disk has locks, and saying `mine`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+", encoding="utf-8")
        locked = _lock(file)
        if not _is_at(path, file):  # its owner has just given it up
            file.close()
            if time.monotonic() > deadline:
                raise ConfigError(_in_use(path.parent, read_owner(path)))
            time.sleep(POLL_SECONDS)
            continue
        other = read_owner(path)
        again = other is not None and mine.same_launch(other)
        if locked is not False and (other is None or again or not _lives(other, path, bool(locked), say)):
            break
        file.close()
        leaving = other is None or again or (bool(other.agents) and all(is_alive(a) is False for a in other.agents))
        if not leaving or time.monotonic() > deadline:
            raise ConfigError(_in_use(path.parent, other))
        time.sleep(POLL_SECONDS)
    if other is not None and not again:
        say(f"{path.parent} was left by {other}, which is gone; this launch takes it over")
    with naming(path):
        file.truncate(0)
        file.write(json.dumps(asdict(mine), indent=2) + "\n")
        file.flush()
    if locked is None:  # two may have come this far: the last to write is the one
        time.sleep(5 * POLL_SECONDS)
        if (now := read_owner(path)) != mine:
            raise ConfigError(_in_use(path.parent, now))
    return file


def _lock(file: IO[str]) -> bool | None:
    """Whether the lock on a file is now this process's; None where its disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lives(owner: Owner, path: Path, locked: bool, say: Callable[[str], None]) -> bool:
    """Whether an owner, or what starts it anew, still runs. locked: this process has the lock, so far as it reaches."""
    if any(is_alive(agent) for agent in owner.agents):
        return True
    alive = None if owner.process is None else is_alive(owner.process)
    if alive is not None:
        return alive and not locked
    seen = path.stat().st_mtime
    if time.time() - seen > LONG_AGO:
        return False
    say(f"{path.parent} was {owner}'s; looking for {SILENCE:g} s whether that is alive")
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        if not path.exists() or path.stat().st_mtime != seen:
            return True
    return False


def _in_use(folder: Path, owner: Owner | None) -> str:
    return (
        f"{folder} is in use: {owner or 'another process'} is at work in it. Wait for it, stop it, or give a new run "
        f"another folder; if it is dead, delete {folder / OWNER}."
    )
