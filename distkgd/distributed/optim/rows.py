"""The optimiser of entity rows, and its formulas; those of replicated tensors are in dense.py.

State lives beside the rows it belongs to and is sharded with them. Bytes per entity row of d numbers in float32:

    rows: float32 4d, bfloat16 2d; state: sgd 0, rowwise_adagrad 4, adagrad 4d, adam 8d (always in full precision)
    gradient: of rows that a step touched only; with 1-vs-all of every row, as wide as the row
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.distributed.optim.kept import KeptRows
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable, distinct
from distkgd.kernels import rows as kernels

ADAGRAD_EPS = 1e-10
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
# Numbers updated at a time, which bounds the formulas' temporaries: on a CPU to its cache.
UPDATE_NUMBERS = 1 << 21
DEVICE_UPDATE_NUMBERS = 1 << 25


def new_state(name: str, weight: Tensor, num: int | None = None) -> dict[str, Tensor]:
    """Fresh state for `num` (default n) rows like those of `weight` [n, ...], one tensor per kind of state."""
    rows = (len(weight) if num is None else num, *weight.shape[1:])
    match name:
        case "sgd":
            return {}
        case "adagrad":
            return {"sum": weight.new_zeros(rows)}
        case "rowwise_adagrad":
            return {"sum": weight.new_zeros(rows[0])}
        case "adam":
            return {"mean": weight.new_zeros(rows), "square": weight.new_zeros(rows)}
    raise AssertionError(name)


def update(name: str, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], lr: float, step: int) -> None:
    """One step of optimiser `name` on weight [n, ...] and its state, in place. step counts from 1."""
    if weight.device.type != "cpu" and weight.dim() == 2 and kernels.available(weight, grad, *state.values()):
        kernels.update(name, weight, None, grad, state, _numbers(name, lr, 1.0, step))
        return
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


def _numbers(name: str, lr: float, clip: float | Tensor, step: int) -> kernels.StepNumbers:
    return kernels.StepNumbers(lr, clip, ADAM_EPS if name == "adam" else ADAGRAD_EPS, ADAM_BETAS, step)


def state_numbers(name: str, dim: int) -> int:
    """Numbers of optimiser state per row of `dim` numbers."""
    return {"sgd": 0, "rowwise_adagrad": 1, "adagrad": dim, "adam": 2 * dim}[name]


class RowOptimizer:
    """Trains the rows of one entity table that steps touched, from the gradients that backward left in them.

    offload: the state stays in host memory and visits the device row by row with the rows that are updated.
    seed: of the stochastic rounding of rows that are stored in bfloat16; it depends on (seed, step, row, column) alone.
    kept: rows of this shard that stay where they began, or are pulled back there.
    """

    def __init__(self, name: str, table: ShardedTable, *, lr: float, offload: bool = False, seed: int = 0) -> None:
        self.name = name
        self.table = table
        self.lr = lr
        self.seed = seed
        self.steps = 0
        self.kept: KeptRows | None = None
        where = "cpu" if offload else table.weight.device
        self.state = new_state(name, torch.empty(0, table.dim, dtype=table.dtype, device=where), len(table.weight))

    def step(self, scale: float, clip: float | Tensor = 1.0) -> None:
        """Apply what backward left behind; the learning rate is multiplied by `scale`, gradients by `clip` ([])."""
        self.steps += 1
        with torch.no_grad():
            for touched, grad in self.gradients():
                self._update(touched, grad, self.lr * scale, clip)
        self.clear()

    def clear(self) -> None:
        """Forget gradients that were not applied."""
        self.table.opened.clear()

    def square_norm(self) -> Tensor:
        """[] float64: sum of squares of this rank's row gradients (each row is owned once)."""
        total = torch.zeros((), dtype=torch.float64, device=self.table.weight.device)
        for _, grad in self.gradients():
            for block in grad.split(self._rows_at_once()):
                total += block.double().square().sum()
        return total

    def gradients(self) -> list[tuple[Tensor | None, Tensor]]:
        """At most one pair: ([m] local rows, or None for all; their gradient [m, dim]), over all parts of the batch.

        Of a row that is repeated (`distinct`) the first has the gradient, the others have 0.
        """
        found = self._summed()
        if self.kept is None:
            return found
        return [(rows, self.kept.pulled(rows, self.table.weight, grad)) for rows, grad in found]

    def _summed(self) -> list[tuple[Tensor | None, Tensor]]:
        found = [gradient for opened in self.table.opened if (gradient := opened.gradient()) is not None]
        if len(found) < 2:
            return found
        # Parts of one batch: one update per row, after the last part.
        whole = [grad for touched, grad in found if touched is None]
        if whole:
            total = whole[0]
            for grad in whole[1:]:
                total.add_(grad)
            for touched, grad in found:
                if touched is not None:
                    total.index_add_(0, touched, grad.to(total.dtype))
            self._forget_all_but(total)
            return [(None, total)]
        rows, position = distinct(torch.cat([t for t, _ in found if t is not None]), len(self.table.weight))
        total = found[0][1].new_zeros(len(rows), self.table.dim)
        total.index_add_(0, position, torch.cat([grad for _, grad in found]))
        return [(rows, total)]

    def _forget_all_but(self, total: Tensor) -> None:
        # The sum stands in the first part's tensor: what went into it must not be added again.
        for opened in self.table.opened:
            opened.leaf.grad = None
            if opened.shard is not None and opened.shard.grad is not total:
                opened.shard.grad = None

    def _rows_at_once(self) -> int:
        numbers = UPDATE_NUMBERS if self.table.weight.device.type == "cpu" else DEVICE_UPDATE_NUMBERS
        return max(1, numbers // max(1, self.table.dim))

    def _update(self, touched: Tensor | None, grad: Tensor, lr: float, clip: float | Tensor) -> None:
        weight, dtype = self.table.weight, self.table.dtype
        if kernels.available(weight, grad, *self.state.values()):
            numbers = _numbers(self.name, lr, clip, self.steps)
            kernels.update(self.name, weight, touched, grad, self.state, numbers)
            return
        if isinstance(clip, Tensor) or clip != 1.0:
            grad.mul_(clip)
        at_once = self._rows_at_once()
        if touched is not None and touched.device.type != "cpu":
            # A repeated row is updated as often as it stands there, at once: with one gradient, to one value.
            grad, at_once = grad.index_select(0, torch.searchsorted(touched, touched)), max(1, len(grad))
        for lo in range(0, len(grad), at_once):
            hi = min(lo + at_once, len(grad))
            rows = slice(lo, hi) if touched is None else touched[lo:hi]
            new = _take(weight, rows).to(dtype)
            state = {key: _take(value, _on(rows, value)).to(weight.device) for key, value in self.state.items()}
            update(self.name, new, grad[lo:hi].to(dtype), state, lr, self.steps)
            for key, value in self.state.items():
                _put(value, _on(rows, value), state[key])
            if weight.dtype != dtype:
                new = self._rounded(new, rows)
            _put(weight, rows, new)

    def _rounded(self, rows: Tensor, where: slice | Tensor) -> Tensor:
        # To bfloat16, up or down with the chances that keep the mean: small steps are not lost.
        local = torch.arange(where.start, where.stop, device=rows.device) if isinstance(where, slice) else where
        column = torch.arange(self.table.dim, device=rows.device)
        index = (local + self.table.lo).unsqueeze(1) * self.table.dim + column
        noise = (random.bits(self.seed, Stream.ROUNDING, self.steps, index) & 0xFFFF).int()
        cut = (rows.float().contiguous().view(torch.int32) + noise) & -0x10000
        return cut.view(torch.float32).to(self.table.weight.dtype)


def _take(table: Tensor, rows: slice | Tensor) -> Tensor:
    # A view of a slice; index_select is faster than indexing on a CPU.
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)


