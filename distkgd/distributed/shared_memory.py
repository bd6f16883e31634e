"""Messages between CPU ranks of one machine through memory that they share, in place of gloo's TCP over loopback.

The memory is an unnamed file (memfd) that rank 0 makes and lends: the kernel frees it with the last process that maps
it, however that one ends. `kernels/cpp/exchange.cpp` moves the bytes, in the calling thread and only while it is in
there: a message that was begun goes as far as the rings have room, the rest moves when its end, or that of a later one,
is waited for. Messages end in the order in which they were begun, which is the same on all ranks.

DISTKGD_EXCHANGE=gloo on any rank does without, and so does a rank that has no library or cannot map the memory.
"""

import ctypes
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distkgd.errors import ConfigError
from distkgd.kernels.build import library

RING_BYTES = 1 << 20
TOTAL_BYTES = 1 << 27  # of all rings; many ranks have smaller ones, but none below a page
SPIN_NANOSECONDS = 50_000
SLICE_NANOSECONDS = 200_000_000  # between two chances for Python's signal handlers


class PeerError(RuntimeError):
    """A rank that was waited for has died, is silent, or has sent what nobody expected."""


class SharedMemory:
    """This rank's end of the rings. One thread at a time; after an error only `close` may follow."""

    def __init__(self, lib: ctypes.CDLL, post: int, lives: Sequence[int], rank: int, timeout: timedelta) -> None:
        """
        post: what exchange_open returned. lives: [world] pidfds, closed with the rest; timeout: of each message.
        """
        self._lib = lib
        self._post: int | None = post
        self._lives = lives
        self._rank = rank
        self._world = len(lives)
        self._timeout = timeout.total_seconds()
        self._pending: deque[tuple[Callable[[], None], tuple[Tensor, ...]]] = deque()
        self._begun = 0
        self._ended = 0
        self._broken = ""

    def all_to_all_async(
        self, out: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Runs of `send` rows on their way to ranks 0, 1, …; the result waits until those of `receive` fill `out`.

        rows: [sum(send), ...], out: [sum(receive), ...], both contiguous.
        """
        ticket = self._begin(0, rows.split(list(send)), out.split(list(receive)))
        return self._later(lambda: self._wait(ticket), out, rows)

    def begin_all_reduce(self, tensor: Tensor) -> Callable[[], Tensor]:
        """`tensor` summed over ranks in place, in the order of the ranks; the result waits for it."""
        flat, rank, world = tensor.detach().reshape(-1), self._rank, self._world
        whole = world == 2  # as many bytes as two halves each way, and nobody waits twice
        pieces = [flat] * world if whole else list(flat.tensor_split(world))
        parts = list(flat.new_empty((world, len(pieces[rank]))).unbind())
        nothing = flat[:0]
        ticket = self._begin(
            0,
            [nothing if peer == rank else pieces[peer] for peer in range(world)],
            [nothing if peer == rank else parts[peer] for peer in range(world)],
        )

        def finish() -> None:
            self._wait(ticket)
            total, parts[rank] = parts[rank], pieces[rank]
            torch.add(parts[0], parts[1], out=total)
            for part in parts[2:]:
                total += part
            if whole:
                flat.copy_(total)
            else:
                # A channel of its own: others may have begun their next message before, or begin it after this.
                self._wait(self._begin(1, [total] * world, pieces))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat.view_as(tensor))

        return self._later(finish, tensor, flat)

    def close(self) -> None:
        """Unmap the rings. What is still on its way is lost, so all ranks must have ended their messages."""
        if self._post is not None:
            self._lib.exchange_close(self._post)
            self._post = None
            self._pending.clear()
            self._broken = "the rings are closed"
            for descriptor in self._lives:
                if descriptor >= 0:
                    os.close(descriptor)

    def _later(self, finish: Callable[[], None], result: Tensor, sent: Tensor) -> Callable[[], Tensor]:
        number = self._begun
        self._begun += 1
        # The tensors beside it, because their memory is in use even when nobody asks for the result.
        self._pending.append((finish, (result, sent)))

        def arrived() -> Tensor:
            # Earlier ones first: another rank may wait for the second half of one before it begins what is wanted here.
            while self._ended <= number:
                self._check()
                try:
                    self._pending[0][0]()
                except BaseException as error:
                    self._broken = self._broken or f"a message was given up: {error!r}"
                    raise
                self._pending.popleft()
                self._ended += 1
            return result

        return arrived

    def _begin(self, channel: int, send: Sequence[Tensor], receive: Sequence[Tensor]) -> int:
        self._check()
        numbers = ctypes.c_uint64 * self._world
        sides = []
        for tensors in (send, receive):
            sides += [numbers(*[t.data_ptr() for t in tensors]), numbers(*[t.nbytes for t in tensors])]
        ticket: int = self._lib.exchange_begin(self._post, channel, *sides)
        return ticket

    def _wait(self, ticket: int) -> None:
        deadline = time.monotonic() + self._timeout
        while (state := self._lib.exchange_wait(self._post, ticket, SLICE_NANOSECONDS)) == 1:
            if time.monotonic() > deadline:
                self._broken = f"rank {self._rank} has waited {self._timeout:g} s for a message of another rank"
                break
        if state > 1:
            self._broken = f"rank {state - 2} has died; its own error, if it had one, is above or in its log"
        elif state < 0:
            self._broken = f"rank {-1 - state} has sent another message than rank {self._rank} expected"
        self._check()

    def _check(self) -> None:
        if self._broken:
            raise PeerError(self._broken)


class _Offer(NamedTuple):
    """What a rank tells the others: its process, and rank 0 also where its memory is and how the kernel calls it."""

    process: int
    path: str = ""
    name: str = ""


def connect(
    rank: int, world: int, gather: Callable[[Any], list[Any]], timeout: timedelta, ring_bytes: int | None = None
) -> SharedMemory | None:
    """The rings between all ranks, or None on every rank if one of them cannot have them. All ranks call it.

    gather: every rank's value, on every rank. timeout: of each message. ring_bytes: a power of two.
    """
    capacity = ring_bytes or min(RING_BYTES, max(4096, 1 << (TOTAL_BYTES // (2 * world * world)).bit_length() - 1))
    lib = _library()
    with ExitStack() as files:
        offers: list[_Offer | None] = gather(None if lib is None else _offer(rank, world, capacity, lib, files))
        if lib is None or None in offers:
            return None
        rings = _map(lib, [offer for offer in offers if offer], rank, capacity, timeout)
        # The lender's file is closed after this: everyone has mapped it, or nobody will.
        mapped = gather(rings is not None)
    if all(mapped):
        return rings
    if rings is not None:
        rings.close()
    return None


def _library() -> ctypes.CDLL | None:
    wanted = os.environ.get("DISTKGD_EXCHANGE", "auto")
    if wanted not in ("auto", "gloo"):
        raise ConfigError(f"DISTKGD_EXCHANGE={wanted!r} is not known; allowed: auto, gloo.")
    lib = library("exchange") if wanted == "auto" and sys.platform == "linux" else None
    if lib is not None:
        u64s, i32, u64, i64 = ctypes.POINTER(ctypes.c_uint64), ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64
        lib.exchange_size.argtypes, lib.exchange_size.restype = [i32, u64], u64
        lib.exchange_open.argtypes = [i32, i32, i32, u64, i64, ctypes.POINTER(i32)]
        lib.exchange_open.restype = ctypes.c_void_p
        lib.exchange_close.argtypes, lib.exchange_close.restype = [ctypes.c_void_p], None
        lib.exchange_begin.argtypes, lib.exchange_begin.restype = [ctypes.c_void_p, i32, *[u64s] * 4], i64
        lib.exchange_wait.argtypes, lib.exchange_wait.restype = [ctypes.c_void_p, i64, i64], i32
    return lib


def _offer(rank: int, world: int, capacity: int, lib: ctypes.CDLL, files: ExitStack) -> _Offer | None:
    if rank:
        return _Offer(os.getpid())
    try:
        descriptor = os.memfd_create(f"distkgd_exchange_{uuid.uuid4().hex}", os.MFD_CLOEXEC)
        files.callback(os.close, descriptor)
        os.ftruncate(descriptor, lib.exchange_size(world, capacity))
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return _Offer(os.getpid(), path, os.readlink(path))
    except OSError:
        return None


def _map(
    lib: ctypes.CDLL, offers: Sequence[_Offer], rank: int, capacity: int, timeout: timedelta
) -> SharedMemory | None:
    world, lives = len(offers), []
    with ExitStack() as undo:
        try:
            # The name is drawn: whoever finds it under this path sees the same processes by the same numbers.
            if os.readlink(offers[0].path) != offers[0].name:
                return None
            for peer, offer in enumerate(offers):
                lives.append(-1 if peer == rank else os.pidfd_open(offer.process))
                if peer != rank:
                    undo.callback(os.close, lives[-1])
            descriptor = os.open(offers[0].path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None  # another machine or container, or a kernel before 5.3
        # More ranks than cores: who spins keeps the one that is waited for from its core.
        spin = SPIN_NANOSECONDS if len(os.sched_getaffinity(0)) >= world else 0
        post = lib.exchange_open(descriptor, rank, world, capacity, spin, (ctypes.c_int32 * world)(*lives))
        os.close(descriptor)
        if not post:
            return None
        undo.pop_all()
    return SharedMemory(lib, post, lives, rank, timeout)
