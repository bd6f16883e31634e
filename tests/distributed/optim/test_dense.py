"""Replicated tensors: our formulas against arithmetic, and DeepSpeed's engines against our formulas."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.distributed.optim.deepspeed_engine import DeepSpeedDense, check_supported, import_deepspeed
from distkgd.distributed.optim.dense import Dense, DenseOptimizer, begin_reducing
from distkgd.distributed.optim.rows import ADAGRAD_EPS, ADAM_BETAS, ADAM_EPS
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError, DivergedError, UnsupportedError
from tests.ranks import run_on_ranks

NAMES = ("sgd", "adagrad", "rowwise_adagrad", "adam")
STAGES = (0, 1, 2, 3)
WAYS = (0, 2, 3)  # 1 takes that of 2
# Each optimiser and each stage; rowwise_adagrad has no form that ZeRO could cut.
PAIRS = [("sgd", 0), ("sgd", 3), ("adagrad", 1), ("adagrad", 3), ("rowwise_adagrad", 0), ("adam", 2), ("adam", 3)]
STEPS, LR, ROWS = 8, 0.05, 12
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def start(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """21 and 5 numbers: a share of two or three ranks ends inside a tensor and inside a row."""
    shapes = {"relation": (7, 3), "evaluator.a": (5,)}
    return {key: draw(*shape, seed=i, dtype=dtype) for i, (key, shape) in enumerate(shapes.items())}


def backward(tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Leave this rank's share of the gradient of a least-squares problem; the norm of the whole is far above one."""
    dtype = next(iter(tensors.values())).dtype
    x = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    matrix, target = draw(ROWS, len(x), seed=20, dtype=dtype), draw(ROWS, seed=21, dtype=dtype)
    mine = slice(*ranks.share(ROWS))
    (30.0 * (matrix[mine] @ x - target[mine]).square().sum() / ROWS).backward()


# -- run on ranks ---------------------------------------------------------------------------------------------------


def build(engine: int | str, name: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> Dense:
    """engine: ddp, or a ZeRO stage."""
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    if isinstance(engine, str):
        return DenseOptimizer(name, leaves, lr=LR)
    return DeepSpeedDense(name, leaves, lr=LR, zero=engine, ranks=ranks)


def values(dense: Dense) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in dense.tensors.items()}


def saved(dense: Dense) -> dict[str, Any]:
    """What a checkpoint holds of one group."""
    state = {key: {k: v.clone() for k, v in kinds.items()} for key, kinds in dense.state().items()}
    return {"tensors": values(dense), "state": state, "steps": dense.steps}


def train(
    ranks: Ranks,
    engine: int | str,
    name: str,
    steps: range,
    given: Mapping[str, Any] | None = None,
    reduced: bool = False,
    disturb: Callable[[Dense, int], None] | None = None,
) -> dict[str, Any]:
    """What is saved before and after some steps, at learning rates and clip factors that change with the step.

    given: saved before. reduced: sum over ranks before any engine's step. disturb: called before each step.
    """
    dense = build(engine, name, start(), ranks)
    before = saved(dense)
    if given is not None:
        dense.load(**given)
        before = saved(dense)
    for step in steps:
        backward(dense.tensors, ranks)
        if disturb is not None:
            disturb(dense, step)
        early = reduced or not dense.sums_ranks
        if early:
            begin_reducing([dense], ranks, torch.zeros(0))()
        dense.step(1.0 / (1 + 0.1 * step), 0.01 if step % 3 else 0.02, reduced=early)
    after = saved(dense)
    dense.close()
    return {"before": before, "after": after}


def lose_gradients(dense: Dense, step: int) -> None:
    """Steps 2 and 3 have a gradient for one tensor only."""
    if step in (2, 3):
        dense.tensors["relation"].grad = None


def write_leaf(dense: Dense, step: int) -> None:
    """Someone else moves a tensor between two steps."""
    if step == 2:
        with torch.no_grad():
            dense.tensors["relation"].mul_(-1.0)