def _on(rows: slice | Tensor, value: Tensor) -> slice | Tensor:
    return rows if isinstance(rows, slice) else rows.to(value.device)


def _put(table: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        if table[rows].data_ptr() != values.data_ptr():
            table[rows] = values.to(table.device)
    else:
        table.index_copy_(0, rows, values.to(table.device, table.dtype))


def clip_factor(rows: Sequence[RowOptimizer], tensors: Sequence[Tensor], limit: float, ranks: Ranks) -> float | Tensor:
    """The factor that brings the global gradient norm down to `limit`; 0: no limit. On an accelerator a [] tensor.

    tensors: replicated, their gradients summed over ranks.
    """
    if not limit:
        return 1.0
    total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    total = torch.stack([o.square_norm() for o in rows]).sum().reshape(1) if rows else total
    ranks.all_reduce(total)
    squares = [t.grad.double().square().sum() for t in tensors if t.grad is not None]
    if total.device.type != "cpu":
        factor = (limit / torch.cat([total, *(x.reshape(1) for x in squares)]).sum().sqrt()).clamp(max=1.0)
        return torch.where(factor.isnan(), 1.0, factor)  # a broken row is found where it is, as below
    norm = (float(total) + sum(map(float, squares))) ** 0.5
    return min(1.0, limit / norm) if norm > 0 else 1.0
