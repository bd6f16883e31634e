"""Optimisers of one model: entity rows that a step touched, and the replicated tensors (relations, evaluators).

State lives beside the rows it belongs to and is sharded with them. Per entity row of d numbers the state costs: sgd 0,
rowwise_adagrad 1, adagrad d, adam 2d numbers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable

ADAGRAD_EPS = 1e-10
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def new_state(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Fresh optimiser state for `weight` [n, ...]: one tensor per kind of state, first dimension n."""
    match name:
        case "sgd":
            return {}
        case "adagrad":
            return {"sum": torch.zeros_like(weight)}
        case "rowwise_adagrad":
            return {"sum": weight.new_zeros(len(weight))}
        case "adam":
            return {"mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
    raise AssertionError(name)


def update(name: str, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], lr: float, step: int) -> None:
    """One step of optimiser `name` on weight [n, ...] and its state, in place. step counts from 1."""
    match name:
        case "sgd":
            weight.add_(grad, alpha=-lr)
        case "adagrad":
            state["sum"].addcmul_(grad, grad)
            weight.addcdiv_(grad, state["sum"].sqrt().add_(ADAGRAD_EPS), value=-lr)
        case "rowwise_adagrad":
            state["sum"].add_(grad.square().flatten(1).mean(1))
            scale = state["sum"].sqrt().add_(ADAGRAD_EPS).reciprocal_()
            weight.add_(grad * scale.reshape(-1, *([1] * (grad.dim() - 1))), alpha=-lr)
        case "adam":
            first, second = ADAM_BETAS
            state["mean"].lerp_(grad, 1 - first)
            state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
            spread = (state["square"] / (1 - second**step)).sqrt_().add_(ADAM_EPS)
            weight.addcdiv_(state["mean"], spread, value=-lr / (1 - first**step))


class Optimizer:
    """Trains one entity table (or none) and some replicated tensors, from the gradients that backward left in them."""

    def __init__(
        self, name: str, table: ShardedTable | None, tensors: Mapping[str, Tensor], *, lr: float, relation_lr: float
    ) -> None:
        self.name = name
        self.table = table
        self.tensors = dict(tensors)
        self.lr = lr
        self.relation_lr = relation_lr
        self.steps = 0
        self.row_state = new_state(name, table.weight) if table else {}
        self.tensor_state = {k: new_state(name, v.detach().reshape(len(v), -1)) for k, v in self.tensors.items()}

    def step(self, scale: float, clip: float = 1.0) -> None:
        """Apply what backward left behind; learning rates are multiplied by `scale`, gradients by `clip`."""
        self.steps += 1
        with torch.no_grad():
            if self.table is not None:
                for touched, grad in self._row_gradients():
                    self._update_rows(touched, grad.mul_(clip) if clip != 1.0 else grad, self.lr * scale)
            for key, tensor in self.tensors.items():
                if tensor.grad is not None:
                    flat, grad = tensor.detach().view(len(tensor), -1), tensor.grad.view(len(tensor), -1)
                    rate = self.relation_lr * scale
                    update(self.name, flat, grad.mul_(clip), self.tensor_state[key], rate, self.steps)
        self.clear()

    def clear(self) -> None:
        """Forget gradients that were not applied."""
        if self.table is not None:
            self.table.opened = []
        for tensor in self.tensors.values():
            tensor.grad = None

    def square_norm(self) -> Tensor:
        """[] sum of squares of this rank's row gradients (each row is owned once)."""
        total = torch.zeros((), dtype=torch.float64)
        for _, grad in self._row_gradients():
            total += grad.double().square().sum().cpu()
        return total

    def _row_gradients(self) -> list[tuple[Tensor | None, Tensor]]:
        opened = self.table.opened if self.table is not None else []
        found = [(o.route.touched, o.leaf.grad) for o in opened]
        pairs = [(touched, grad) for touched, grad in found if grad is not None]
        if len(pairs) < 2:
            return pairs
        # Parts of one batch: one update per row, after the last part.
        assert self.table is not None
        if any(touched is None for touched, _ in pairs):
            return [(None, sum((grad for _, grad in pairs[1:]), pairs[0][1]))]
        rows, position = torch.unique(torch.cat([t for t, _ in pairs if t is not None]), return_inverse=True)
        total = pairs[0][1].new_zeros(len(rows), self.table.dim)
        return [(rows, total.index_add_(0, position, torch.cat([grad for _, grad in pairs])))]

    def _update_rows(self, touched: Tensor | None, grad: Tensor, lr: float) -> None:
        assert self.table is not None
        if touched is None:
            update(self.name, self.table.weight, grad, self.row_state, lr, self.steps)
            return
        weight = self.table.weight.index_select(0, touched)
        state = {key: value.index_select(0, touched) for key, value in self.row_state.items()}
        update(self.name, weight, grad, state, lr, self.steps)
        self.table.weight.index_copy_(0, touched, weight)
        for key, value in self.row_state.items():
            value.index_copy_(0, touched, state[key])


def reduce_gradients(optimizers: Sequence[Optimizer], ranks: Ranks) -> None:
    """Sum the gradients of all replicated tensors over ranks, in one bucket."""
    tensors = [t for o in optimizers for t in o.tensors.values()]
    if ranks.world == 1 or not tensors:
        return
    for tensor in tensors:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    bucket = torch.cat([t.grad.reshape(-1) for t in tensors if t.grad is not None])
    ranks.all_reduce(bucket)
    for tensor, grad in zip(tensors, bucket.split([t.numel() for t in tensors]), strict=True):
        tensor.grad = grad.view_as(tensor).clone()


def clip_factor(optimizers: Sequence[Optimizer], limit: float, ranks: Ranks) -> float:
    """The factor that brings the global gradient norm (rows and replicated tensors) down to `limit`; 0: no limit."""
    if not limit:
        return 1.0
    total = torch.stack([o.square_norm() for o in optimizers]).sum().reshape(1).to(ranks.device)
    ranks.all_reduce(total)
    small = sum(
        float(t.grad.double().square().sum()) for o in optimizers for t in o.tensors.values() if t.grad is not None
    )
    norm = (float(total) + small) ** 0.5
    return min(1.0, limit / norm) if norm > 0 else 1.0