def train_two(ranks: Ranks, engine: int | str) -> list[dict[str, Any]]:
    """Two groups; the second steps in step 3 alone, and its gradients of the other steps are thrown away."""
    student = build(engine, "adam", start(), ranks)
    teacher = build(engine, "adam", {"relation": draw(4, 3, seed=7)}, ranks)
    seen = []
    for step in range(5):
        stepping = [student, teacher] if step == 3 else [student]
        for dense in (student, teacher):
            backward(dense.tensors, ranks)
        if not student.sums_ranks:
            begin_reducing(stepping, ranks, torch.zeros(0))()
        for dense in stepping:
            dense.step(1.0, 0.01, reduced=not student.sums_ranks)
        teacher.clear()
        assert all(t.grad is None for dense in (student, teacher) for t in dense.tensors.values())
        seen.append({"student": saved(student), "teacher": saved(teacher)})
    student.close()
    teacher.close()
    return seen


def learn_to_learn(ranks: Ranks, engine: int | str) -> dict[str, Tensor]:
    """Three steps on the loss after one virtual step, its gradient taken through that step."""
    dense = build(engine, "sgd", {"weight": draw(4, 3, seed=3)}, ranks)
    mine = slice(*ranks.share(ROWS))
    for step in range(3):
        x, y = draw(ROWS, 3, seed=40 + step)[mine], draw(ROWS, 4, seed=50 + step)[mine]
        weight = dense.tensors["weight"]
        first = (x @ weight.T - y).pow(4).sum() / ROWS
        (gradient,) = torch.autograd.grad(first, weight, create_graph=True)
        ((x.flip(0) @ (weight - 0.01 * gradient).T - y).square().sum() / ROWS).backward()
        if not dense.sums_ranks:
            begin_reducing([dense], ranks, torch.zeros(0))()
        dense.step(1.0, reduced=not dense.sums_ranks)
    found = values(dense)
    dense.close()
    return found


def count_bytes(ranks: Ranks, zero: int) -> tuple[float, float]:
    """Payload of one step: as our counter says, and as DeepSpeed's calls say."""
    import deepspeed

    dense = build(zero, "adam", start(), ranks)
    for _ in range(3):  # ZeRO 3 learns the order of its parameters in the first steps
        dense.step(1.0, reduced=False)
    counted = ranks.traffic["dense"]
    with listen(deepspeed.comm, ranks.world) as heard:
        dense.step(1.0, reduced=False)
    dense.close()
    return ranks.traffic["dense"] - counted, sum(heard)


@contextmanager
def listen(comm: Any, world: int) -> Iterator[list[float]]:
    """Bytes that each collective of numbers hands to other ranks, while in the context."""
    # Per input number: what a ring all-reduce, an all-gather and a reduce-scatter send.
    kinds = {"all_reduce": (0, 2 / world), "reduce_scatter_fn": (1, 1 / world)}
    kinds |= dict.fromkeys(("allgather_fn", "all_gather_into_tensor", "all_gather"), (1, 1.0))
    heard: list[float] = []

    def wrap(call: Callable[..., Any], position: int, share: float) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if args[position].dim():
                heard.append(args[position].numel() * 4 * share * (world - 1))
            return call(*args, **options)

        return wrapped

    with patch.multiple(comm, **{name: wrap(getattr(comm, name), *how) for name, how in kinds.items()}):
        yield heard


def numbers_held(ranks: Ranks, zero: int) -> tuple[int, int]:
    """By one rank after a step: numbers in the engine's whole parameters, and in adam's two moments."""
    dense = DeepSpeedDense("adam", start(), lr=LR, zero=zero, ranks=ranks)
    dense.step(1.0, reduced=False)
    whole = sum(parameter.numel() for parameter in dense._engine.module.parameters())
    moments = [state[key] for state in dense._inner.state.values() for key in ("exp_avg", "exp_avg_sq")]
    dense.close()
    return whole, sum(moment.numel() for moment in moments)


def poison(ranks: Ranks) -> str:
    """The message when a gradient is NaN at ZeRO stage 3."""
    dense = build(3, "sgd", start(), ranks)
    dense.tensors["relation"].grad = torch.full((7, 3), torch.nan)
    try:
        dense.step(1.0, reduced=False)
    except DivergedError as error:
        return str(error)
    finally:
        dense.close()
    return "it went on"


