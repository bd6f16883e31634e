"""Row optimisers against torch's dense ones and against arithmetic."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.config import OptimizerConfig
from distkgd.distributed.optim import ADAGRAD_EPS, ADAM_BETAS, ADAM_EPS, Optimizer, clip_factor
from distkgd.distributed.ranks import Ranks
from tests.jobs import optimise_on_ranks
from tests.ranks import run_on_ranks

TOTAL, DIM, STEPS = 9, 4, 5
OPTIONS = {"lr": 0.1, "small_lr": 0.03}
NAMES = OptimizerConfig.model_fields["name"].annotation.__args__
EVERY_OPTIMISER = pytest.mark.parametrize("name", NAMES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, SMALL = draw(TOTAL, DIM), draw(3, 2, seed=1)
DENSE = [{"parts": [(None, draw(TOTAL, DIM, seed=10 + i))], "small": draw(3, 2, seed=30 + i)} for i in range(STEPS)]
# Few rows at a time, some of them twice, entities 0 and 5 never.
SPARSE_IDS = [[1, 2, 2], [8, 1, 3], [2, 7, 4, 4, 6], [1, 1, 1], [3, 8]]
SPARSE = [
    {"parts": [(torch.tensor(ids), draw(len(ids), DIM, seed=50 + i))], "small": draw(3, 2, seed=70 + i)}
    for i, ids in enumerate(SPARSE_IDS)
]


def run(name: str, steps: list[dict[str, Any]], world: int = 1) -> tuple[Tensor, dict[str, Any]]:
    """All rows, and what rank 0 says."""
    options = OPTIONS | {"name": name}
    parts = run_on_ranks(world, optimise_on_ranks, weight=WEIGHT, small=SMALL, steps=steps, options=options)
    for part in parts:
        assert torch.equal(part["small"], parts[0]["small"]) and part["clips"] == parts[0]["clips"]
    return torch.cat([part["rows"] for part in parts]), parts[0]


def summed(step: dict[str, Any]) -> Tensor:
    """[entities, dim] gradient of a step's parts."""
    out = torch.zeros(TOTAL, DIM, dtype=torch.float64)
    for ids, gradient in step["parts"]:
        if ids is None:
            out += gradient
        else:
            for entity, row in zip(ids.tolist(), gradient, strict=True):
                out[entity] += row
    return out


def torch_optimiser(name: str, tensor: Tensor, lr: float) -> torch.optim.Optimizer:
    match name:
        case "sgd":
            return torch.optim.SGD([tensor], lr=lr)
        case "adagrad":
            return torch.optim.Adagrad([tensor], lr=lr, eps=ADAGRAD_EPS)
    return torch.optim.Adam([tensor], lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS)


