"""torch.distributed with NCCL's rules, for ranks on the pretend GPU: gloo carries the numbers.

Collectives take contiguous tensors of the device alone, their inputs and outputs of one dtype, and whole parts of equal
size where the operation has equal parts. Which were called, in their order, is kept: on all ranks it must be the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.gpu.counts import COUNTS
from tests.gpu.device import DeviceTensor

Call = tuple[Any, ...]  # operation, dtype, and what of the shapes all ranks must agree on


class Nccl:
    """In place of torch.distributed in `distkgd.distributed.ranks`. calls: since the list was last emptied."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.barrier, self.all_gather_object = dist.barrier, dist.all_gather_object

    def all_reduce(self, tensor: Tensor, async_op: bool) -> "_Work":
        """Summed in place."""
        (inner,) = self._checked("all_reduce", tuple(tensor.shape), tensor)
        if inner.is_meta:
            return _Work()
        return _Work(dist.all_reduce(inner, async_op=True))

    def all_gather_into_tensor(self, out: Tensor, rows: Tensor, async_op: bool) -> "_Work":
        """As many rows of each."""
        into, inner = self._checked("all_gather", tuple(rows.shape), out, rows)
        assert out.numel() == rows.numel() * dist.get_world_size(), "all_gather_into_tensor needs equal parts"
        if inner.is_meta:
            return _Work()
        return _Work(dist.all_gather(list(into.chunk(dist.get_world_size())), inner, async_op=True))

    def reduce_scatter_tensor(self, out: Tensor, rows: Tensor, async_op: bool) -> "_Work":
        """As many rows for each, summed."""
        into, inner = self._checked("reduce_scatter", tuple(out.shape), out, rows)
        assert rows.numel() == out.numel() * dist.get_world_size(), "reduce_scatter_tensor needs equal parts"
        if inner.is_meta:
            return _Work()
        whole = inner.clone()
        mine = whole.chunk(dist.get_world_size())[dist.get_rank()].view_as(into)
        return _Work(dist.all_reduce(whole, async_op=True), lambda: into.copy_(mine))

    def all_to_all_single(
        self, out: Tensor, rows: Tensor, receive: list[int], send: list[int], async_op: bool
    ) -> "_Work":
        """Runs of rows for each."""
        into, inner = self._checked("all_to_all", tuple(rows.shape[1:]), out, rows)
        assert sum(send) == len(rows) and sum(receive) == len(out), "all_to_all_single is told other sizes"
        if inner.is_meta:
            return _Work()
        return _Work(dist.all_to_all_single(into, inner, receive, send, async_op=True))

    def _checked(self, name: str, agreed: tuple[int, ...], *tensors: Tensor) -> Sequence[Tensor]:
        for tensor in tensors:
            assert isinstance(tensor, DeviceTensor), f"{name}: NCCL takes no tensor on {tensor.device}"
            assert tensor.is_contiguous(), f"{name}: a tensor of strides {tensor.stride()} is not contiguous"
            assert tensor.dtype == tensors[0].dtype, f"{name}: {tensor.dtype} beside {tensors[0].dtype}"
        self.calls.append((name, str(tensors[0].dtype), agreed))
        COUNTS.sent(name)
        return [tensor.inner for tensor in tensors]  # type: ignore[attr-defined]


class _Work:
    def __init__(self, work: Any = None, finish: Callable[[], Any] | None = None) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> None:
        """The stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        if self._finish is not None:
            self._finish()
        self._work = self._finish = None


NCCL = Nccl()
