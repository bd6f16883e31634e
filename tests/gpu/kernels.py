"""Our Triton kernels on the pretend GPU: each launch is counted as one, and computes nothing.

That is enough where shapes alone are asked for (`shapes_only`); values are those of `tests/kernels/triton/`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from distkgd.kernels.triton import distances, losses, runtime
from tests.gpu.counts import COUNTS
from tests.gpu.device import TYPE, DeviceTensor


@contextmanager
def kernels_there() -> Iterator[None]:
    """They can be launched on the pretend GPU, so that what chooses between them and torch takes them as on another."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", {"DISTKGD_KERNELS": ""}))
        stack.enter_context(patch.object(runtime, "available", lambda device: device.type == TYPE))
        for module in (distances, losses):
            for name in vars(module):
                if name.endswith("_code"):
                    stack.enter_context(patch.object(module, name, _Kernel(name)))
        yield


class _Kernel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: Any) -> "_Kernel":
        return self

    def __call__(self, *given: Any, **_: Any) -> None:
        tensors = [x for x in given if hasattr(x, "untyped_storage")]
        assert all(isinstance(x, DeviceTensor) for x in tensors), f"{self._name} is given memory of the host"
        COUNTS.ours(self._name, [x.inner for x in tensors])
