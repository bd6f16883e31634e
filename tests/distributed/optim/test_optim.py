"""Row optimisers against torch's dense ones and against arithmetic."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.config.stage import OptimizerConfig
from distkgd.distributed.optim.rows import ADAGRAD_EPS, ADAM_BETAS, ADAM_EPS, RowOptimizer, clip_factor
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable, plan_route
from tests.jobs import optimise_on_ranks
from tests.ranks import run_on_threads

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
    parts = run_on_threads(world, optimise_on_ranks, weight=WEIGHT, small=SMALL, steps=steps, options=options)
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


def test_a_step_forgets_its_gradients() -> None:
    table = ShardedTable(WEIGHT.clone(), TOTAL, Ranks())
    optimizer = RowOptimizer("adagrad", table, lr=0.1)
    push(table, draw(2, DIM), torch.tensor([1, 3]))
    assert clip_factor([optimizer], [], 0.1, Ranks()) < 1.0
    optimizer.step(1.0)
    assert table.opened == [] and optimizer.steps == 1
    after = table.weight.clone()
    assert not torch.equal(after, WEIGHT)
    optimizer.step(1.0)
    assert torch.equal(table.weight, after)


# -- rows in bfloat16, state on the host, large tables --------------------------------------------------------------


def half_table(rows: int = 64) -> ShardedTable:
    return ShardedTable(torch.ones(rows, DIM, dtype=torch.bfloat16), rows, Ranks(), torch.float32)


def push(table: ShardedTable, gradient: Tensor, ids: Tensor | None = None) -> None:
    """Leave `gradient` in the rows `ids`, or in all rows."""
    if ids is None:
        opened = table.open(plan_route(torch.zeros(0).long(), None, table.total, Ranks()), grad=True)
        opened.candidates().backward(gradient.to(table.weight.dtype))
    else:
        route = plan_route(ids, torch.zeros(0).long(), table.total, Ranks())
        table.open(route, grad=True).lookup([len(ids)])[0].backward(gradient)


def test_bfloat16_rows_move_by_less_than_their_spacing_on_average() -> None:
    """A step of 1/1000 of the spacing is lost by rounding to nearest; here the mean over many rows keeps it."""
    table = half_table(rows=20_000)
    optimizer = RowOptimizer("sgd", table, lr=1.0, seed=3)
    spacing = 2.0**-8  # of bfloat16 just below 1
    for _ in range(8):
        push(table, torch.full((table.total, DIM), spacing / 8))
        optimizer.step(1.0)
    moved = 1.0 - table.weight.float()
    assert moved.mean().item() == pytest.approx(spacing, rel=0.02)
    assert table.weight.dtype == torch.bfloat16 and moved.std() > 0


@EVERY_OPTIMISER
@pytest.mark.parametrize("ids", [None, torch.arange(0, 64, 2)], ids=["all rows", "some rows"])
def test_bfloat16_rows_are_the_full_update_rounded_up_or_down(name: str, ids: Tensor | None) -> None:
    table, full = half_table(), ShardedTable(torch.ones(64, DIM), 64, Ranks())
    gradient = draw(64 if ids is None else len(ids), DIM, seed=8).bfloat16().float()
    for one, options in ((table, {"seed": 1}), (full, {})):
        optimizer = RowOptimizer(name, one, lr=0.3, **options)
        push(one, gradient, ids)
        optimizer.step(1.0)
        assert all(value.dtype == torch.float32 for value in optimizer.state.values())
    down = (full.weight.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((full.weight.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    found = table.weight.float()
    assert ((found == down) | (found == up)).all()
    exact = down == full.weight
    assert torch.equal(found[exact], down[exact])
    if name != "sgd":
        assert (found == up).any() and (found == down).any()


def test_stochastic_rounding_depends_on_seed_step_row_and_column_alone() -> None:
    def rows(world: int, seed: int, steps: int = 2) -> Tensor:
        parts = run_on_threads(world, round_on_ranks, seed=seed, steps=steps)
        return torch.cat(parts)

    assert torch.equal(rows(1, 0), rows(2, 0)) and torch.equal(rows(1, 0), rows(3, 0))
    assert not torch.equal(rows(1, 0), rows(1, 1))


@EVERY_OPTIMISER
def test_state_on_the_host_trains_the_same_rows(name: str) -> None:
    options = OPTIONS | {"name": name}
    for steps in (DENSE, SPARSE):
        plain = run_on_threads(1, optimise_on_ranks, weight=WEIGHT, small=SMALL, steps=steps, options=options)[0]
        moved = run_on_threads(
            1, optimise_on_ranks, weight=WEIGHT, small=SMALL, steps=steps, options=options | {"more": {"offload": True}}
        )[0]
        assert torch.equal(plain["rows"], moved["rows"])


def test_offloaded_state_is_in_host_memory_whatever_the_device_of_the_rows() -> None:
    table = ShardedTable(torch.empty(8, DIM, device="meta"), 8, Ranks())
    assert RowOptimizer("adam", table, lr=0.1, offload=True).state["mean"].device.type == "cpu"
    assert RowOptimizer("adam", table, lr=0.1).state["mean"].device.type == "meta"


@EVERY_OPTIMISER
def test_updating_few_rows_at_a_time_changes_nothing(name: str) -> None:
    options = OPTIONS | {"name": name}
    for steps in (DENSE, SPARSE):
        whole = optimise_on_ranks(Ranks(), WEIGHT, SMALL, steps, options)
        with patch("distkgd.distributed.optim.rows.UPDATE_NUMBERS", 2 * DIM):
            pieces = optimise_on_ranks(Ranks(), WEIGHT, SMALL, steps, options)
        assert torch.equal(whole["rows"], pieces["rows"])


def round_on_ranks(ranks: Ranks, seed: int, steps: int) -> Tensor:
    lo, hi = ranks.share(30)
    table = ShardedTable(torch.ones(hi - lo, DIM, dtype=torch.bfloat16), 30, ranks, torch.float32)
    optimizer = RowOptimizer("sgd", table, lr=1.0, seed=seed)
    for _ in range(steps):
        route = plan_route(torch.zeros(0).long(), None, 30, ranks)
        table.open(route, grad=True).candidates().backward(torch.full((hi - lo, DIM), 2.0**-10).bfloat16())
        optimizer.step(1.0)
    return table.weight
