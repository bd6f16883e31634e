"""Compiled work on whole rows against torch."""

import pytest
import torch

from distkgd.distributed.optim import rows as optim
from distkgd.kernels import rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    if not rows.available(torch.zeros(1)):
        pytest.skip("no C++ compiler here")


@DTYPES
@pytest.mark.parametrize(("num", "dim"), [(50, 33), (1, 1), (0, 8), (7, 512)])
def test_rows_are_taken_and_added_to(num: int, dim: int, dtype: torch.dtype) -> None:
    table, index = torch.randn(11, dim, dtype=dtype), torch.randint(0, 11, (num,))
    assert torch.equal(rows.take(table, index), table[index])
    values, expected = torch.randn(num, dim, dtype=dtype), table.clone()
    for i, row in enumerate(index.tolist()):
        expected[row] += values[i]
    rows.add(table, index, values)
    torch.testing.assert_close(table, expected)


def test_what_a_kernel_cannot_take_goes_through_torch() -> None:
    table, index = torch.randn(11, 8), torch.randint(0, 11, (5,))
    for other in (table.T, table.bfloat16(), table.to(torch.complex64)):
        assert not rows.available(other)
        assert torch.equal(rows.take(other, index % len(other)), other[index % len(other)])
    wide = torch.randint(0, 11, (5, 2))[:, 0]
    assert torch.equal(rows.take(table, wide), table[wide])


@DTYPES
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_an_update_is_that_of_the_formula_and_no_other_row_moves(
    name: str, everything: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 37, generator=generator, dtype=dtype)
    state = optim.new_state(name, table)
    other, other_state = table.clone(), {kind: value.clone() for kind, value in state.items()}
    for step in (1, 2, 3):
        touched = None if everything else torch.randperm(40, generator=generator)[:13]
        which = torch.arange(40) if touched is None else touched
        grad = torch.randn(len(which), 37, generator=generator, dtype=dtype)
        eps = optim.ADAM_EPS if name == "adam" else optim.ADAGRAD_EPS
        rows.update(name, table, touched, grad, state, rows.StepNumbers(0.1, 0.5, eps, optim.ADAM_BETAS, step))
        new, kinds = other[which], {kind: value[which] for kind, value in other_state.items()}
        optim.update(name, new, 0.5 * grad, kinds, 0.1, step)
        other[which] = new
        for kind, value in kinds.items():
            other_state[kind][which] = value
        torch.testing.assert_close(table, other)
        for kind, value in state.items():
            torch.testing.assert_close(value, other_state[kind])
