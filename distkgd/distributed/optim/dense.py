"""Training of replicated tensors: the relation tables and evaluators that every rank holds whole.

A method sees them as leaves that require a gradient and are changed in place. Backward leaves each rank its share of
the gradient of the global batch's mean; the shares add up. Two engines turn them into a step: `DenseOptimizer` here
(ddp: one all-reduce for all groups, then the same arithmetic on every rank), `DeepSpeedDense` in deepspeed_engine.py.

A tensor without a gradient has one of zeros, at any world size: with adam its moments decay and it may still move.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distkgd.distributed.optim.rows import new_state, update
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError


class Dense(ABC):
    """What trains the replicated tensors of one group ("student", "evaluators", …).

    tensors: the leaves a method works on; they hold the truth between two steps, whoever wrote them.
    steps: how many steps were taken.
    sums_ranks: whether `step` can sum the gradients over ranks itself (reduced=False).
    """

    sums_ranks: ClassVar[bool]

    def __init__(self, name: str, tensors: Mapping[str, Tensor], lr: float) -> None:
        self.name = name
        self.tensors = dict(tensors)
        self.lr = lr
        self.steps = 0

    def clear(self) -> None:
        """Forget gradients that were not applied."""
        for tensor in self.tensors.values():
            tensor.grad = None

    @abstractmethod
    def step(self, scale: float, clip: float | Tensor = 1.0, *, reduced: bool = True) -> None:
        """Apply and clear the gradients times `clip`, at the learning rate times `scale`.

        reduced: `begin_reducing` has already summed them over ranks. All ranks call this together.
        """

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensor name -> {"sum": …} or {"mean": …, "square": …}, whole and the same on all ranks, to be read only.

        All ranks call this together: an engine may have to gather.
        """

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Take over tensors, `state` of any engine at any world size, and the number of steps behind it.

        Raises CheckpointError when something is missing or has another size.
        """

    def close(self) -> None:  # noqa: B027 - not every engine holds anything
        """Give back what the engine holds; no step may follow."""


class DenseOptimizer(Dense):
    """Trains one group with our formulas, the same on every rank; see `Dense`.

    name: sgd, adagrad, rowwise_adagrad or adam.
    """

    sums_ranks: ClassVar[bool] = False

    def __init__(self, name: str, tensors: Mapping[str, Tensor], *, lr: float) -> None:
        super().__init__(name, tensors, lr)
        self._state = {key: new_state(name, as_rows(tensor)) for key, tensor in self.tensors.items()}

    def step(self, scale: float, clip: float | Tensor = 1.0, *, reduced: bool = True) -> None:
        """See `Dense.step`; the gradients must be summed over ranks."""
        if not reduced:
            raise AssertionError("DenseOptimizer does not sum over ranks: call begin_reducing first")
        self.steps += 1
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                if isinstance(clip, Tensor) or clip != 1.0:
                    grad.mul_(clip)
                rows, grad = as_rows(tensor), grad.reshape(len(tensor), -1)
                update(self.name, rows, grad, self._state[key], self.lr * scale, self.steps)
        self.clear()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See `Dense.state`."""
        return {
            key: {kind: value.view(state_shape(self.tensors[key], kind, self.name)) for kind, value in kinds.items()}
            for key, kinds in self._state.items()
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """See `Dense.load`."""
        load_tensors(self.tensors, tensors)
        for key, kinds in self._state.items():
            for kind, value in kinds.items():
                value.copy_(stored_state(state, key, kind, value).view_as(value))
        self.steps = steps


def begin_reducing(dense: Sequence[Dense], ranks: Ranks, more: Tensor) -> Callable[[], Tensor]:
    """Sum the gradients of all groups, and `more` [n], over ranks in one bucket, on its way while other work is done.

    The result waits for it, puts the gradients in place and returns the sum of `more`. A tensor without a gradient has
    one of zeros.
    """
    if ranks.world == 1:
        return lambda: more
    tensors = [tensor for one in dense for tensor in one.tensors.values()]
    flat = [(torch.zeros_like(t) if t.grad is None else t.grad).reshape(-1) for t in tensors]
    # In the precision of the gradients: one message is worth more than the last digits of a logged loss.
    bucket = torch.cat([*flat, more.to(flat[0].dtype if flat else more.dtype)])
    arrived = ranks.begin_all_reduce(bucket, "dense")

    def finish() -> Tensor:
        *sums, rest = arrived().split([*(t.numel() for t in tensors), len(more)])
        for tensor, grad in zip(tensors, sums, strict=True):
            tensor.grad = grad.view_as(tensor).clone()
        total: Tensor = rest.to(more.dtype)
        return total

    return finish


# -- shared by the engines ------------------------------------------------------------------------------------------


def as_rows(tensor: Tensor) -> Tensor:
    """[len, -1] view without gradient: what the formulas of distributed/optim/rows.py work on."""
    return tensor.detach().view(len(tensor), -1)


def state_shape(tensor: Tensor, kind: str, name: str) -> torch.Size:
    """Shape of one kind of optimiser state outside of an engine: one number per row, or that of the tensor."""
    return tensor.shape[:1] if (name, kind) == ("rowwise_adagrad", "sum") else tensor.shape


def load_tensors(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy stored values into the leaves of the same names; CheckpointError for a missing name or another shape."""
    for key, tensor in tensors.items():
        if key not in stored:
            raise CheckpointError(f"The checkpoint has no tensor {key!r}, only {_names(stored)}.")
        if stored[key].shape != tensor.shape:
            shapes = f"{list(stored[key].shape)} in the checkpoint and {list(tensor.shape)} here"
            raise CheckpointError(f"Tensor {key!r} is {shapes}; it is of another model.")
        with torch.no_grad():
            tensor.copy_(stored[key])


def stored_state(state: Mapping[str, Mapping[str, Tensor]], key: str, kind: str, like: Tensor) -> Tensor:
    """The stored optimiser state `kind` of tensor `key`; CheckpointError when it is missing or of another size."""
    kinds = state.get(key, {})
    if kind not in kinds:
        raise CheckpointError(
            f"The checkpoint has no optimiser state {kind!r} of tensor {key!r}, only {_names(kinds)}: "
            "it was written with another optimizer.name."
        )
    if kinds[kind].numel() != like.numel():
        raise CheckpointError(
            f"The optimiser state {kind!r} of tensor {key!r} has {kinds[kind].numel()} numbers, expected "
            f"{like.numel()}: it was written with another optimizer.name or another model."
        )
    return kinds[kind]


def _names(mapping: Mapping[str, object]) -> str:
    return ", ".join(sorted(mapping)) or "nothing"
