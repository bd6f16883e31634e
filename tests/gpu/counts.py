"""What a GPU would have been asked to do: kernel launches, host synchronisations, bytes and FLOPs, with file and line.

Nothing is measured: an operation of torch counts the kernels that its CUDA code launches (`LAUNCHES`), one of ours one.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import distkgd

PACKAGE = f"{Path(distkgd.__file__).parent}/"
SMALL_SORT = 4096  # so many numbers are sorted by one block of threads

# Kernels that torch's CUDA code launches per operation, where that is not one; views never come here.
LAUNCHES = {
    **dict.fromkeys(
        ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view"), 0
    ),
    **dict.fromkeys(("_local_scalar_dense", "lift_fresh"), 0),  # a copy and no kernel
    **dict.fromkeys(("cumsum", "logcumsumexp", "equal"), 2),
    **dict.fromkeys(("topk", "index_put_", "_index_put_impl_"), 3),
    **dict.fromkeys(("nonzero", "bincount", "median", "index_put"), 4),
    **dict.fromkeys(("masked_select", "repeat_interleave"), 5),
    **dict.fromkeys(("unique_dim", "isin"), 25),
    "sort": 10,
    "_unique2": 18,
    "unique_consecutive": 12,
    "logsumexp": 7,
    "embedding_dense_backward": 6,
    "cosine_similarity": 8,
}
SMALL = {"sort": 3, "_unique2": 10}
_READS_BY_INDEX = ("index_select", "index", "embedding", "gather")
_WRITES_BY_INDEX = ("index_copy_", "index_add_", "index_put_", "_index_put_impl_", "index_add", "scatter_")
_FILLS = ("new_zeros", "zeros", "zeros_like", "full", "full_like", "ones_like", "fill_", "zero_")
_PRODUCTS = ("mm", "addmm", "bmm", "addmm_", "baddbmm")


@dataclass(frozen=True)
class Site:
    """A place in the package, and whether what it asked for came of its backward."""

    file: str
    function: str
    line: int
    backward: bool = False

    @property
    def name(self) -> str:
        """Of the function: what stays as lines move."""
        return f"{self.file} {self.function}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}{' (backward)' if self.backward else ''}"


ELSEWHERE = Site("torch", "autograd", 0)


@dataclass
class Counts:
    """Of what has run since `reset`. copied: bytes between host and device, either way."""

    launches: Counter[tuple[Site, str]] = field(default_factory=Counter)
    syncs: Counter[tuple[Site, str]] = field(default_factory=Counter)
    collectives: Counter[tuple[Site, str]] = field(default_factory=Counter)
    bytes: int = 0
    flops: int = 0
    copied: int = 0
    _forward: dict[int, Site] = field(default_factory=dict)  # autograd's number of a node -> who made it

    def reset(self) -> None:
        """Count from nothing."""
        self.__init__()  # type: ignore[misc]

    def waited(self, why: str) -> None:
        """The host waits until the device has done all that it was asked for."""
        self.syncs[self.seen(), why] += 1

    def sent(self, name: str) -> None:
        """A collective of all ranks."""
        self.collectives[self.seen(), name] += 1

    def launched(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """An operation of torch has run."""
        site = self.seen()
        if number := kernels(name, inputs, outputs):
            self.launches[site, name] += number
            self.bytes += moved(name, inputs, outputs)
            self.flops += multiplied(name, inputs)

    def ours(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A kernel of our own has run, which reads or writes each of these once."""
        self.launches[self.seen(), name] += 1
        self.bytes += sum(map(size, tensors))

    def seen(self) -> Site:
        """Where the package asked for the operation that runs now; to be called of every one, views too.

        Of a node of autograd that is torch's, it is who made the node in forward: a node has its number before its
        operation runs, and whatever runs first with that number is the operation.
        """
        here = _frame()
        node = torch._C._current_autograd_node()
        if node is None:
            self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, here)
            return here
        if here is not ELSEWHERE:
            return Site(here.file, here.function, here.line, backward=True)
        made = self._forward.get(node._sequence_nr(), ELSEWHERE)
        return Site(made.file, made.function, made.line, backward=True)


COUNTS = Counts()


def _frame() -> Site:
    # The innermost frame of the package.
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            name = code.co_qualname.replace(".<locals>", "")
            return Site(code.co_filename.removeprefix(PACKAGE), name, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ELSEWHERE


def kernels(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """How many kernels an operation launches; none where it makes nothing."""
    if name in SMALL and inputs and inputs[0].numel() <= SMALL_SORT:
        return SMALL[name]
    if not any(o.numel() for o in outputs) and name not in ("_unique2", "nonzero"):
        return 0
    return LAUNCHES.get(name, 1)


def moved(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes that an operation reads and writes in the device's memory."""
    made = sum(map(size, outputs))
    if name in _READS_BY_INDEX:
        return 2 * made + sum(size(i) for i in inputs[1:] if i.dtype == torch.int64)
    if name in _WRITES_BY_INDEX:
        return 2 * max([size(i) for i in inputs[1:]], default=0)
    if name in _FILLS:
        return made
    return 10 * made if name == "sort" else sum(map(size, inputs)) + made


def multiplied(name: str, inputs: Sequence[Tensor]) -> int:
    """FLOPs of a product of matrices; 0 of anything else."""
    matrices = [x for x in inputs if x.dim() >= 2][-2:]
    if name not in _PRODUCTS or len(matrices) < 2:
        return 0
    return 2 * matrices[0].numel() * matrices[1].shape[-1]


def size(tensor: Tensor) -> int:
    """In bytes."""
    return tensor.numel() * tensor.element_size()
