"""What DualDE makes of pairs of scores on a GPU: `distkgd.kernels.dualde` without its autograd. Each row of pairs has
one program, whose sums have a fixed order. float32 and contiguous only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distkgd.kernels.triton.dualde_code import (
    dualde_pulls_code,
    dualde_shapes_code,
    dualde_terms_code,
    dualde_unshaped_code,
)
from distkgd.kernels.triton.runtime import OPTIONS, by_row, power_of_two


class How(NamedTuple):
    """positive: pairs of right answers. learning: 1, the student learns; 2, the teacher too. The rest as DualDE's
    config has it."""

    positive: bool
    learning: int
    soft_weight: float
    delta: float
    evaluation: bool
    stop_opposite: bool


def terms(how: How, alpha: Tensor, beta: Tensor, fields: Sequence[Tensor]) -> Tensor:
    """[3 learning + 1, ...] of fields [..., n]: see `dualde_code.dualde_terms_code`."""
    out = fields[0].new_empty(3 * how.learning + 1, *fields[0].shape[:-1])
    rows, options = _options(how, fields)
    if rows:
        dualde_terms_code[(rows,)](*_six(fields), alpha, beta, out, rows, **options)
    return out


def pulls(
    how: How, alpha: Tensor, beta: Tensor, fields: Sequence[Tensor], grad: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the fields, None of a teacher that does not learn, and [2, 4, rows]: what sums over rows to those of
    alpha and beta. grad: [2 learning, ...], of the first so many of `terms`."""
    out = [torch.empty_like(x) if how.learning == 2 or i % 2 == 0 else None for i, x in enumerate(fields)]
    rows, options = _options(how, fields)
    evaluators = alpha.new_empty(2, 4, rows)
    if rows:
        places = _six([x if made is None else made for x, made in zip(fields, out, strict=True)])
        given = *_six(fields), alpha, beta, grad.contiguous(), *places, evaluators, rows
        dualde_pulls_code[(rows,)](*given, STOPPED=how.stop_opposite, **options)
    return out, evaluators


def shapes(anchor: Tensor, answer: Tensor, sign: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """([n, dim], [n, 2], [4, n]) of rows [n, dim] and signs [n]: see `dualde_code.dualde_shapes_code`."""
    unit, asked, out = torch.empty_like(anchor), anchor.new_empty(len(anchor), 2), anchor.new_empty(4, len(anchor))
    if anchor.numel():
        sizes = *anchor.shape, least
        dualde_shapes_code[(len(anchor),)](anchor, answer, sign, unit, asked, out, *sizes, **by_row(anchor.shape[1]))
    return unit, asked, out


def unshaped(
    anchor: Tensor, answer: Tensor, sign: Tensor, found: Tensor, grads: Sequence[Tensor], least: float
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and answers, for those of unit, asked, cosines and ratios; found: the last of `shapes`."""
    out = torch.empty_like(anchor), torch.empty_like(answer)
    if anchor.numel():
        given = [x.contiguous() for x in grads]
        dualde_unshaped_code[(len(anchor),)](
            anchor, answer, sign, found, *given, *out, *anchor.shape, least, **by_row(anchor.shape[1])
        )
    return out


def _six(fields: Sequence[Tensor]) -> list[Tensor]:
    # Without structure, what stands in its place is never read or written.
    return [*fields, *([fields[0]] * (6 - len(fields)))]


def _options(how: How, fields: Sequence[Tensor]) -> tuple[int, dict[str, Any]]:
    num = fields[0].shape[-1]
    block = min(1024, power_of_two(num))
    return fields[0].shape[:-1].numel(), {
        "num": num, "delta": how.delta, "soft_weight": how.soft_weight,
        "POSITIVE": how.positive, "LEARNING": how.learning, "EVALUATED": how.evaluation, "SHAPED": len(fields) == 6,
        "BLOCK": block, "num_warps": 4 if block > 128 else 1, **OPTIONS,
    }  # fmt: skip
