"""Runs a function on W real ranks, joined as users' are. The processes are started once per test session and kept.

The function must be importable (not a lambda, not nested): it is called as fn(ranks, **kwargs) on every rank.
"""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

from distkgd.distributed.ranks import Ranks, join_ranks

ANSWER_SECONDS = 240
_pools: dict[int, "_Pool"] = {}


def run_on_ranks(world: int, fn: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """What fn(ranks, **kwargs) returns on each of `world` ranks; world 1 runs right here."""
    if world == 1:
        return [fn(Ranks(), **kwargs)]
    if world not in _pools:
        _pools[world] = _Pool(world)
    return _pools[world].run(fn, kwargs)


def close_pools() -> None:
    """End all rank processes."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


class _Pool:
    def __init__(self, world: int) -> None:
        # Forked of a process that has imported what ranks need, which takes seconds, once.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["distkgd.pipeline.stage_job"])
        self._world = world
        self._pipes: list[Connection] = []
        self._processes = []
        port = _free_port()
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
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
        failures = [text for good, text in answers if not good]
        if failures:
            self.close()
            _pools.pop(self._world, None)
            raise AssertionError("\n".join(map(str, failures)))
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    while True:
        try:
            fn, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, fn(ranks, **kwargs)))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