def with_torch(name: str, start: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    tensor = start.clone().requires_grad_()
    optimiser = torch_optimiser(name, tensor, lr)
    for gradient in gradients:
        tensor.grad = gradient.clone()
        optimiser.step()
    return tensor.detach()


def rowwise_adagrad(start: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """One running sum per row of the mean square of its gradient, entry by entry."""
    rows = start.tolist()
    sums = [0.0] * len(rows)
    for gradient in gradients:
        for i, grad in enumerate(gradient.tolist()):
            sums[i] += sum(g * g for g in grad) / len(grad)
            rows[i] = [x - lr * g / (sums[i] ** 0.5 + ADAGRAD_EPS) for x, g in zip(rows[i], grad, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def expected(name: str, start: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    if name == "rowwise_adagrad":
        return rowwise_adagrad(start, gradients, lr)
    return with_torch(name, start, gradients, lr)


@EVERY_OPTIMISER
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_on_all_rows_is_the_dense_optimisers(name: str, world: int) -> None:
    rows, rank = run(name, DENSE, world)
    torch.testing.assert_close(rows, expected(name, WEIGHT, [s["parts"][0][1] for s in DENSE], OPTIONS["lr"]))
    torch.testing.assert_close(rank["small"], expected(name, SMALL, [s["small"] for s in DENSE], OPTIONS["small_lr"]))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adam"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_on_some_rows_is_the_dense_step_with_zeros_elsewhere(name: str, world: int) -> None:
    rows, rank = run(name, SPARSE, world)
    torch.testing.assert_close(rows, expected(name, WEIGHT, [summed(s) for s in SPARSE], OPTIONS["lr"]))
    torch.testing.assert_close(rank["small"], expected(name, SMALL, [s["small"] for s in SPARSE], OPTIONS["small_lr"]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_adam_moves_the_moments_of_a_row_only_when_a_step_touches_it(world: int) -> None:
    rows, _ = run("adam", SPARSE, world)
    first, second = ADAM_BETAS
    for entity in range(TOTAL):
        weight, mean, square = WEIGHT[entity].clone(), torch.zeros(DIM).double(), torch.zeros(DIM).double()
        for step, given in enumerate(SPARSE, 1):
            if entity not in SPARSE_IDS[step - 1]:
                continue
            gradient = summed(given)[entity]
            mean = first * mean + (1 - first) * gradient
            square = second * square + (1 - second) * gradient**2
            corrected = mean / (1 - first**step), square / (1 - second**step)
            weight -= OPTIONS["lr"] * corrected[0] / (corrected[1].sqrt() + ADAM_EPS)
        torch.testing.assert_close(rows[entity], weight)


@EVERY_OPTIMISER
@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_no_step_touches_and_their_state_stay_bit_for_bit(name: str, world: int) -> None:
    rows, rank = run(name, SPARSE, world)
    touched = sorted({entity for ids in SPARSE_IDS for entity in ids})
    rest = [entity for entity in range(TOTAL) if entity not in touched]
    assert rest == [0, 5] and torch.equal(rows[rest], WEIGHT[rest])
    assert (rows[touched] != WEIGHT[touched]).any(1).all()
    for state in rank["state"].values():  # rank 0 owns entity 0 at any world size
        assert (state[0] == 0).all() and (state[1] != 0).any()


@EVERY_OPTIMISER
@pytest.mark.parametrize("whole", [True, False], ids=["all rows", "some rows"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_parts_of_a_batch_make_one_step_of_their_sum(name: str, whole: bool, world: int) -> None:
    if whole:
        parts = [(None, draw(TOTAL, DIM, seed=i)) for i in range(3)]
    else:
        parts = [(torch.tensor(ids), draw(len(ids), DIM, seed=i)) for i, ids in enumerate([[1, 2], [2, 7], [4, 2]])]
    total = torch.zeros(TOTAL, DIM, dtype=torch.float64) + summed({"parts": parts})
    ids = None if whole else torch.tensor([1, 2, 4, 7])
    one = {"parts": [(ids, total if whole else total[ids])]}
    many, _ = run(name, [{"parts": parts}] * 2, world)
    single, _ = run(name, [one] * 2, world)
    torch.testing.assert_close(many, single)
    assert not torch.equal(many, WEIGHT)


@EVERY_OPTIMISER
def test_the_scale_of_a_step_multiplies_both_learning_rates(name: str) -> None:
    halved, rank = run(name, [DENSE[0] | {"scale": 0.5}])
    full, other = run(name, [DENSE[0]])
    torch.testing.assert_close(halved - WEIGHT, 0.5 * (full - WEIGHT))
    torch.testing.assert_close(rank["small"] - SMALL, 0.5 * (other["small"] - SMALL))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [0.5, 3.0, 1000.0])
@pytest.mark.parametrize("steps", [DENSE, SPARSE], ids=["all rows", "some rows"])
def test_clipping_is_that_of_torch_over_rows_and_replicated_tensors_together(
    world: int, limit: float, steps: list[dict[str, Any]]
) -> None:
    step = steps[2]
    rows, rank = run("sgd", [step | {"limit": limit}], world)
    leaves = [WEIGHT.clone().requires_grad_(), SMALL.clone().requires_grad_()]
    leaves[0].grad, leaves[1].grad = summed(step), step["small"].clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, limit)
    assert rank["clips"][0] == pytest.approx(min(1.0, limit / float(norm)), rel=1e-12)
    assert (rank["clips"][0] == 1.0) == (limit == 1000.0)
    torch.testing.assert_close(rows, WEIGHT - OPTIONS["lr"] * leaves[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rank["small"], SMALL - OPTIONS["small_lr"] * leaves[1].grad, rtol=1e-5, atol=1e-6)


def test_repeated_rows_count_once_in_the_norm_as_their_sum() -> None:
    gradient = torch.ones(2, DIM, dtype=torch.float64)
    _, rank = run("sgd", [{"parts": [(torch.tensor([3]), gradient[:1])] * 2, "limit": 1.0}])
    assert rank["clips"][0] == pytest.approx(1.0 / (2.0 * DIM**0.5))


def test_a_limit_of_zero_and_a_gradient_of_zero_clip_nothing() -> None:
    nothing = {"parts": [(None, torch.zeros(TOTAL, DIM, dtype=torch.float64))], "small": torch.zeros(3, 2).double()}
    assert run("sgd", [DENSE[0] | {"limit": 0.0}])[1]["clips"] == [1.0]
    rows, rank = run("adagrad", [nothing | {"limit": 1.0}])
    assert rank["clips"] == [1.0] and torch.equal(rows, WEIGHT)


def test_a_step_forgets_its_gradients_and_a_tensor_without_one_stays() -> None:
    tensors = {"used": SMALL.clone().requires_grad_(), "unused": SMALL.clone().requires_grad_()}
    optimizer = Optimizer("adagrad", None, tensors, lr=0.1, relation_lr=0.1)
    tensors["used"].grad = torch.ones_like(SMALL)
    assert clip_factor([optimizer], 1.0, Ranks()) == pytest.approx(6**-0.5)
    optimizer.step(1.0)
    assert tensors["used"].grad is None and optimizer.steps == 1
    after = tensors["used"].detach().clone()
    assert not torch.equal(after, SMALL) and torch.equal(tensors["unused"], SMALL)
    optimizer.step(1.0)
    assert torch.equal(tensors["used"], after)
