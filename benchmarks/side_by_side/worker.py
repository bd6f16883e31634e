"""The process of one family of implementations: it prepares arms, runs a round when told to, and says what it took.

python -m benchmarks.side_by_side.worker FAMILY, with requests and replies as lines of JSON on standard input and
output. What a library prints goes to standard error.
"""

import ctypes
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO

from benchmarks.side_by_side.machine import forget_peak, status_bytes
from distkgd.kernels.memory import keep_freed_memory

FAMILIES = {
    "ours": "benchmarks.side_by_side.ours",
    "plain": "benchmarks.side_by_side.plain",
    "pykeen": "benchmarks.side_by_side.pykeen_peer",
    "torchkge": "benchmarks.side_by_side.torchkge_peer",
}
ROUNDS_FOR_PEAK = 1  # after the one that preparing includes; reading has none


class Server:
    """Prepared arms by name."""

    def __init__(self, family: str) -> None:
        if family == "ours":
            keep_freed_memory()  # as our launchers do
        self._arms = import_module(FAMILIES[family]).ARMS
        self._rounds: dict[str, Callable[[], dict[str, float]]] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """prepare (arm, function, options), run (arm), drop, or memory (function, options, tiny): what came of it."""
        match request["do"]:
            case "prepare":
                self._rounds[request["arm"]] = self._arms[request["function"]](request["options"])
                return {}
            case "run":
                return self._rounds[request["arm"]]()
            case "drop":
                self._rounds.clear()
                _tidy()
                return {}
            case "memory":
                return self._memory(request)
        raise AssertionError(request["do"])

    def _memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        # A tiny case first: what libraries load and keep on their first use belongs to neither side.
        make = self._arms[request["function"]]
        make(request["tiny"])()
        _tidy()
        before = status_bytes("VmRSS")
        run = make(request["options"])
        _tidy()
        forget_peak()
        for _ in range(ROUNDS_FOR_PEAK):
            run()
        return {"before": before, "peak": status_bytes("VmHWM")}


def _tidy() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only: give freed memory back
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def say(out: TextIO, reply: Mapping[str, Any]) -> None:
    """One line to whoever asked."""
    out.write(json.dumps(reply) + "\n")
    out.flush()


def main() -> None:
    """Serve until standard input ends."""
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = Server(sys.argv[1])
    say(out, {"ready": True})
    for line in sys.stdin:
        try:
            reply = server.answer(json.loads(line))
        except Exception as error:  # whatever a peer dies of is a finding, and the next task goes on
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        say(out, reply)


if __name__ == "__main__":
    main()
