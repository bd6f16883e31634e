"""The pretend GPU itself: what it refuses, what it counts and where, and that no other process notices it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.scorers import build_scorer
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.gpu.cases import Counted, counted
from tests.gpu.counts import COUNTS
from tests.gpu.shapes import shapes_only
from tests.invariants.test_world_size import METHOD_OPTIONS, REGIMES, student
from tests.ranks import run_on_ranks
from tests.toys import toy_job

MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda here, there: here + there,
    "in place": lambda here, there: there.add_(here),
    "product": lambda here, there: there @ here.T,
    "joined": lambda here, there: torch.cat([here, there]),
    "chosen": lambda here, there: torch.where(there > 0, here, there),
    "index of the device into the host": lambda here, there: here[there.long()],
    "rows by number": lambda here, there: there.index_select(0, torch.tensor([0])),
    "written by number": lambda here, there: there.index_copy_(0, torch.tensor([0]), here[:1]),
    "looked up": lambda here, there: torch.nn.functional.embedding(torch.tensor([0]), there),
}
# (work, launches, synchronisations)
COUNTED: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "sum": (lambda x: x + 1.0, 1, 0),
    "view": (lambda x: x[1:].T.unsqueeze(0), 0, 0),
    "number": (lambda x: float(x[0, 0]), 0, 1),
    "list": (lambda x: x.tolist(), 0, 1),
    "to the host": (lambda x: x.cpu(), 0, 1),
    "to the device": (lambda x: torch.ones(3).to(x.device), 0, 1),
    "made there": (lambda x: torch.tensor([1, 2], device=x.device), 0, 1),
    "without waiting": (lambda x: torch.ones(3).to(x.device, non_blocking=True), 0, 0),
    "where": (lambda x: (x > 0).nonzero(), 5, 1),
    "boolean index": (lambda x: x[x > 0], 2, 1),
    "index of the host": (lambda x: x[torch.tensor([0])], 1, 1),
    "sort": (lambda x: torch.sort(x.repeat(500, 500).flatten()), 11, 0),
    "distinct": (torch.unique, 10, 1),
    "nothing": (lambda x: x[:0] + 1.0, 0, 0),
}


def numbers(ranks: Ranks) -> tuple[Tensor, Tensor]:
    here = torch.arange(6.0).reshape(2, 3)
    return here, here.to(ranks.device)


def mixed(ranks: Ranks, name: str) -> str:
    try:
        MIXED[name](*numbers(ranks))
    except (RuntimeError, IndexError) as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    [said] = run_on_ranks(1, mixed, pretend=True, name=name)
    assert "device" in said


def step_with_a_relation_on_the_host(ranks: Ranks) -> str:
    job = toy_job({"student": student("bkd", {}, REGIMES["all"])}, ranks, Path("/nonexistent"))
    job.method.student.relation = torch.zeros(job.method.student.relation.shape, requires_grad=True)
    try:
        train_step(job, Progress(), 0)
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


def test_a_step_with_a_table_that_was_left_on_the_host_is_refused() -> None:
    [said] = run_on_ranks(1, step_with_a_relation_on_the_host, pretend=True)
    assert "Expected all tensors to be on the same device" in said


def small_count(ranks: Ranks, name: str) -> tuple[int, int]:
    there = numbers(ranks)[1]
    found = counted(lambda: COUNTED[name][0](there))
    return found.launches, found.syncs


@pytest.mark.parametrize("name", COUNTED)
def test_launches_and_synchronisations_are_counted(name: str) -> None:
    [found] = run_on_ranks(1, small_count, pretend=True, name=name)
    assert found == COUNTED[name][1:]


def scored_and_pulled(ranks: Ranks) -> tuple[Counted, Tensor, Tensor]:
    here, there = numbers(ranks)
    leaf = there.requires_grad_()
    scorer = build_scorer("distmult", 3)
    found = counted(lambda: scorer.score(leaf, leaf, leaf).sum().backward())
    assert leaf.grad is not None and leaf.grad.device == ranks.device
    return found, leaf.grad.cpu(), 3 * here.square()


def test_what_backward_launches_is_told_by_the_line_that_asked_for_it_in_forward() -> None:
    [(found, gradient, wanted)] = run_on_ranks(1, scored_and_pulled, pretend=True)
    torch.testing.assert_close(gradient, wanted)
    lines = found.lines["scorers/bilinear.py Bilinear.score"]
    assert all("scorers/bilinear.py:" in line for line in lines)
    assert any("(backward): mul" in line for line in lines) and any("Bilinear.score: sum" in line for line in lines)


def counts_of_toys(ranks: Ranks, method: str, regime: str) -> list[Counted]:
    def step() -> Counted:
        config = {"student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime])}
        job = toy_job(config, ranks, Path("/nonexistent"))
        return counted(lambda: train_step(job, Progress(), 0))

    with_numbers = step()
    with shapes_only():
        return [with_numbers, step()]


@pytest.mark.parametrize(("method", "regime"), [("bkd", "all"), ("dualde", "batch"), ("rkd", "chunk")])
def test_steps_on_shapes_alone_are_counted_as_those_on_numbers(method: str, regime: str) -> None:
    [(numbers, shapes)] = run_on_ranks(1, counts_of_toys, pretend=True, method=method, regime=regime)
    assert shapes == numbers


def test_this_process_has_no_such_device() -> None:
    run_on_ranks(1, small_count, pretend=True, name="sum")
    assert not torch.accelerator.is_available() and not COUNTS.launches
    with pytest.raises(RuntimeError, match="gpu"):
        torch.ones(1, device="gpu")
