"""The Triton kernels without a GPU: their arithmetic under Triton's interpreter, their code compiled for two GPUs.

Whether kernels are interpreted is decided when Triton is imported, so each way has a process of its own.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.kernels.pairs import KINDS
from distkgd.kernels.triton import runtime
from distkgd.kernels.triton.dualde import How
from tests.kernels.triton import gpu_cases as cases
from tests.kernels.triton.gpu_compile import launches_compiled

needs_triton = pytest.mark.skipif(isinstance(runtime.triton, runtime._Absent), reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., Any]


def process(**variables: str) -> Iterator[Run]:
    """Runs functions in one fresh process that sees these environment variables too."""
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(torch.set_num_threads, 1).result()  # started while the variables are set
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    yield from process(TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = str(tmp_path_factory.mktemp("triton"))
    yield from process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=folder)


@needs_triton
@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_distances_and_gradients_are_those_of_the_naive_formula(interpreted: Run, kind: str, shape: str) -> None:
    interpreted(cases.distances_are_the_naive_sums, kind, shape, torch.float64, "cpu")


@needs_triton
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("manhattan", torch.float32), ("scaled_manhattan", torch.bfloat16), ("modulus", torch.bfloat16)],
    ids=str,
)
def test_distances_of_narrower_numbers_are_summed_in_float32(interpreted: Run, kind: str, dtype: torch.dtype) -> None:
    interpreted(cases.distances_are_the_naive_sums, kind, "few queries per group", dtype, "cpu")


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [cases.distances_take_narrow_rows, cases.empty_groups_give_empty_sums],
    ids=lambda case: case.__name__,
)
def test_distances_at_the_edges(interpreted: Run, case: Run, kind: str) -> None:
    interpreted(case, kind, "cpu")


@needs_triton
@pytest.mark.parametrize("kind", KINDS[1:])
def test_equal_rows_have_distance_and_gradient_zero(interpreted: Run, kind: str) -> None:
    interpreted(cases.equal_rows_have_gradient_zero, kind, "cpu")


@needs_triton
@pytest.mark.parametrize(("num", "few"), [(140, 1 << 14), (140, 4), (1, 4), (0, 4)])
def test_rows_are_added_up_in_order(interpreted: Run, num: int, few: int) -> None:
    interpreted(cases.rows_are_added_up, num, few, "cpu")


@needs_triton
@pytest.mark.parametrize(("num", "below"), [(3000, 700), (2048, 10**9), (1, 5), (1024, 1)])
def test_segments_are_those_of_sorted_numbers(interpreted: Run, num: int, below: int) -> None:
    interpreted(cases.segments_are_those_of_sorted_numbers, num, below, "cpu")


@needs_triton
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_an_update_is_that_of_the_formula(interpreted: Run, name: str, listed: bool) -> None:
    interpreted(cases.updates_are_those_of_the_formula, name, listed, "cpu")


@needs_triton
def test_directions_are_those_of_torch(interpreted: Run) -> None:
    interpreted(cases.directions_are_those_of_torch, "cpu")


@needs_triton
def test_drawn_numbers_are_those_of_the_cpu(interpreted: Run) -> None:
    interpreted(cases.drawn_numbers_are_those_of_the_cpu, "cpu")


@needs_triton
@pytest.mark.parametrize("num", [3, 64, 2500])
@pytest.mark.parametrize("kind", ["logsumexp", "gap", "softplus"])
def test_sums_of_scores_and_gradients_are_those_of_torch(interpreted: Run, kind: str, num: int) -> None:
    interpreted(cases.sums_of_scores_are_those_of_torch, kind, num, "cpu")


@needs_triton
@pytest.mark.parametrize(
    ("how", "shaped", "num"),
    [
        (How(True, 2, 1.5, 1.0, True, False), True, 1),
        (How(False, 2, 1.5, 0.7, True, False), True, 37),
        (How(False, 2, 0.5, 1.0, True, True), True, 5),
        (How(False, 1, 1.0, 1.0, True, False), False, 1500),
        (How(True, 1, 1.0, 1.0, False, False), True, 1),
        (How(False, 2, 2.0, 0.3, False, False), False, 9),
    ],
)
def test_dualdes_terms_and_gradients_are_those_of_the_formula(
    interpreted: Run, how: How, shaped: bool, num: int
) -> None:
    interpreted(cases.dualde_terms_are_those_of_the_formula, how, shaped, num, "cpu")


@needs_triton
def test_dualdes_shapes_and_gradients_are_those_of_the_formula(interpreted: Run) -> None:
    interpreted(cases.dualde_shapes_are_those_of_the_formula, "cpu")


@needs_triton
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_launch_compiles_for_a_gpu_and_fits_its_shared_memory(compiled: Run, capability: int) -> None:
    shared = compiled(launches_compiled, capability)
    assert {name.split()[0] for name in shared} == {
        "forward_code",
        "queries_code",
        "candidates_code",
        "rows_code",
        "gather_code",
        "add_code",
        "update_code",
        "integers_code",
        "begins_code",
        "segments_code",
        "sums_code",
        "pulls_code",
        "directions_code",
        "undirected_code",
        "dualde_terms_code",
        "dualde_pulls_code",
        "dualde_shapes_code",
        "dualde_unshaped_code",
    }
    assert max(shared.values()) <= {80: 163, 90: 227}[capability] * 1024


def test_without_a_gpu_the_kernels_are_not_chosen() -> None:
    assert not runtime.available(torch.device("cpu"))
    if not torch.cuda.is_available():
        assert not runtime.available(torch.device("cuda"))


def test_on_a_gpu_kernels_are_chosen_for_float32_unless_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda device: device.type == "cuda")
    monkeypatch.delenv("DISTKGD_KERNELS", raising=False)
    gpu = torch.device("cuda")
    assert runtime.chosen(gpu, torch.float32) and not runtime.chosen(torch.device("cpu"), torch.float32)
    assert not runtime.chosen(gpu, torch.float64)
    monkeypatch.setenv("DISTKGD_KERNELS", "off")
    assert not runtime.chosen(gpu, torch.float32)


def test_every_module_can_be_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, distkgd.kernels.triton.distances\n"
        "import distkgd.kernels.triton.runtime as gpu\n"
        "print(gpu.available(torch.device('cuda')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--only", "checks"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "needs a CUDA GPU" in found.stdout
