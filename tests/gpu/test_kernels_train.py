"""Training steps by our Triton kernels, under Triton's interpreter on the pretend GPU, are those on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest

from distkgd.kernels.triton import runtime
from tests.gpu.equals import both_with_kernels
from tests.invariants.test_world_size import REGIMES, assert_same, student
from tests.kernels.triton.test_gpu_kernels import Run, process

pytestmark = pytest.mark.skipif(isinstance(runtime.triton, runtime._Absent), reason="triton is not installed")
DISTANCES = {"forward_code", "queries_code", "rows_code"}
ROWS = {"add_code", "update_code"}
DUALDE = {f"dualde_{name}_code" for name in ("terms", "pulls", "shapes", "unshaped")}
SCORES = {"sums_code", "pulls_code"}
SMALL = {"optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 8}
# method, its options, candidates, other options of the stage -> kernels that have to run
CASES: dict[str, tuple[tuple[str, dict[str, Any], str, dict[str, Any]], set[str]]] = {
    "own negatives": (("scratch", {}, "triple", {"scorer": "complex"}), DISTANCES | ROWS | {"integers_code"}),
    "1-vs-all": (("scratch", {}, "all", {"scorer": "complex", "loss": {"name": "softmax"}}), ROWS),
    "bkd": (("bkd", {}, "all", {"scorer": "complex", "reciprocal": False}), ROWS | SCORES),
    "dualde": (
        (
            "dualde",
            {"stage_one": False, "stage_two": {"epochs": 9}},
            "triple",
            {"reciprocal": False, "loss": {"name": "softplus"}},
        ),
        DISTANCES | ROWS | DUALDE,
    ),
    "softplus": (("scratch", {}, "triple", {"scorer": "transe", "loss": {"name": "softplus"}}), ROWS | SCORES),
    "adam": (("scratch", {}, "triple", {"scorer": "distmult", "optimizer": {"name": "adam", "lr": 0.01}}), ROWS),
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    yield from process(TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_steps_by_kernels_are_those_on_the_cpu(interpreted: Run, name: str) -> None:
    (method, how, regime, more), wanted = CASES[name]
    config = {"student": student(method, how, REGIMES[regime], **(SMALL | more))}
    one, two, ran = interpreted(both_with_kernels, config)
    assert wanted <= ran, wanted - ran
    assert_same([one], [two], rows=1e-5, losses=1e-4)
