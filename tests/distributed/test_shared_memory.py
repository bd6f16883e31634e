"""Messages through shared memory: the same results as gloo's, any sizes, any order, and errors that come soon."""

import contextlib
import gc
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distkgd.distributed import ranks as ranks_module
from distkgd.distributed import shared_memory
from distkgd.distributed.ranks import Ranks, leave_ranks
from distkgd.distributed.shared_memory import PeerError, SharedMemory, connect
from distkgd.errors import ConfigError
from tests.distributed.test_tables import REQUESTS, WEIGHT, factors
from tests.invariants.test_world_size import METHOD_OPTIONS, REGIMES, student
from tests.jobs import look_up_on_ranks
from tests.ranks import run_on_ranks, run_over_gloo
from tests.toys import train_some

LONG = timedelta(seconds=10)
SMALL_RING = 4096
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
WORLDS = pytest.mark.parametrize("world", [2, 3, 4])

Gather = Callable[[Any], list[Any]]


def on_threads(world: int, body: Callable[[int, Gather], Any]) -> list[Any]:
    """What body(rank, gather) returns on each of `world` threads that play ranks."""
    told: list[Any] = [None] * world
    barrier = Barrier(world, timeout=60)

    def gather_of(rank: int) -> Gather:
        def gather(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait()
            values = list(told)
            barrier.wait()
            return values

        return gather

    with ThreadPoolExecutor(world) as threads:
        futures = [threads.submit(body, rank, gather_of(rank)) for rank in range(world)]
        return [future.result() for future in futures]


def ranks_of(rank: int, world: int, gather: Gather, timeout: timedelta = LONG) -> Ranks:
    """Ranks that speak through small rings only."""
    rings = connect(rank, world, gather, timeout, SMALL_RING)
    assert rings is not None
    return Ranks(rank, world, shared=rings)


def table(seed: int, world: int, largest: int) -> list[list[int]]:
    """[from][to] random numbers of rows, a third of them zero."""
    draw = random.Random(seed)
    return [[draw.choice([0, 1, draw.randrange(largest)]) for _ in range(world)] for _ in range(world)]


def rows_of(rank: int, number: int, width: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """[number, width] values that differ between ranks and places."""
    return ((torch.arange(number * width) * 7 + rank * 1_000) % 8_191).reshape(number, width).to(dtype)


def arriving(counts: list[list[int]], to: int, **kwargs: Any) -> Tensor:
    """What rank `to` must receive of an exchange of `rows_of`."""
    parts = [rows_of(rank, sum(sent), **kwargs).split(sent)[to] for rank, sent in enumerate(counts)]
    return torch.cat(parts)


def begin(ranks: Ranks, counts: list[list[int]], **kwargs: Any) -> Callable[[], Tensor]:
    sent = counts[ranks.rank]
    rows = rows_of(ranks.rank, sum(sent), **kwargs)
    return ranks.all_to_all_async(rows, sent, [other[ranks.rank] for other in counts], "rows")


# -- exchanges and sums -------------------------------------------------------------------------------------------


@WORLDS
def test_messages_of_any_size_arrive_whole(world: int) -> None:
    """The largest has 60 times the bytes of a ring."""

    def body(rank: int, gather: Gather) -> None:
        ranks = ranks_of(rank, world, gather)
        for seed in range(40):
            counts = table(seed, world, 20_000 if seed % 4 == 0 else 50)
            assert torch.equal(begin(ranks, counts)(), arriving(counts, rank)), seed
        assert ranks.shared is not None
        ranks.shared.close()

    on_threads(world, body)


@WORLDS
def test_what_was_begun_together_may_be_finished_in_any_order_and_at_any_time(world: int) -> None:
    def body(rank: int, gather: Gather) -> None:
        ranks, draw, pause = ranks_of(rank, world, gather), random.Random(5), random.Random(rank)
        waiting: list[tuple[Callable[[], Tensor], Tensor]] = []
        for seed in range(120):
            counts = table(seed, world, 2_000 if seed % 3 == 0 else 20)
            if seed % 5 == 4:
                size = draw.choice([1, 5, 3_000, 200_000])
                total = sum((rows_of(other, size, 1, torch.float64) for other in range(world)), torch.zeros(()))
                waiting.append((ranks.begin_all_reduce(rows_of(rank, size, 1, torch.float64)), total))
            else:
                waiting.append((begin(ranks, counts), arriving(counts, rank)))
            if pause.random() < 0.2:
                time.sleep(0.002 * pause.random())
            while len(waiting) > draw.randrange(6):
                finish, expected = waiting.pop(draw.randrange(len(waiting)))
                assert torch.equal(finish(), expected), seed
                assert torch.equal(finish(), expected), seed
        assert ranks.shared is not None
        ranks.shared.close()

    on_threads(world, body)


def test_a_rank_that_has_gone_to_sleep_is_woken() -> None:
    """By itself it would look only after 20 ms, some 18 after the message has come."""
    counts = [[0, 0], [1, 0]]

    def body(rank: int, gather: Gather) -> list[float]:
        ranks, seconds = ranks_of(rank, 2, gather), []
        for _ in range(15):
            gather(None)
            time.sleep(0.002 * rank)
            seconds.append(time.monotonic())
            arrived = begin(ranks, counts)
            if rank == 0:
                arrived()
                seconds[-1] = time.monotonic()
        return seconds

    heard, said = on_threads(2, body)
    assert statistics.median(one - other for one, other in zip(heard, said, strict=True)) < 0.01


def test_a_message_that_nobody_asks_for_does_not_stand_in_the_way() -> None:
    counts = [[5, 9_000], [9_000, 5]]

    def body(rank: int, gather: Gather) -> None:
        ranks = ranks_of(rank, 2, gather)
        begin(ranks, counts)
        ranks.begin_all_reduce(torch.ones(200_000))
        assert torch.equal(begin(ranks, counts)(), arriving(counts, rank))

    on_threads(2, body)


def test_a_sum_that_one_rank_ends_before_and_another_after_it_begins_the_next_message() -> None:
    """The second half of the sum must not stand behind or before the exchange in the same ring."""
    counts, size = [[0, 4_000, 7], [3_000, 1, 0], [0, 0, 2]], 300_000

    def body(rank: int, gather: Gather) -> None:
        ranks = ranks_of(rank, 3, gather)
        summed = ranks.begin_all_reduce(torch.full((size,), float(rank)))
        if rank == 0:
            assert summed().tolist() == [3.0] * size
        exchanged = begin(ranks, counts)
        assert torch.equal(exchanged(), arriving(counts, rank))
        assert summed().tolist() == [3.0] * size

    on_threads(3, body)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_any_strides_travel(dtype: torch.dtype) -> None:
    counts = [[0, 2_000, 7], [900, 5, 0], [1, 30, 3_000]]

    def body(rank: int, gather: Gather) -> list[Tensor]:
        ranks = ranks_of(rank, 3, gather)
        sent, received = counts[rank], [other[rank] for other in counts]
        rows = rows_of(rank, sum(sent), dtype=dtype)
        strided = rows.T.contiguous().T
        assert not strided.is_contiguous()
        expected = arriving(counts, rank, dtype=dtype)
        for given in (rows, strided, rows.reshape(-1, 3, 1), rows[:, 0]):
            found = ranks.all_to_all_async(given, sent, received, "rows")()
            assert found.dtype == dtype and found.shape == (len(expected), *given.shape[1:])
            assert torch.equal(found.reshape(-1), (expected[:, 0] if given.dim() == 1 else expected).reshape(-1))
        sums = []
        for size in (0, 1, 2, 4, 50, 100_000):
            values = ((rows_of(rank, size, 2, torch.float64) - 4_000) / 3).to(dtype)
            summed = values.clone()
            assert ranks.all_reduce(summed) is summed
            turned = values.T.contiguous().T
            ranks.all_reduce(turned)
            assert torch.equal(turned, summed)
            sums.append(summed)
        scalar = torch.tensor(rank + 1).to(dtype)
        assert ranks.all_reduce(scalar).item() == 6
        return sums

    found = on_threads(3, body)
    for i, size in enumerate((0, 1, 2, 4, 50, 100_000)):
        total, *others = [((rows_of(rank, size, 2, torch.float64) - 4_000) / 3).to(dtype) for rank in range(3)]
        for other in others:
            total = total + other
        assert all(torch.equal(rank[i], total) for rank in found)


# -- ranks as users have them -------------------------------------------------------------------------------------


def speak(ranks: Ranks) -> tuple[bool, list[Tensor], dict[str, int]]:
    ranks.traffic.clear()
    found = []
    for seed in range(12):
        counts = table(seed, ranks.world, 40_000 if seed == 3 else 30)
        found.append(begin(ranks, counts, dtype=DTYPES[seed % 4])())
        values = rows_of(ranks.rank, [0, 1, 33, 90_000][seed % 4], 2, DTYPES[seed // 4])
        found.append(ranks.all_reduce(values, f"sum {seed % 3}"))
    every = [2 * rank + 1 for rank in range(ranks.world)]
    found.append(ranks.gather(rows_of(ranks.rank, every[ranks.rank]), every, "queries"))
    return ranks.shared is not None, found, dict(ranks.traffic)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_one_machine_share_memory_and_hear_and_count_what_they_would_over_gloo(world: int) -> None:
    shared, gloo = run_on_ranks(world, speak), run_over_gloo(world, speak)
    assert [rank[0] for rank in shared] == [True] * world and not any(rank[0] for rank in gloo)
    for mine, theirs in zip(shared, gloo, strict=True):
        assert mine[2] == theirs[2] and len(mine[2]) == 5 and min(mine[2].values()) > 0
        for one, other in zip(mine[1], theirs[1], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2 if one.dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("requests", ["duplicates", "nothing asked by one"])
def test_look_ups_and_their_second_gradients_are_the_same_bits_over_gloo(requests: str) -> None:
    ids = REQUESTS[requests][:2]
    about = {"weight": WEIGHT, "ids": ids, "factors": factors(ids), "candidates": [0, 1, 9]}
    shared, gloo = run_on_ranks(2, look_up_on_ranks, **about), run_over_gloo(2, look_up_on_ranks, **about)
    for mine, theirs in zip(shared, gloo, strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("regime", ["chunk", "all"])
@pytest.mark.parametrize("method", ["scratch", "dualde"])
def test_training_over_gloo_is_training_through_shared_memory(method: str, regime: str, world: int) -> None:
    config = {"dtype": "float64", "student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime])}
    shared = run_on_ranks(world, train_some, config=config, steps=12)
    gloo = run_over_gloo(world, train_some, config=config, steps=12)
    for mine, theirs in zip(shared, gloo, strict=True):
        for kind in ("tables", "tensors"):
            for name, tensor in mine[kind].items():
                torch.testing.assert_close(tensor, theirs[kind][name], rtol=0, atol=1e-12)


def held() -> tuple[int, int]:
    """Files of this module that the process maps, and handles on files and on processes that it has open."""
    gc.collect()  # what earlier tests of this process left in circles of references is not of this one
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    opened = 0
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the handle that lists the folder is gone by then
            target = os.readlink(handle)
            opened += "distkgd_exchange" in target or "pidfd" in target
    return maps.count("distkgd_exchange"), opened


def come_and_go(ranks: Ranks) -> None:
    before = held()
    rings = connect(ranks.rank, ranks.world, ranks.gather_objects, LONG)
    assert rings is not None
    # One mapping and a handle on each other process; the file itself is closed.
    assert held() == (before[0] + 1, before[1] + ranks.world - 1)
    own = Ranks(ranks.rank, ranks.world, shared=rings)
    assert own.all_reduce(torch.ones(9)).tolist() == [ranks.world] * 9
    nothing = mock.DEFAULT
    with mock.patch.multiple(ranks_module.dist, barrier=nothing, destroy_process_group=nothing):
        leave_ranks(own)
    assert held() == before
    with pytest.raises(PeerError, match="closed"):
        own.all_reduce(torch.ones(9))


def test_nothing_is_left_when_the_ranks_have_left() -> None:
    run_on_ranks(3, come_and_go)


# -- ranks that cannot --------------------------------------------------------------------------------------------


def without(ranks: Ranks, what: str, who: int) -> bool:
    """Whether rank `who`, which lacks `what`, goes without shared memory like everyone, and nothing is left."""
    missing: dict[str, Any] = {
        "the switch": mock.patch.dict(os.environ, DISTKGD_EXCHANGE="gloo"),
        "the library": mock.patch.object(shared_memory, "library", lambda name: None),
        "memory": mock.patch.object(shared_memory.os, "memfd_create", mock.Mock(side_effect=OSError)),
        "the machine": mock.patch.object(shared_memory.os, "readlink", lambda path: "/memfd:another"),
        "the right": mock.patch.object(shared_memory.os, "pidfd_open", mock.Mock(side_effect=PermissionError)),
    }
    before = held()
    with missing[what] if ranks.rank == who else mock.MagicMock():
        rings = connect(ranks.rank, ranks.world, ranks.gather_objects, LONG)
    return rings is None and held() == before


@pytest.mark.parametrize(
    ("what", "who"),
    [("the switch", 0), ("the switch", 1), ("the library", 2), ("memory", 0), ("the machine", 1), ("the right", 2)],
)
def test_all_ranks_go_without_when_one_lacks_something(what: str, who: int) -> None:
    assert run_on_ranks(3, without, what=what, who=who) == [True] * 3


def test_an_unknown_transport_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTKGD_EXCHANGE", "tcp")
    with pytest.raises(ConfigError, match=r"'tcp' is not known; allowed: auto, gloo"):
        connect(0, 2, lambda value: [value] * 2, LONG)


# -- ranks that are gone, silent or confused ----------------------------------------------------------------------


@pytest.fixture
def peer() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that says nothing, in the place of rank 1."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def beside(peer: "subprocess.Popen[bytes]", timeout: timedelta) -> SharedMemory:
    """Rank 0 of two whose rank 1 is `peer`."""
    others = iter([shared_memory._Offer(peer.pid), True])
    rings = connect(0, 2, lambda value: [value, next(others)], timeout)
    assert rings is not None
    return rings


def test_a_killed_rank_ends_the_wait_at_once_although_nobody_has_collected_it(
    peer: "subprocess.Popen[bytes]",
) -> None:
    rings = beside(peer, LONG)
    arrived = rings.begin_all_reduce(torch.ones(3))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(arrived)
        time.sleep(0.3)
        assert not waiting.done()
        began = time.monotonic()
        peer.kill()
        with pytest.raises(PeerError, match="rank 1 has died"):
            waiting.result(20)
        assert time.monotonic() - began < 2
    for again in (arrived, lambda: rings.begin_all_reduce(torch.ones(3))):
        with pytest.raises(PeerError, match="rank 1 has died"):
            again()
    rings.close()


def test_a_silent_rank_is_given_up_at_the_deadline(peer: "subprocess.Popen[bytes]") -> None:
    rings = beside(peer, timedelta(seconds=0.5))
    arrived = rings.begin_all_reduce(torch.ones(3))
    began = time.monotonic()
    with pytest.raises(PeerError, match=r"rank 0 has waited 0\.5 s"):
        arrived()
    assert 0.5 <= time.monotonic() - began < 3
    rings.close()


def test_what_a_rank_sent_before_it_died_is_heard(peer: "subprocess.Popen[bytes]") -> None:
    counts = [[0, 0], [40, 0]]

    def body(rank: int, gather: Gather) -> None:
        def told(value: Any) -> list[Any]:
            # To rank 0 the other one is the process that will be killed.
            values = gather(value)
            return [values[0], shared_memory._Offer(peer.pid)] if isinstance(values[1], tuple) else values

        ranks = ranks_of(rank, 2, told if rank == 0 else gather)
        finish = begin(ranks, counts)
        if rank == 0:
            peer.kill()
            peer.wait()
        gather(None)
        if rank == 0:
            assert torch.equal(finish(), arriving(counts, 0))
            with pytest.raises(PeerError, match="rank 1 has died"):
                begin(ranks, counts)()

    on_threads(2, body)


def test_ranks_that_disagree_about_a_message_are_told_so() -> None:
    def body(rank: int, gather: Gather) -> str:
        ranks = ranks_of(rank, 2, gather)
        rows, sizes = torch.ones(8), [[4, 4], [3, 4]][rank]
        finish = ranks.all_to_all_async(rows[: sum(sizes)], sizes, sizes, "rows")
        gather(None)
        with pytest.raises(PeerError) as info:
            finish()
        return str(info.value)

    assert on_threads(2, body)[1] == "rank 0 has sent another message than rank 1 expected"
