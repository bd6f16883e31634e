"""Messages between ranks over gloo: any sizes, any order, and an error when another rank dies or is silent."""

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distkgd.distributed.ranks import NCCL_TIMEOUT, PEER_TIMEOUT, Ranks, peer_timeout
from distkgd.errors import RendezvousError
from tests.ranks import run_on_ranks, run_on_threads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
WORLDS = pytest.mark.parametrize("world", [2, 3])


def table(seed: int, world: int, largest: int) -> list[list[int]]:
    """[from][to] random numbers of rows, a third of them zero."""
    draw = random.Random(seed)
    return [[draw.choice([0, 1, draw.randrange(largest)]) for _ in range(world)] for _ in range(world)]


def rows_of(rank: int, number: int, width: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """[number, width] values that differ between ranks and places."""
    return ((torch.arange(number * width) * 7 + rank * 1_000) % 8_191).reshape(number, width).to(dtype)


def arriving(counts: list[list[int]], to: int, dtype: torch.dtype) -> Tensor:
    """What rank `to` must receive of an exchange of `rows_of`."""
    return torch.cat([rows_of(rank, sum(sent), dtype=dtype).split(sent)[to] for rank, sent in enumerate(counts)])


def speak(ranks: Ranks) -> dict[str, int]:
    """Begins messages of any size and dtype, and asks for them in any order, each twice; the traffic of this rank."""
    ranks.traffic.clear()
    draw, pause = random.Random(5), random.Random(ranks.rank)
    waiting: list[tuple[Callable[[], Tensor], Tensor]] = []
    for seed in range(24):
        dtype, kind = DTYPES[seed % 4], f"{seed % 3}"
        if seed % 5 == 4:
            given = [rows_of(rank, [0, 1, 33, 90_000][seed % 4], 2, dtype) for rank in range(ranks.world)]
            waiting.append((ranks.begin_all_reduce(given[ranks.rank].clone(), "sum " + kind), sum(given[1:], given[0])))
        else:
            counts = table(seed, ranks.world, 40_000 if seed % 8 == 0 else 30)
            sent, received = counts[ranks.rank], [other[ranks.rank] for other in counts]
            strided = rows_of(ranks.rank, sum(sent), dtype=dtype).T.contiguous().T
            began = ranks.all_to_all_async(strided, sent, received, kind)
            waiting.append((began, arriving(counts, ranks.rank, dtype)))
        time.sleep(0.002 * pause.random())
        while len(waiting) > (0 if seed == 23 else draw.randrange(6)):
            finish, expected = waiting.pop(draw.randrange(len(waiting)))
            for found in (finish(), finish()):
                torch.testing.assert_close(found, expected, rtol=2e-2 if found.dtype == torch.bfloat16 else 0, atol=0)
    every = [2 * rank + 1 for rank in range(ranks.world)]
    gathered = ranks.gather(rows_of(ranks.rank, every[ranks.rank]), every, "queries")
    assert torch.equal(gathered, torch.cat([rows_of(rank, n) for rank, n in enumerate(every)]))
    assert ranks.all_reduce(torch.tensor(ranks.rank + 1)).item() == sum(range(ranks.world + 1))
    return dict(ranks.traffic)


@WORLDS
def test_messages_of_any_size_arrive_whole_in_whatever_order_they_are_asked_for_and_are_counted(world: int) -> None:
    for rank, traffic in enumerate(run_on_ranks(world, speak)):
        for kind in range(3):
            sent = 0
            for seed in range(24):
                if seed % 5 != 4 and seed % 3 == kind:
                    row = table(seed, world, 40_000 if seed % 8 == 0 else 30)[rank]
                    sent += (sum(row) - row[rank]) * 3 * DTYPES[seed % 4].itemsize
            assert traffic[str(kind)] == sent
        assert traffic["queries"] == (2 * rank + 1) * (world - 1) * 3 * 4
        assert traffic["control"] == round(2 * 8 * (world - 1) / world)


def read_too_early(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.ones(2)
    finish = ranks.begin_all_reduce(sums)
    early = sums.clone()
    return early, finish(), finish().add_(1)


def test_what_ranks_that_are_threads_send_is_not_there_before_it_is_waited_for() -> None:
    for early, sums, again in run_on_threads(3, read_too_early):
        assert early.isnan().all() and sums is again and again.tolist() == [4.0, 4.0]


def die(ranks: Ranks, collective: Callable[[Ranks], Any]) -> None:
    """Rank 1 dies; rank 0 says what it is told, and when."""
    if ranks.rank == 1:
        os._exit(1)
    began = time.monotonic()
    with pytest.raises(RendezvousError) as info:
        collective(ranks)
    raise AssertionError(f"after {time.monotonic() - began:.0f} s: {info.value}")


def summed(ranks: Ranks) -> Any:
    return ranks.all_reduce(torch.ones(3))


def exchanged(ranks: Ranks) -> Any:
    return ranks.exchange(torch.ones(2), [1, 1], [1, 1], "rows")


def gathered(ranks: Ranks) -> Any:
    return ranks.gather_objects("here")


@pytest.mark.parametrize("collective", [Ranks.barrier, summed, exchanged, gathered])
def test_a_rank_that_dies_ends_the_others_at_once(collective: Callable[[Ranks], Any]) -> None:
    told = r"rank 0: (?s:.*)after \d s: rank 0 has lost another rank, .* log \([^/]*[Cc]onnection [^/]*\)\."
    with pytest.raises(AssertionError, match=told) as info:
        run_on_ranks(2, die, collective=collective)
    assert "rank 1 died" in str(info.value)


def strided(ranks: Ranks) -> None:
    ranks.all_reduce(torch.ones(3, 3)[:, 0])


def test_only_contiguous_tensors_are_summed() -> None:
    with pytest.raises(AssertionError, match="must be contiguous"):
        run_on_threads(2, strided)


def patience(ranks: Ranks) -> Any:
    group: Any = dist.group.WORLD
    return group._get_backend(ranks.device).options._timeout


def test_a_silent_rank_is_given_up_in_less_than_a_minute() -> None:
    assert run_on_ranks(3, patience) == [PEER_TIMEOUT] * 3 and PEER_TIMEOUT.total_seconds() < 60


def test_how_long_a_silent_rank_is_waited_for_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer_timeout(torch.device("cpu")) == PEER_TIMEOUT and peer_timeout(torch.device("cuda", 0)) == NCCL_TIMEOUT
    monkeypatch.setenv("DISTKGD_PEER_SECONDS", "90")
    assert peer_timeout(torch.device("cuda", 0)).total_seconds() == 90
    monkeypatch.setenv("DISTKGD_PEER_SECONDS", "soon")
    with pytest.raises(RendezvousError, match=r"DISTKGD_PEER_SECONDS is 'soon'.*unset it"):
        peer_timeout(torch.device("cpu"))


def gather_and_differentiate(ranks: Ranks, counts: list[int], in_order: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    ranks.in_order = in_order
    ranks.traffic.clear()
    rows = rows_of(ranks.rank, counts[ranks.rank], dtype=torch.float64).div(1_000).requires_grad_()
    found = ranks.gather(rows, counts, "queries")
    (first,) = torch.autograd.grad(((ranks.rank + 1) * found.pow(3)).sum(), rows, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), rows)
    ranks.in_order = True
    return found.detach(), first.detach(), second, ranks.traffic["queries"]


@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 0, 1], [0, 4, 2]])
@pytest.mark.parametrize("run", [run_on_ranks, run_on_threads])
def test_collectives_gather_what_an_exchange_does_with_its_gradients_and_bytes(
    run: Callable[..., Any], counts: list[int]
) -> None:
    given = run(3, gather_and_differentiate, counts=counts, in_order=True)
    for one, other in zip(given, run(3, gather_and_differentiate, counts=counts, in_order=False), strict=True):
        assert one[3] == other[3]
        for expected, found in zip(one[:3], other[:3], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
