"""Runs a function on W ranks: processes, joined as users' are, or threads of this one, which start at once.

It is called as fn(ranks, **kwargs) on every rank. Processes are started once per test session and kept; the function
must be importable (not a lambda, not nested). Threads run the code of `Ranks` over a stand-in for torch.distributed,
and share what a process has once: what is patched must be patched around them, and no signal reaches them.
"""

import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from distkgd.distributed import ranks as ranks_module
from distkgd.distributed.ranks import Ranks, join_ranks
from tests.gpu.device import install
from tests.gpu.nccl import NCCL
from tests.programs import fork_server

ANSWER_SECONDS = 240
_pools: dict[tuple[int, bool], "_Pool"] = {}


def run_on_ranks(world: int, fn: Callable[..., Any], *, pretend: bool = False, **kwargs: Any) -> list[Any]:
    """What fn(ranks, **kwargs) returns on each of `world` ranks that are processes; world 1 runs right here.

    pretend: on a pretend GPU each (`tests.gpu.device`), which no process gets rid of: world 1 has one of its own.
    """
    if world == 1 and not pretend:
        return [fn(Ranks(), **kwargs)]
    if (world, pretend) not in _pools:
        _pools[world, pretend] = _Pool(world, pretend)
    return _pools[world, pretend].run(fn, kwargs)


def run_on_threads(world: int, fn: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """`run_on_ranks` of ranks that are threads."""
    if world == 1:
        return [fn(Ranks(), **kwargs)]
    threads = _Threads(world)
    given = pickle.dumps(kwargs)  # to each rank its own, as processes have
    with patch.object(ranks_module, "dist", threads), ThreadPoolExecutor(world) as pool:
        return _values(list(pool.map(lambda rank: threads.answer(rank, fn, pickle.loads(given)), range(world))))


def close_pools() -> None:
    """End all rank processes."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def _values(answers: list[tuple[bool, Any]]) -> list[Any]:
    failures = [text for good, text in answers if not good]
    if failures:
        raise AssertionError("\n".join(map(str, failures)))
    return [value for _, value in answers]


class _Threads:
    """What `Ranks` calls of torch.distributed, for ranks that are threads. One runs at a time, until it waits for the
    others: not all that torch keeps once per process may be used side by side."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._mine = threading.local()
        self._only_one = threading.Lock()
        self._gate = threading.Barrier(world, timeout=ANSWER_SECONDS)
        # Two, by turns: nobody writes into one before all have read it.
        self._slots: list[list[Any]] = [[None] * world, [None] * world]

    def answer(self, rank: int, fn: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """(whether it went well, what fn returned or how it failed) on a rank."""
        self._mine.rank, self._mine.turn = rank, 0
        with self._only_one:
            try:
                return True, fn(Ranks(rank, self._world), **kwargs)
            except threading.BrokenBarrierError:
                return False, f"rank {rank} was left alone"
            except BaseException:
                self._gate.abort()
                return False, f"rank {rank}: {traceback.format_exc()}"

    def barrier(self) -> None:
        self._only_one.release()
        try:
            self._gate.wait()
        finally:
            self._only_one.acquire()

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        values[:] = map(pickle.loads, self._everyones(pickle.dumps(value)))

    def all_reduce(self, tensor: Tensor, async_op: bool) -> "_Arriving":
        first, *others = self._everyones(tensor.detach().clone())
        return _Arriving(tensor.detach(), sum(others, first))

    def all_gather_into_tensor(self, out: Tensor, rows: Tensor, async_op: bool) -> "_Arriving":
        return _Arriving(out, torch.cat(self._everyones(rows.detach().clone())))

    def reduce_scatter_tensor(self, out: Tensor, rows: Tensor, async_op: bool) -> "_Arriving":
        mine = [given.chunk(self._world)[self._mine.rank] for given in self._everyones(rows.detach().clone())]
        return _Arriving(out, sum(mine[1:], mine[0]))

    def all_to_all_single(
        self, out: Tensor, rows: Tensor, receive: list[int], send: list[int], async_op: bool
    ) -> "_Arriving":
        parts = [given.split(sizes)[self._mine.rank] for given, sizes in self._everyones((rows.detach().clone(), send))]
        assert [len(part) for part in parts] == receive
        return _Arriving(out, torch.cat(parts))

    def _everyones(self, value: Any) -> list[Any]:
        self._mine.turn = 1 - self._mine.turn
        slots = self._slots[self._mine.turn]
        slots[self._mine.rank] = value
        self.barrier()
        return list(slots)


class _Arriving:
    """A message under way: until somebody waits for it, its place holds no numbers that could be of use."""

    def __init__(self, place: Tensor, content: Tensor) -> None:
        self._place, self._content = place, content
        self._arrived = False
        place.fill_(torch.nan if place.is_floating_point() else torch.iinfo(place.dtype).min)

    def wait(self) -> None:
        if not self._arrived:
            self._place.copy_(self._content)
            self._arrived = True


class _Pool:
    def __init__(self, world: int, pretend: bool) -> None:
        context = fork_server()
        self._key = world, pretend
        self._pipes: list[Connection] = []
        self._processes = []
        port = _free_port()
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs, pretend), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], kwargs: dict[str, Any]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((fn, kwargs))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(ANSWER_SECONDS):
                answers.append((False, f"rank {rank} gave no answer in {ANSWER_SECONDS} s"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"rank {rank} died"))
        alone = len(answers) == 1 and self._processes[0].is_alive()  # and nobody waits for it
        if not alone and not all(good for good, _ in answers):
            self.close()
            _pools.pop(self._key, None)
        return _values(answers)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, world: int, port: int, pipe: Connection, pretend: bool) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    if pretend:
        ranks = Ranks(rank, world, install())
        ranks_module.dist = NCCL  # type: ignore[assignment]
    while True:
        try:
            fn, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, fn(ranks, **kwargs)))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
