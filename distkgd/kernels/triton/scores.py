"""What is made of a block of scores on a GPU: `distkgd.kernels.scores` without its autograd. Each row has one program,
whose sums have a fixed order. float32 and contiguous only."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distkgd.kernels.triton.runtime import OPTIONS, pieces, power_of_two
from distkgd.kernels.triton.score_code import pulls_code, sums_code

Kind = Literal["logsumexp", "gap", "softplus"]


def sums(kind: Kind, z: Tensor, other: Tensor | None = None) -> Tensor:
    """[1, 3 or 2, ...] of scores [..., n]: see `score_code.sums_code`."""
    num = z.shape[-1]
    rows, block = z.numel() // num, min(1024, power_of_two(num))
    out = z.new_empty({"logsumexp": 1, "gap": 3, "softplus": 2}[kind], *z.shape[:-1])
    if rows:
        sums_code[(rows,)](
            z, z if other is None else other, out, rows, num,
            KIND=kind, BLOCK=block, num_warps=4 if block > 128 else 1, **OPTIONS,
        )  # fmt: skip
    return out


def pulls(
    kind: Kind, z: Tensor, other: Tensor | None, found: Tensor, grads: Sequence[Tensor], needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and of the other, those that are needed, for [...] each of what `sums` found."""
    num = z.shape[-1]
    rows, block = z.numel() // num, min(1024, power_of_two(num))
    out, other_out = (torch.empty_like(z) if need else None for need in needed)
    given = [grad.contiguous() for grad in grads]
    given += [given[0]] * (3 - len(given))
    if rows:
        pulls_code[(rows, pieces(num, block))](
            z, z if other is None else other, found, *given, z if out is None else out,
            z if other_out is None else other_out, rows, num,
            KIND=kind, LEARNS=needed[0], TEACHES=needed[1], BLOCK=block, num_warps=4 if block > 128 else 1, **OPTIONS,
        )  # fmt: skip
    return out, other_out