# -- comparison -----------------------------------------------------------------------------------------------------


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    """Nested mappings and sequences of tensors, to a tolerance."""
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def on_ranks(world: int, fn: Callable[..., Any], **options: Any) -> Any:
    """What all ranks say, bit for bit the same."""
    found = run_on_ranks(world, fn, **options)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0)
    return found[0]


def by_hand(
    name: str, x: list[float], gradients: Sequence[list[float]], rates: Sequence[float], row: int
) -> list[float]:
    """Numbers after some steps, one by one; `row` numbers share a sum in rowwise_adagrad."""
    sums, means, squares = [0.0] * len(x), [0.0] * len(x), [0.0] * len(x)
    first, second = ADAM_BETAS
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        for i, g in enumerate(gradient):
            mates = gradient[i // row * row : i // row * row + row]
            sums[i] += g * g if name == "adagrad" else sum(m * m for m in mates) / row
            means[i] = first * means[i] + (1 - first) * g
            squares[i] = second * squares[i] + (1 - second) * g * g
            match name:
                case "sgd":
                    x[i] -= rate * g
                case "adagrad" | "rowwise_adagrad":
                    x[i] -= rate * g / (sums[i] ** 0.5 + ADAGRAD_EPS)
                case "adam":
                    spread = (squares[i] / (1 - second**step)) ** 0.5 + ADAM_EPS
                    x[i] -= rate * means[i] / (1 - first**step) / spread
    return x


# -- our formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_formula_written_out_by_hand(name: str) -> None:
    tensors = start(torch.float64)
    dense = DenseOptimizer(name, {k: t.clone().requires_grad_() for k, t in tensors.items()}, lr=LR)
    gradients: dict[str, list[list[float]]] = {key: [] for key in tensors}
    scales = (1.0, 0.5, 2.0, 1.0)
    for step, scale in enumerate(scales):
        for i, (key, tensor) in enumerate(dense.tensors.items()):
            tensor.grad = draw(*tensor.shape, seed=10 * step + i, dtype=torch.float64)
            gradients[key].append((0.7 * tensor.grad).reshape(-1).tolist())
        dense.step(scale, 0.7)
    rates = [LR * scale for scale in scales]
    for key, row in (("relation", 3), ("evaluator.a", 1)):
        wanted = by_hand(name, tensors[key].reshape(-1).tolist(), gradients[key], rates, row)
        assert_same(dense.tensors[key].detach().reshape(-1), torch.tensor(wanted, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_ranks_takes_the_same_steps(name: str) -> None:
    alone = on_ranks(1, train, engine="ddp", name=name, steps=range(STEPS))
    assert_same(on_ranks(3, train, engine="ddp", name=name, steps=range(STEPS)), alone, 1e-4)
    moved = alone["after"]["tensors"]["relation"] - start()["relation"]
    assert moved.abs().min() > 1e-4


@pytest.mark.parametrize("engine", ["ddp", pytest.param(2, marks=needs_deepspeed)])
@pytest.mark.parametrize("name", NAMES[:2] + NAMES[3:])
def test_a_tensor_without_gradient_has_one_of_zeros_on_any_number_of_ranks(name: str, engine: int | str) -> None:
    options = {"engine": engine, "name": name, "disturb": lose_gradients}
    two, four = (on_ranks(1, train, steps=range(n), **options)["after"]["tensors"]["relation"] for n in (2, 4))
    assert torch.equal(two, four) == (name != "adam")
    assert_same(on_ranks(2, train, steps=range(4), **options)["after"]["tensors"]["relation"], four, 1e-5)


def test_gradients_that_were_not_summed_are_refused_by_the_engine_that_cannot_sum() -> None:
    dense = DenseOptimizer("sgd", start(), lr=LR)
    with pytest.raises(AssertionError, match="begin_reducing"):
        dense.step(1.0, reduced=False)


@pytest.mark.parametrize("engine", ["ddp", pytest.param(1, marks=needs_deepspeed)])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["tensors"].pop("relation"), "no tensor 'relation', only evaluator.a"),
        (lambda s: s["tensors"].update(relation=torch.zeros(7, 4)), r"\[7, 4\] in the checkpoint and \[7, 3\] here"),
        (lambda s: s["state"].pop("relation"), "no optimiser state 'mean' of tensor 'relation', only nothing"),
        (lambda s: s["state"]["relation"].update(square=torch.zeros(7)), "has 7 numbers, expected 21"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    engine: int | str, change: Callable[[Any], None], said: str
) -> None:
    dense = build(engine, "adam", start(), Ranks())
    content = saved(dense)
    change(content)
    with pytest.raises(CheckpointError, match=said):
        dense.load(**content)
    dense.close()


# -- DeepSpeed against them -----------------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_deepspeed_takes_the_steps_of_ddp(name: str, zero: int) -> None:
    wanted = on_ranks(2, train, engine="ddp", name=name, steps=range(STEPS))
    found = on_ranks(2, train, engine=zero, name=name, steps=range(STEPS))
    assert_same(found["after"]["tensors"], wanted["after"]["tensors"])
    assert_same(found["after"]["state"], wanted["after"]["state"], 1e-5)
    assert_same(found["before"], wanted["before"], 0.0)


@needs_deepspeed
@pytest.mark.parametrize(("zero", "world"), [(0, 1), (1, 3), (2, 1), (3, 3)])
def test_deepspeed_takes_them_on_one_and_on_three_ranks(zero: int, world: int) -> None:
    wanted = on_ranks(world, train, engine="ddp", name="adam", steps=range(STEPS))
    found = on_ranks(world, train, engine=zero, name="adam", steps=range(STEPS))
    assert_same(found["after"]["tensors"], wanted["after"]["tensors"], 1e-5)


@needs_deepspeed
@pytest.mark.parametrize("zero", WAYS)
def test_gradients_that_were_summed_before_make_the_same_step(zero: int) -> None:
    options = {"engine": zero, "name": "sgd", "steps": range(3)}
    assert_same(on_ranks(2, train, reduced=True, **options), on_ranks(2, train, reduced=False, **options))


@needs_deepspeed
@pytest.mark.parametrize("zero", WAYS)
def test_a_leaf_that_is_written_between_steps_stays_written(zero: int) -> None:
    options = {"name": "adagrad", "steps": range(4), "disturb": write_leaf}
    assert_same(on_ranks(2, train, engine=zero, **options), on_ranks(2, train, engine="ddp", **options), 1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "legs"),
    [
        ("sgd", [(3, 1), (2, 2), (1, 1), ("ddp", 2)]),
        ("rowwise_adagrad", [("ddp", 2), (0, 1), ("ddp", 1), (0, 2)]),
        ("adagrad", [("ddp", 2), (0, 1), (1, 2), ("ddp", 1)]),
        ("adagrad", [(2, 1), ("ddp", 2), (3, 2), (0, 2)]),
        ("adam", [(3, 1), (2, 2), (1, 1), ("ddp", 2)]),
        ("adam", [(1, 1), (3, 2), (2, 2), (0, 1)]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(str(engine) for engine, _ in value),
)
def test_a_checkpoint_moves_between_engines_stages_and_world_sizes(name: str, legs: list[tuple[Any, int]]) -> None:
    given = None
    for i, (engine, world) in enumerate(legs):
        found = on_ranks(world, train, engine=engine, name=name, steps=range(3 * i, 3 * i + 3), given=given)
        if given is not None:
            assert_same(found["before"], given, 0.0)
        given = found["after"]
    assert given is not None and given["steps"] == 12
    wanted = on_ranks(1, train, engine="ddp", name=name, steps=range(12))
    assert_same(given, wanted["after"], 1e-5)


@needs_deepspeed
@pytest.mark.parametrize("zero", WAYS)
def test_only_the_group_that_steps_moves(zero: int) -> None:
    found, wanted = on_ranks(2, train_two, engine=zero), on_ranks(2, train_two, engine="ddp")
    assert_same(found, wanted)
    teacher = [step["teacher"] for step in found]
    assert_same(teacher[2], teacher[0], 0.0)
    assert teacher[3]["steps"] == 1 and not torch.equal(teacher[3]["tensors"]["relation"], draw(4, 3, seed=7))
    assert_same(teacher[4], teacher[3], 0.0)


@needs_deepspeed
def test_a_gradient_through_a_virtual_step_reaches_deepspeed_as_it_reaches_ddp() -> None:
    wanted = on_ranks(2, learn_to_learn, engine="ddp")
    assert_same(on_ranks(2, learn_to_learn, engine=2), wanted)
    assert (wanted["weight"] - draw(4, 3, seed=3)).abs().max() > 0.1


@needs_deepspeed
@pytest.mark.parametrize("zero", STAGES)
def test_the_bytes_counted_are_those_that_deepspeed_sends(zero: int) -> None:
    for counted, heard in run_on_ranks(2, count_bytes, zero=zero):
        assert counted == pytest.approx(heard, abs=1.0) and heard > 0


@needs_deepspeed
def test_stages_one_and_two_shard_the_state_and_stage_three_the_engines_copy_too() -> None:
    # 26 numbers; halves are padded to 14 together, and to 11 + 3 tensor by tensor.
    held = {zero: run_on_ranks(2, numbers_held, zero=zero) for zero in STAGES}
    assert held == {0: [(26, 52)] * 2, 1: [(26, 28)] * 2, 2: [(26, 28)] * 2, 3: [(0, 28)] * 2}


@needs_deepspeed
def test_a_gradient_that_is_not_finite_stops_a_stage_that_would_skip_the_step() -> None:
    assert all("relation, evaluator.a became NaN or Inf" in said for said in run_on_ranks(2, poison))


# -- refusals and manners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "zero", "dtype", "said"),
    [
        ("sgd", 4, torch.float32, "no ZeRO stage 4; allowed: 0, 1, 2, 3"),
        ("rowwise_adagrad", 2, torch.float32, "use stage 0, optimizer.name adagrad, or engine: ddp"),
        ("adam", 1, torch.float64, "'relation' is float64; set dtype: float32, or use engine: ddp"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(name: str, zero: int, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        DeepSpeedDense(name, start(dtype), lr=LR, zero=zero, ranks=Ranks())
    for pair in PAIRS:
        check_supported(*pair, start())


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with (
        patch.dict(sys.modules, {"deepspeed": None}),
        pytest.raises(UnsupportedError, match=r"pip install 'distkgd\[deepspeed\]', or use engine: ddp"),
    ):
        DeepSpeedDense("sgd", start(), lr=LR, zero=0, ranks=Ranks())


@pytest.mark.parametrize("known", [True, False])
def test_mlflow_is_hidden_from_deepspeed_unless_somebody_has_it_already(known: bool) -> None:
    seen = []

    def imported(name: str) -> None:
        seen.append(sys.modules["mlflow"])
        raise ModuleNotFoundError(name=name)

    with patch.dict(sys.modules), patch.object(importlib, "import_module", imported):
        sys.modules.pop("mlflow", None)
        if known:
            sys.modules["mlflow"] = sys
        with pytest.raises(UnsupportedError, match="pip install"):
            import_deepspeed(torch.device("cpu"))
        assert seen == [sys if known else None]
        assert ("mlflow" in sys.modules) == known


ALONE = """
import os, sys, torch, torch.distributed as dist
from distkgd.distributed.optim.deepspeed_engine import DeepSpeedDense
from distkgd.distributed.ranks import Ranks

for zero in (2, 3):
    one, other = (
        DeepSpeedDense("sgd", {"x": torch.ones(3, requires_grad=True)}, lr=0.5, zero=zero, ranks=Ranks()) for _ in "ab"
    )
    one.close()
    other.tensors["x"].grad = torch.ones(3)
    other.step(1.0, reduced=False)
    assert other.tensors["x"].tolist() == [0.5] * 3
    other.close()
    assert not dist.is_initialized()
left_open = DeepSpeedDense("sgd", {"x": torch.ones(3, requires_grad=True)}, lr=0.5, zero=1, ranks=Ranks())
assert "DS_ACCELERATOR" not in os.environ and "mlflow" not in sys.modules
"""


@needs_deepspeed
def test_a_process_without_launcher_trains_silently_and_leaves_nothing_behind() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
