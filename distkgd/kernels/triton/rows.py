"""Whole rows of a table on a GPU: sums of rows, and an optimiser's step. Nothing is added through atomics: each row has
one program, which adds up what there is for it in its order, so a sum is the same every time.

Tables and their state are float32 and contiguous, rows are int64.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distkgd.kernels.triton.row_code import (
    add_code,
    begins_code,
    directions_code,
    segments_code,
    undirected_code,
    update_code,
)
from distkgd.kernels.triton.runtime import by_row, pieces, power_of_two

_BLOCK = 1024
MOST = 1 << 23  # numbers whose segments are found: one program sees how many begin in each block
FEW = 1 << 12  # so many rows look for their like among all of them, n² comparisons; more are sorted first


def add(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [n, dim] to rows [n] of a table [m, dim], in place; a row may be named more than once."""
    num, width = values.shape
    if not values.numel():
        return
    many = num > FEW
    listed, order = torch.sort(rows, stable=True) if many else (rows, rows)
    options = by_row(width)
    add_code[(num, pieces(width, options["BK"]))](
        table, listed, values, order, num, width, SORTED=many, BE=128, **options
    )


class StepNumbers(NamedTuple):
    """What an optimiser is told of a step: learning rate, factor on gradients (a number, or one on the GPU, []), eps,
    betas of adam, and how many steps there were, this one included."""

    lr: float
    clip: float | Tensor
    eps: float
    betas: tuple[float, float]
    step: int


class Segments(NamedTuple):
    """Numbers [n] by their values.

    unique: [m] ascending, the last repeated. place: [n] where each is among them. order: [n] places sorted by value,
    equal ones in order. offsets: [m + 1] where in `order` those of each unique one begin; a repeated one has none.
    """

    unique: Tensor
    place: Tensor
    order: Tensor
    offsets: Tensor


def segments(ids: Tensor, most: int) -> Segments:
    """Of ids [n > 0], of which at most `most` <= n differ, into so many."""
    listed, order = torch.sort(ids, stable=True)
    # One more than there are: the last offset may be theirs.
    num, blocks = len(ids), pieces(len(ids) + 1, _BLOCK)
    begins = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    begins_code[(blocks,)](listed, begins, num, BLOCK=_BLOCK)
    found = Segments(ids.new_empty(most), torch.empty_like(ids), order, ids.new_empty(most + 1))
    segments_code[(blocks,)](
        listed, order, begins, found.unique, found.place, found.offsets, num, most, blocks,
        BLOCK=_BLOCK, BLOCKS=power_of_two(blocks),
    )  # fmt: skip
    return found


def directions(rows: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """([n, dim], [n]): rows over their norms, and the logarithms of these; norms are `least` at least."""
    unit, length = torch.empty_like(rows), rows.new_empty(len(rows))
    if rows.numel():
        directions_code[(len(rows),)](rows, unit, length, rows.shape[1], least, **by_row(rows.shape[1]))
    return unit, length


def undirected(unit: Tensor, length: Tensor, grad: Tensor, of_length: Tensor, least: float) -> Tensor:
    """[n, dim]: gradients of the rows of which `directions` made unit and length."""
    out = torch.empty_like(unit)
    if unit.numel():
        undirected_code[(len(unit),)](
            unit, length, grad.contiguous(), of_length.contiguous(), out, unit.shape[1], least, **by_row(unit.shape[1])
        )
    return out


def update(
    name: str,
    table: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    state: Mapping[str, Tensor],
    numbers: StepNumbers,
) -> None:
    """One step of optimiser `name` on rows [n] of a table, or all, in place.

    Of a row that is repeated, which it must be without others between, the first gradient counts.
    """
    if not grad.numel():
        return
    kinds = [*state.values(), table, table][:2]  # what has no state never reads what stands in its place
    width = table.shape[1]
    lr, clip, eps, betas, step = numbers
    in_memory = isinstance(clip, Tensor)
    gains, scales = [1.0 - beta for beta in betas], [1.0 / (1.0 - beta**step) for beta in betas]
    update_code[(len(grad),)](
        table, table if rows is None else rows, grad, *kinds, clip if in_memory else table, width,
        1.0 if in_memory else float(clip), lr, eps, *gains, betas[1], *scales,
        RULE=name, LISTED=rows is not None, CLIPPED=in_memory, **by_row(width, 1024),
    )  # fmt: skip
