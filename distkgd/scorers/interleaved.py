"""Pairs of numbers stored side by side, (a, b, a, b): complex numbers, halves of a row."""

import torch
from torch import Tensor


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., 2k]` interleaved (a, b, a, b) to two `[..., k]`: the a's and the b's."""
    first, second = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
    return first, second


def complex_product(x: Tensor, y: Tensor) -> Tensor:
    """`[..., 2k]` x·y of complex numbers `[..., 2k]`, stored (re, im, re, im, …); leading dimensions broadcast."""
    if x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64):
        return torch.view_as_real(as_complex(x) * as_complex(y)).flatten(-2)
    (x_re, x_im), (y_re, y_im) = split_pairs(x), split_pairs(y)
    return join_pairs(x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re)


def conjugate(x: Tensor) -> Tensor:
    """`[..., 2k]` of complex numbers, stored (re, im, re, im, …)."""
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_exporting():  # ONNX has none
        return torch.view_as_real(as_complex(x).conj_physical()).flatten(-2)
    re, im = split_pairs(x)
    return join_pairs(re, -im)


def as_complex(x: Tensor) -> Tensor:
    """`[..., k]` complex of `[..., 2k]` float32 or float64 stored (re, im, re, im, …); where it can be, a view."""
    pairs = x.unflatten(-1, (x.shape[-1] // 2, 2))
    odd = x.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]) or pairs.stride(-1) != 1
    # clone, not contiguous: that one leaves an odd offset as it is where the rows follow each other anyway.
    return torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format) if odd else pairs)


def join_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Two `[..., k]` to `[..., 2k]` interleaved (a, b, a, b); the inverse of `split_pairs`."""
    return torch.stack((a, b), dim=-1).flatten(-2)
