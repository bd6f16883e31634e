"""A pretend GPU, `gpu:0`: tensors that say they lie there, computed on the CPU with real numbers.

It stands on PyTorch's Python backend for PrivateUse1. Tensors of two devices in one operation are refused as CUDA
refuses them, and all that a GPU would be asked for is counted (`COUNTS`). A process has it for good once it is
installed, so tests leave it to processes of its own (`tests.ranks.run_on_ranks(..., device="gpu")`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.gpu.counts import COUNTS
from tests.gpu.shapes import INDEXED, compute, filled, hollow, mapped, place, tensors_in

Op = Any  # an overload of an operation of torch
TYPE = "gpu"
# What makes the host wait, for the number or the shape of the result is not known before.
WAITS = (
    {"_local_scalar_dense": "item", "is_nonzero": "bool"}
    | {
        name: name
        for name in ("nonzero", "_unique2", "_unique", "unique_dim", "unique_consecutive", "masked_select", "bincount")
    }
    | {name: name for name in ("equal", "_linalg_eigh", "_linalg_svd", "linalg_qr")}
)


class DeviceTensor(Tensor):
    """A tensor on the pretend GPU. inner: its numbers, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(TYPE, 0),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner})"

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor.__getitem__(self, _on_device(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _on_device(index), value)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def tolist(self) -> Any:
        COUNTS.waited("tolist")
        return filled(self.inner).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} tensor to numpy; use Tensor.cpu() first")

    def data_ptr(self) -> int:
        return place(self.inner)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"a tensor of {self.device} is pickled; use Tensor.cpu() first")


class DeviceMode(TorchDispatchMode):
    """Takes in what is made on the device, or copied to it; what lies there comes to `DeviceTensor` by itself."""

    def __torch_dispatch__(self, func: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@cache
def install() -> torch.device:
    """Give this process the device, for good, and enter its mode in this thread."""
    _setup_privateuseone_for_python_backend(TYPE)
    module = getattr(torch, TYPE)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16, torch.float32]
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        # torch's own copies to the device behind the back of every mode.
        there = device is not None and torch.device(device).type == TYPE
        return made(data, **options).to(device) if there else made(data, device=device, **options)

    torch.tensor = tensor
    DeviceMode().__enter__()
    return torch.device(TYPE, 0)


def fetched(tree: Any) -> Any:
    """A tree of tensors and other values with all tensors on the CPU, which is not counted."""
    return tree_map(lambda x: x.inner.detach().clone() if isinstance(x, DeviceTensor) else x, tree)


def run(func: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation of any tensors, on the device if one of them lies there or is to lie there."""
    given = list(tensors_in((args, kwargs)))
    there = [x.inner for x in given if isinstance(x, DeviceTensor)]
    device = kwargs.get("device")
    if not there and (device is None or torch.device(device).type != TYPE):
        return func(*args, **kwargs)
    name = func._schema.name.partition("::")[2]
    if name in SPECIAL:
        return SPECIAL[name](func, args, kwargs)
    refuse_mixing(name, args, [x for x in given if not isinstance(x, DeviceTensor)])
    _note_waits(name, func, args, kwargs)
    inner_args, inner_kwargs = mapped(_inner, args), mapped(_inner, kwargs)
    if device is not None:
        inner_kwargs["device"] = "cpu"
    out = compute(func, inner_args, inner_kwargs)
    if name == "_local_scalar_dense":
        return out
    if is_view(func):
        COUNTS.seen()
    else:
        COUNTS.launched(name, there, list(tensors_in(out)))
    return return_and_correct_aliasing(func, args, kwargs, mapped(DeviceTensor, out))


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


def refuse_mixing(name: str, args: Sequence[Any], on_host: Sequence[Tensor]) -> None:
    """RuntimeError where CUDA has one: for tensors of the host beside those of the device, but for single numbers and
    for indices, which are copied."""
    shapes = [tuple(x.shape) for x in on_host if x.dim() > 0]
    if not shapes:
        return
    if name in INDEXED and isinstance(args[0], DeviceTensor):
        COUNTS.waited("index from the host")
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device: {name} got {', '.join(map(str, shapes))} on cpu beside {TYPE}"
    )


def _note_waits(name: str, func: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if name in WAITS:
        COUNTS.waited(WAITS[name])
    elif name in INDEXED:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                COUNTS.waited("boolean index")
    elif name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
        COUNTS.waited("repeat_interleave")
    elif name == "isin" and isinstance(args[1], Tensor) and args[1].numel() >= 10 * max(1, args[0].numel()) ** 0.145:
        COUNTS.waited("isin sorts")
        COUNTS.waited("isin sorts")


@cache
def is_view(func: Op) -> bool:
    """Whether what an operation returns lies in the memory of what it was given."""
    aliases = [r.alias_info for r in func._schema.returns]
    unsafe = func._schema.name.startswith("aten::_unsafe")
    return not unsafe and any(alias is not None and not alias.is_write for alias in aliases)


# -- operations of two devices, and of what the CPU does lazily ------------------------------------------------------


def _to_copy(func: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    given = args[0]
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    device = kwargs.get("device")
    if not isinstance(given, DeviceTensor):
        COUNTS.copied += given.nbytes
        if not kwargs.get("non_blocking"):
            COUNTS.waited("host to device")
        return DeviceTensor(hollow(func(given, **options).clone()))
    if device is None or torch.device(device).type == TYPE:
        out = compute(func, [given.inner], options)
        COUNTS.launched("_to_copy", [given.inner], [out])
        return DeviceTensor(out)
    COUNTS.copied += given.nbytes
    COUNTS.waited("device to host")
    return func(filled(given.inner), **options)


def _copy(func: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    to, of = (x.inner if isinstance(x, DeviceTensor) else x for x in args[:2])
    compute(func, [to, of if isinstance(args[0], DeviceTensor) else filled(of)], {})
    if isinstance(args[0], DeviceTensor) and isinstance(args[1], DeviceTensor):
        COUNTS.launched("copy_", [of], [to])
    else:
        COUNTS.copied += of.nbytes
        if not any(args[2:]):  # non_blocking
            COUNTS.waited("device to host" if isinstance(args[1], DeviceTensor) else "host to device")
    return args[0]


def _conjugate(func: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return DeviceTensor(func(args[0].inner).resolve_conj())


def _negate(func: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return DeviceTensor(func(args[0].inner).resolve_neg())


SPECIAL: dict[str, Callable[[Op, Sequence[Any], Mapping[str, Any]], Any]] = {
    "_to_copy": _to_copy,
    "copy_": _copy,
    "_conj": _conjugate,
    "_neg_view": _negate,
    "_has_compatible_shallow_copy_type": lambda *_: True,
}


def _on_device(index: Any) -> Any:
    # A list as an index becomes a tensor, which torch would make without asking the mode.
    if isinstance(index, list):
        return torch.tensor(index, device=torch.device(TYPE, 0))
    return tuple(map(_on_device, index)) if isinstance(index, tuple) else index
