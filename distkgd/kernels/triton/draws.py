"""Random whole numbers on a GPU: those of `distkgd.common.random`, in one launch."""

import torch
from torch import Tensor

from distkgd.kernels.triton.row_code import integers_code
from distkgd.kernels.triton.runtime import pieces

_BLOCK = 1024


def integers(
    key: int, factors: tuple[int, int, int], first: int, num: int, low: int, high: int, device: torch.device
) -> Tensor:
    """[num] int64 in [low, high): as `random.integers` of counters first … first + num - 1, plus low.

    key, factors: signed 64-bit numbers.
    """
    out = torch.empty(num, dtype=torch.int64, device=device)
    if num:
        integers_code[(pieces(num, _BLOCK),)](out, num, key, first, low, high - low, *factors, BLOCK=_BLOCK)
    return out
