"""Operations on numbers that are not there: where only counts are asked for, reals have shapes alone.

Whole numbers are computed, for what a step looks up follows from them; a real that is read is 1, a comparison of reals
false. A step of any size is then counted in no time, and as it is: what it launches does not depend on reals, but for
sides that are drawn by Bernoulli's statistics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
# What makes as many numbers as the values of its tensors say.
_BY_VALUE = ("nonzero", "_unique2", "masked_select", "unique_consecutive", "bincount")
FEW = 16  # reals that are as few have numbers: 1 each, where they are made of some that have none
_only = False


@contextmanager
def shapes_only() -> Iterator[None]:
    """Reals that the device makes inside have no numbers."""
    global _only  # noqa: PLW0603
    _only = True
    try:
        yield
    finally:
        _only = False


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs) of the device's own tensors; reals, and what is made of them, on torch's meta device."""
    if not _only:
        return func(*args, **kwargs)
    found = [x for x in tensors_in((args, kwargs)) if x.is_meta]
    if not found:
        return mapped(hollow, func(*args, **kwargs))
    name = func._schema.name.partition("::")[2]
    if name == "_local_scalar_dense":
        return filled(args[0]).item()
    if name in _BY_VALUE:
        return mapped(hollow, func(*mapped(filled, args), **kwargs))
    if name in INDEXED:
        args = [args[0], _indices(args[1]), *args[2:]]
    out = func(*mapped(_meta, args), **mapped(_meta, kwargs))
    fresh = all(r.alias_info is None for r in func._schema.returns)
    return mapped(_settled, out) if fresh else out


def hollow(value: Tensor) -> Tensor:
    """A tensor of reals without its numbers; anything else as it is."""
    return _meta(value) if _only and value.is_floating_point() and value.numel() > FEW else value


def filled(value: Tensor) -> Tensor:
    """A tensor on the CPU: of 1 or false where it had no numbers."""
    if not value.is_meta:
        return value
    return torch.full(value.shape, value.is_floating_point(), dtype=value.dtype)


def _settled(value: Tensor) -> Tensor:
    # A loss, a scale: one that is compared with itself is to be the same.
    return filled(value) if value.is_floating_point() and value.numel() <= FEW else value


def place(tensor: Tensor) -> int:
    """Where its first number lies, or would."""
    if not tensor.is_meta:
        return tensor.data_ptr()
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _meta(value: Tensor) -> Tensor:
    if value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _indices(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    # Meta tensors have no boolean index.
    out: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            out += filled(index).nonzero().unbind(1)
        else:
            out.append(index)
    return out


def mapped(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Arguments or results of an operation with every tensor changed; torch's own function takes ten times as long."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(change, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([mapped(change, value) for value in tree])
    return tree


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of arguments or results of an operation."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | tuple | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(value)
