"""Data once per node: one rank of each machine builds it, the others map the same memory.

The memory is an unnamed file (memfd): the kernel frees it with the last process that maps it, however that one ends.
Every rank maps it privately: a rank that wrote to it by mistake would change its own copy of that page, no one else's.
"""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rendezvous import machine
from distkgd.errors import DistkgdError

# Seconds between signs of life while one rank works and the others wait; far below the timeout of a collective.
BEAT = 5.0

T = TypeVar("T")


class _Lent(NamedTuple):
    """Where the other processes of the node find a tensor; an empty one has no file, for there is no empty mapping."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def node_ranks(ranks: Ranks) -> list[int]:
    """The ranks on this machine that can map each other's memory, ascending, this one among them."""
    try:
        place = machine()
    except OSError:
        place = f"rank {ranks.rank}"  # each builds its own
    places = ranks.gather_objects(place)
    return [rank for rank, other in enumerate(places) if other == place]


def share_tensors(ranks: Ranks, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `build` returns on the lowest rank of each node, in one piece of memory per node. All ranks call it.

    The tensors are on the CPU and must not be written to. An error of `build` is raised on every rank.
    """
    if ranks.world == 1:
        return build()
    local = node_ranks(ranks)

    def lend(files: ExitStack) -> tuple[dict[str, Tensor], dict[str, _Lent]]:
        if ranks.rank != local[0]:
            return {}, {}
        return (build(), {}) if len(local) == 1 else ({}, _lend(build(), files))

    with ExitStack() as files:
        own, lent = together(ranks, lambda: lend(files))
        lent = ranks.gather_objects(lent)[local[0]]
        # `together` ends when everyone has mapped the files: only then may the lender close them.
        return together(ranks, lambda: own | {name: _borrow(where) for name, where in lent.items()})


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """`work()` on every rank, however long it takes one of them; an error on any is raised on all.

    A rank that waits in a collective gives up after a while. So `work` runs beside the rank's own thread, and that one
    meets the others every `BEAT` seconds.
    """
    if ranks.world == 1:
        return work()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # not swallowed: the rank's own thread raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        wait([future], BEAT)
        done = future.done()
        error = told = future.exception() if done else None
        if error is not None and not isinstance(error, DistkgdError):
            told = RuntimeError(f"rank {ranks.rank}: {error!r}")  # itself it might not travel
        states = ranks.gather_objects((done, told))
        failures = [failure for _, failure in states if failure is not None]
        if failures:
            raise error or failures[0]
        if all(ended for ended, _ in states):
            return future.result()


def on_first(ranks: Ranks, work: Callable[[], object]) -> None:
    """`work()` on the first rank, while the others wait however long it takes; an error is raised on all ranks."""
    together(ranks, work if ranks.first else lambda: None)


def _lend(tensors: dict[str, Tensor], files: ExitStack) -> dict[str, _Lent]:
    # Each tensor is dropped as soon as it is in its file, which is open until `files` closes.
    lent = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        path = ""
        if tensor.numel():
            descriptor = os.memfd_create(f"distkgd_{name}", os.MFD_CLOEXEC)
            files.callback(os.close, descriptor)
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
            torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        lent[name] = _Lent(path, tensor.dtype, tuple(tensor.shape))
    return lent


def _borrow(lent: _Lent) -> Tensor:
    if not lent.path:
        return torch.empty(lent.shape, dtype=lent.dtype)
    size = math.prod(lent.shape)
    return torch.from_file(lent.path, shared=False, size=size, dtype=lent.dtype).reshape(lent.shape)
