"""The processes that measure, one per family, kept alive and asked for one round at a time."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.machine import PEERS, version_of
from distkgd.errors import DistkgdError

ROOT = Path(__file__).resolve().parent.parent.parent
STDERR_SHOWN = 2000


class BenchError(DistkgdError):
    """Something that a measurement needs is not there or has died."""


class ArmError(BenchError):
    """An implementation could not do its task; the others go on."""


def environment(threads: int, home: str) -> dict[str, str]:
    """Of all measuring processes alike. home: where a library may keep what it wants to keep."""
    ours = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    kept = {"PYSTOW_HOME": home, "PYKEEN_HOME": home, "MPLCONFIGDIR": home}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | ours | {"PYTHONPATH": path, "TQDM_DISABLE": "1"} | kept


class Worker:
    """The process of one family."""

    def __init__(self, family: str, threads: int, home: str) -> None:
        self._family = family
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - `close` does
        command = [sys.executable, "-m", "benchmarks.side_by_side.worker", family]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(threads, home),
            text=True,
            encoding="utf-8",
        )
        self._ready = False

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to one request; raises ArmError for what the implementation could not do."""
        assert self._process.stdin is not None
        if not self._ready:
            self._reply()
            self._ready = True
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        reply = self._reply()
        if "error" in reply:
            raise ArmError(reply["error"])
        return reply

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _died(self) -> BenchError:
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read()[-STDERR_SHOWN:]
        return BenchError(f"the process that measures {self._family!r} ended with code {code}:\n{tail}")

    def close(self) -> None:
        """Let it end."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Pool:
    """Workers by family, started when they are first asked."""

    def __init__(self, threads: int, home: str) -> None:
        self._threads = threads
        self._home = home
        self._workers: dict[str, Worker] = {}

    def start(self, family: str) -> Worker:
        """The family's worker; it imports its libraries while others are already asked."""
        if family not in self._workers:
            self._workers[family] = Worker(family, self._threads, self._home)
        return self._workers[family]

    def drop(self) -> None:
        """All workers forget what they have prepared."""
        for worker in self._workers.values():
            worker.ask(do="drop")

    def memory(self, family: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """A worker's memory, in a fresh process."""
        worker = Worker(family, self._threads, self._home)
        try:
            return worker.ask(do="memory", **request)
        finally:
            worker.close()

    def close(self) -> None:
        """Let all end."""
        for worker in self._workers.values():
            worker.close()


@contextmanager
def open_pool(threads: int) -> Iterator[Pool]:
    """Workers for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="distkgd-bench-") as home:
        pool = Pool(threads, home)
        try:
            yield pool
        finally:
            pool.close()


def missing(family: str) -> bool:
    """Whether a family is a peer that is not installed."""
    return family in PEERS and version_of(family) is None
