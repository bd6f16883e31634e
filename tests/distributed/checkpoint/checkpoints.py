"""Ranks that are threads, states to save, and writers that fail where a test wants them to."""

import builtins
import os
import pickle
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.checkpoint.reader import load_rows, load_tensors, read_meta, verify
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.distributed.checkpoint.writer import State, Writer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]


class Alone:
    rank, world = 0, 1

    def barrier(self) -> None:
        pass

    def gather_objects(self, obj: Any) -> list[Any]:
        return [pickle.loads(pickle.dumps(obj))]


class Thread:
    def __init__(self, rank: int, world: int, slots: list[Any], gate: threading.Barrier) -> None:
        self.rank, self.world, self.slots, self.gate = rank, world, slots, gate

    def barrier(self) -> None:
        self.gate.wait()

    def gather_objects(self, obj: Any) -> list[Any]:
        self.slots[self.rank] = pickle.dumps(obj)
        self.gate.wait()
        everyone = [pickle.loads(slot) for slot in self.slots]
        self.gate.wait()
        return everyone


def on_ranks(world: int, fn: Callable[[Any], Any]) -> list[Any]:
    """fn(peers) on `world` threads: each one's result, or the exception it ended with."""
    slots, gate = [None] * world, threading.Barrier(world, timeout=20)
    results: list[Any] = [None] * world

    def body(rank: int) -> None:
        try:
            results[rank] = fn(Thread(rank, world, slots, gate))
        except Exception as e:
            results[rank] = e

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def random_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every bit pattern, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty((), dtype=dtype).element_size()
    numel = int(torch.tensor(shape).prod())
    raw = torch.randint(0, 256, (numel * width,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    equal = torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and equal


def save(folder: Path, step: int, state: State, peers: Any, *, keep: int = 2, protect: Collection[int] = ()) -> Path:
    """Write a checkpoint and wait for it."""
    writer = Writer(folder, peers, keep=keep)
    writer.save(step, state, protect=protect)
    path = writer.wait()
    assert path is not None
    return path


def save_split(folder: Path, step: int, tables: dict[str, Tensor], cuts: dict[str, list[int]]) -> Path:
    """Save from as many ranks as there are pieces; rank r holds rows [cuts[r], cuts[r+1]) of each table."""
    world = len(next(iter(cuts.values()))) - 1

    def run(peers: Any) -> Path:
        rows = {}
        for name, table in tables.items():
            lo, hi = cuts[name][peers.rank], cuts[name][peers.rank + 1]
            rows[name] = Rows(table[lo:hi], lo, len(table))
        return save(folder, step, State(rows, {"w": torch.ones(2, 2)}, {"epoch": step}), peers)

    paths = on_ranks(world, run)
    assert paths == [folder / f"step_{step:010d}"] * world, paths
    return paths[0]


def small(value: float, *, rows: int = 5) -> State:
    table = torch.full((rows, 2), value)
    return State({"entity": Rows(table, 0, rows)}, {"w": torch.tensor(value)}, {"value": value})


def value_of(path: Path) -> float:
    verify(path)
    value = read_meta(path)["meta"]["value"]
    rows = read_meta(path)["tables"]["entity"]["total"]
    assert torch.equal(load_rows(path, "entity", 0, rows), torch.full((rows, 2), value))
    assert torch.equal(load_tensors(path)["w"], torch.tensor(value))
    return value


def no_damage(message: str) -> None:
    raise AssertionError(message)


# --- Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class Killed(BaseException):
    """Not an Exception: no handler may tidy up after a killed process."""


class Dying:
    """A file opened for writing whose writes count as calls; the fatal one writes half."""

    def __init__(self, file: Any, tick: Callable[[], None]) -> None:
        self.file, self.tick = file, tick

    def __enter__(self) -> "Dying":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        try:
            self.tick()
        except BaseException:
            self.file.write(bytes(data)[: len(data) // 2])
            raise
        return self.file.write(data)


@contextmanager
def failing_at(call: int, error: BaseException) -> Iterator[list[int]]:
    """The `call`-th file-system call raises; with Killed, so does every later one. Yields [calls so far]."""
    count = [0]

    def tick() -> None:
        count[0] += 1
        if count[0] == call or (count[0] > call and isinstance(error, Killed)):
            raise error

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick()
            return real(*args, **kwargs)

        return wrapped

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "r" in mode:
            return real_open(file, mode, *args, **kwargs)
        tick()
        return Dying(real_open(file, mode, *args, **kwargs), tick)

    real_open = builtins.open
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, wrap(getattr(os, name)))
        patch.setattr(builtins, "open", opened)
        yield count


def synced_before_rename(write: Callable[[], Any], temporary: str) -> bool:
    """Whether all files of the folder named like `temporary`, and itself, were flushed before its rename, and its
    parent after."""
    synced: list[int] = []
    before: list[bool] = []
    parents: list[Path] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        if source.match(temporary):
            paths = [source, *source.rglob("*")]
            before.append({path.stat().st_ino for path in paths} <= set(synced))
            parents.append(source.parent)
            synced.clear()
        real_replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        write()
    return before == [True] and parents[0].stat().st_ino in synced
