"""Our Triton kernels on the pretend GPU: each launch is counted as one.

Where shapes alone are asked for (`shapes_only`) they compute nothing but whole numbers (`IDS`); else, under Triton's
interpreter, what they would on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from distkgd.common import random
from distkgd.kernels.triton import distances, draws, dualde, rows, runtime, scores
from tests.gpu.counts import COUNTS
from tests.gpu.device import TYPE, DeviceTensor


@contextmanager
def kernels_there(*, values: bool = False) -> Iterator[None]:
    """They can be launched on the pretend GPU, so that what chooses between them and torch takes them as on another.

    values: they compute, in a process with TRITON_INTERPRET=1.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", {"DISTKGD_KERNELS": ""}))
        stack.enter_context(patch.object(runtime, "available", lambda device: device.type == TYPE))
        for module in (distances, draws, dualde, rows, scores):
            for name, code in vars(module).items():
                if name.endswith("_code"):
                    stack.enter_context(patch.object(module, name, _Kernel(name, code if values else None)))
        yield


class _Kernel:
    def __init__(self, name: str, code: Any) -> None:
        self._name, self._code = name, code

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **options: self._launched(grid, given, options)

    def _launched(self, grid: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors = [x for x in given if hasattr(x, "untyped_storage")]
        assert all(isinstance(x, DeviceTensor) for x in tensors), f"{self._name} is given memory of the host"
        COUNTS.ours(self._name, [x.inner for x in tensors])
        inner = [x.inner if isinstance(x, DeviceTensor) else x for x in given]
        if self._code is not None:
            self._code[grid](*inner, **options)
        elif self._name in IDS:
            IDS[self._name](*inner, **options)


def _drawn(out: Tensor, num: int, key: int, first: int, low: int, size: int, *_: int, **__: int) -> None:
    mixed = random._mix(torch.arange(first, first + num) * random.FACTORS[0] + key)
    out.copy_(low + random._shift(mixed, 1) % size)


def _segmented(listed: Tensor, order: Tensor, _: Tensor, *rest: Any, **__: int) -> None:
    unique, place, offsets, num, _most = rest[:5]
    distinct, among, counts = torch.unique_consecutive(listed, return_inverse=True, return_counts=True)
    place[order] = among
    unique[: len(distinct)], unique[len(distinct) :] = distinct, distinct[-1]
    offsets[: len(distinct)], offsets[len(distinct) :] = counts.cumsum(0) - counts, num


IDS: dict[str, Callable[..., None]] = {"integers_code": _drawn, "segments_code": _segmented}
