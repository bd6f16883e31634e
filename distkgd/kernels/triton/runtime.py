"""Triton where it is installed, and whether a device can run it.

Kernels are decorated when their module is imported. Where Triton is missing, the decorators below leave the
functions as they are, so that every module of the package can be imported; `available` then says no, and nobody
calls them.
"""

import functools
import importlib
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from distkgd.errors import UnsupportedError
from distkgd.kernels.build import wanted


class _Absent:
    """Stands where a Triton module would: decorators do nothing, names mean nothing."""

    def __getattr__(self, name: str) -> Any:
        return None

    @staticmethod
    def jit(function: Any = None, **_: Any) -> Any:
        return function or (lambda decorated: decorated)


def _triton(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Absent()


triton, tl = _triton("triton"), _triton("triton.language")

# A multiplication and an addition may become one instruction; said here because Triton is about to change its default.
OPTIONS = {"enable_fp_fusion": True}


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: a CUDA GPU of compute capability 8.0 or newer, with Triton."""
    if isinstance(triton, _Absent) or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def chosen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether scorers use the kernels on tensors of `device`: of float32, unless DISTKGD_KERNELS=off does without.

    Nor where Triton could not build what launches them.
    """
    return dtype == torch.float32 and wanted() and available(device) and builds()


@functools.cache
def builds() -> bool:
    """Whether there are a C compiler and Python's headers, which Triton needs at its first launch."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def refuse_second_order() -> None:
    """To be called first in backward: the gradients of a kernel would silently be constants."""
    if torch.is_grad_enabled():
        raise UnsupportedError("GPU kernels have no second derivative; use the plain formulas where one is needed.")


def sum_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What numbers of these tensors are summed in: float64 if any is, else float32."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def in_triton(dtype: torch.dtype) -> Any:
    """Triton's name of float32 or float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def by_row(width: int, most: int = 512) -> dict[str, Any]:
    """Options of a kernel whose program holds a row of `width` numbers, in blocks of at most `most`."""
    block = min(most, power_of_two(width))
    return {"BK": block, "num_warps": 4 if block > 128 else 1, **OPTIONS}


def pieces(number: int, size: int) -> int:
    """How many blocks of `size` cover `number`."""
    return -(-number // size)
