"""Two ranks on pretend GPUs, under NCCL's rules, train what two ranks on CPUs do, with one order of collectives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.distributed.ranks import Ranks
from distkgd.methods import METHODS
from tests.gpu.equals import STEPS, on_host
from tests.gpu.nccl import NCCL
from tests.invariants.test_world_size import METHOD_OPTIONS, REGIMES, assert_same, student
from tests.ranks import run_on_ranks, run_on_threads
from tests.toys import take_steps, toy_job, train_some

WAYS = [(regime, move) for regime in REGIMES for move in ("rows", "queries")]
EVEN = {"batch_size": 48, "balanced": True}
CASES: dict[str, dict[str, Any]] = {
    **{f"scratch {regime} {move}": student("scratch", {}, REGIMES[regime], move=move) for regime, move in WAYS},
    **{
        f"{method} {WAYS[i % 8][0]} {WAYS[i % 8][1]}": student(
            method, METHOD_OPTIONS[method][0], REGIMES[WAYS[i % 8][0]], move=WAYS[i % 8][1]
        )
        for i, method in enumerate(METHODS)
        if method != "scratch"
    },
    "dualde, soft kl": student("dualde", METHOD_OPTIONS["dualde"][1], REGIMES["batch"], accumulate=2),
    "metasd, queries": student("metasd", METHOD_OPTIONS["metasd"][2], REGIMES["all"], move="queries"),
    "own candidates": student("bkd", {}, REGIMES["chunk"] | {"sides": "both"}, move="nothing"),
    "balanced": student("bkd", {}, {"kind": "chunk", "num": 8, "chunk": 2}, **EVEN),
    "balanced, 1-vs-all": student("scratch", {}, REGIMES["all"], move="queries", **EVEN),
    "rotate": student("scratch", {}, REGIMES["all"], scorer="rotate", bits=4),
}


def with_calls(ranks: Ranks, config: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    NCCL.calls.clear()
    found = take_steps(toy_job(config, ranks, Path("/nonexistent")), STEPS)
    return on_host(found), list(NCCL.calls)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_on_gpus_train_what_two_on_cpus_do(name: str) -> None:
    config = {"dtype": "float64", "student": CASES[name]}
    found = run_on_ranks(2, with_calls, pretend=True, config=config)
    wanted = run_on_threads(2, train_some, config=config, steps=STEPS)
    for one, (other, _) in zip(wanted, found, strict=True):
        assert_same([one], [other], rows=1e-6, losses=1e-9)
        assert other["valid"] == pytest.approx(one["valid"], abs=1e-9)
    (_, first), (_, second) = found
    assert first and first == second


def against_the_rules(ranks: Ranks, name: str) -> str:
    there = torch.zeros(4, 4, device=ranks.device)
    calls = {
        "a tensor of the host": lambda: ranks.all_reduce(torch.zeros(4)),
        "a view that is not contiguous": lambda: NCCL.all_reduce(there.T[:2], async_op=True),
        "parts that differ": lambda: NCCL.all_gather_into_tensor(there, there[:1], async_op=True),
        "two dtypes": lambda: NCCL.all_gather_into_tensor(there, there[:2].double(), async_op=True),
    }
    try:
        calls[name]()
    except AssertionError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "a tensor of the host": "takes no tensor on cpu",
        "a view that is not contiguous": "not contiguous",
        "parts that differ": "equal parts",
        "two dtypes": "beside",
    }.items(),
)
def test_what_nccl_would_refuse_is_refused(name: str, said: str) -> None:
    assert all(said in told for told in run_on_ranks(2, against_the_rules, pretend=True, name=name))
