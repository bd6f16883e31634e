"""Replicated tensors trained by DeepSpeed: one engine per group, ZeRO stage 0 to 3 (engine: deepspeed).

The leaves that a method works on stay ordinary whole tensors on every rank. An engine holds a second copy, the gradient
buckets and the optimiser state, each sharded or not as its ZeRO stage says: 0 shards nothing, 1 and 2 the optimiser
state (and, between backward and step, the gradient), 3 the copy too. A step copies the leaves into the engine, hands it
their gradients as those of a surrogate loss, steps, and copies the result back. Entity rows never come here.
"""

import gc
import importlib
import logging
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distkgd.distributed.optim.dense import Dense, as_rows, load_tensors, state_shape, stored_state
from distkgd.distributed.optim.rows import ADAGRAD_EPS, ADAM_BETAS, ADAM_EPS, new_state, update
from distkgd.distributed.ranks import Ranks
from distkgd.errors import DivergedError, UnsupportedError

ZERO_STAGES = (0, 1, 2, 3)
# Our names of the optimiser's state -> torch's.
STATE_KEYS: dict[str, dict[str, str]] = {
    "sgd": {},
    "adagrad": {"sum": "sum"},
    "rowwise_adagrad": {"sum": "sum"},
    "adam": {"mean": "exp_avg", "square": "exp_avg_sq"},
}
MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


class DensePart(nn.Module):
    """All replicated tensors of one group as parameters; forward returns them all, so that one backward reaches all."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        # By number: names of tensors may hold dots, which a parameter's may not.
        for i, tensor in enumerate(tensors.values()):
            self.register_parameter(f"part{i}", nn.Parameter(tensor.detach().clone()))

    def forward(self) -> list[Tensor]:
        """Copies: ZeRO 3 empties the parameters themselves after forward."""
        return [parameter.clone() for parameter in self.parameters()]


class DeepSpeedDense(Dense):
    """Trains one group through a DeepSpeed engine; see `distkgd.distributed.optim.dense.Dense`.

    name: sgd, adagrad, adam, or with zero 0 rowwise_adagrad. zero: the ZeRO stage. All ranks make it together.

    Raises UnsupportedError for what DeepSpeed cannot do, or when it is not installed.
    """

    sums_ranks: ClassVar[bool] = True

    def __init__(self, name: str, tensors: Mapping[str, Tensor], *, lr: float, zero: int, ranks: Ranks) -> None:
        check_supported(name, zero, tensors)
        super().__init__(name, tensors, lr)
        self.zero = zero
        self._ranks = ranks
        deepspeed = import_deepspeed(ranks.device)
        self._releases = [weakref.finalize(self, _LONE_GROUP.leave)] if _LONE_GROUP.enter(ranks, deepspeed) else []
        self._engine = _make_engine(deepspeed, DensePart(self.tensors), _torch_optimizer(name, lr), zero, ranks.device)
        self._releases.insert(0, weakref.finalize(self, self._engine.destroy))
        self._parameters: dict[str, nn.Parameter] = dict(
            zip(self.tensors, self._engine.module.parameters(), strict=True)
        )
        # The optimiser of torch: DeepSpeed wraps it, and replaces an Adagrad, in stages 1 to 3.
        self._inner: torch.optim.Optimizer = self._engine.optimizer.optimizer if zero else self._engine.optimizer
        self._utils = deepspeed.utils
        # DeepSpeed makes optimiser state in the first step; one without effect makes it loadable before that.
        self._engine_step({key: torch.zeros_like(tensor) for key, tensor in self.tensors.items()}, 0.0)
        self._set_inner_steps(0)

    def step(self, scale: float, clip: float | Tensor = 1.0, *, reduced: bool = True) -> None:
        """See `Dense.step`. Not reduced: DeepSpeed sums over ranks."""
        self.steps += 1
        # DeepSpeed takes the mean over ranks; shares of the global mean add up to it.
        factor = clip if reduced else clip * self._ranks.world
        grads = {
            key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach() * factor
            for key, tensor in self.tensors.items()
        }
        self.clear()
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                self._write(key, tensor)
        self._engine_step(grads, self.lr * scale)
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                tensor.copy_(self._read(key))
        self._ranks.sent("dense", _bytes_per_step(self.tensors, self.zero, self._ranks.world))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See `Dense.state`."""
        return {
            key: {
                kind: self._read_state(key, inner).view(state_shape(tensor, kind, self.name))
                for kind, inner in STATE_KEYS[self.name].items()
            }
            for key, tensor in self.tensors.items()
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """See `Dense.load`."""
        load_tensors(self.tensors, tensors)
        for key, parameter in self._parameters.items():
            for kind, inner in STATE_KEYS[self.name].items():
                like = new_state(self.name, as_rows(self.tensors[key]))[kind]
                value = stored_state(state, key, kind, like).to(like)
                if self.zero == 3:
                    self._utils.safe_set_local_optimizer_state(parameter, self._own_part(value), inner)
                elif self.zero:
                    self._utils.safe_set_full_optimizer_state(parameter, value.view(-1), inner)
                else:
                    kept = self._inner.state[parameter][inner]
                    kept.copy_(value.view_as(kept))
        self.steps = steps
        self._set_inner_steps(steps)

    def close(self) -> None:
        """See `Dense.close`: removes the engine's hooks; the last engine of a lone process ends its process group."""
        for release in self._releases:
            release()

    def _engine_step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        outputs = self._engine()
        terms = [(out * grad).sum() for out, grad in zip(outputs, grads.values(), strict=True)]
        self._engine.backward(torch.stack(terms).sum())
        self._engine.step()
        if not self._engine.was_step_applied():
            raise DivergedError(
                f"The gradient of {', '.join(self.tensors)} became NaN or Inf, and ZeRO stage {self.zero} steps no "
                "further. Lower optimizer.lr, or set optimizer.clip; the last checkpoint is intact."
            )

    def _write(self, key: str, tensor: Tensor) -> None:
        parameter = self._parameters[key]
        if self.zero == 3:
            self._utils.safe_set_local_fp32_param(parameter, self._own_part(tensor))
        elif self.zero:
            self._utils.safe_set_full_fp32_param(parameter, tensor)
        else:
            parameter.copy_(tensor)

    def _own_part(self, tensor: Tensor) -> Tensor:
        # What ZeRO 3 keeps of a tensor here. Its own way to cut one fails where the ranks do not divide the size.
        size = math.ceil(tensor.numel() / self._ranks.world)
        flat = tensor.detach().reshape(-1)
        padded = torch.cat([flat, flat.new_zeros(size * self._ranks.world - len(flat))])
        return padded[self._ranks.rank * size :][:size]

    def _read(self, key: str) -> Tensor:
        if self.zero < 3:
            return self._parameters[key].detach()
        value: Tensor = self._utils.safe_get_full_fp32_param(self._parameters[key])
        return value

    def _read_state(self, key: str, inner: str) -> Tensor:
        parameter = self._parameters[key]
        if not self.zero:
            kept: Tensor = self._inner.state[parameter][inner]
            return kept.clone()
        value: Tensor = self._utils.safe_get_full_optimizer_state(parameter, inner)
        return value

    def _set_inner_steps(self, steps: int) -> None:
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(steps)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Our formula as torch's optimiser: one running sum per row."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; a closure is not evaluated."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state, rows = self.state[parameter], as_rows(parameter)
                if not state:
                    state.update(new_state("rowwise_adagrad", rows))
                update("rowwise_adagrad", rows, as_rows(parameter.grad), state, group["lr"], 1)


def check_supported(name: str, zero: int, tensors: Mapping[str, Tensor]) -> None:
    """UnsupportedError for an optimiser, a stage or a number type that DeepSpeed cannot train as we do."""
    if zero not in ZERO_STAGES:
        raise UnsupportedError(f"DeepSpeed has no ZeRO stage {zero}; allowed: 0, 1, 2, 3.")
    if name == "rowwise_adagrad" and zero:
        raise UnsupportedError(
            f"rowwise_adagrad keeps one number per row, and ZeRO stage {zero} cuts tensors without regard to rows; "
            "use stage 0, optimizer.name adagrad, or engine: ddp."
        )
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            given = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"engine: deepspeed trains float32 only, and tensor {key!r} is {given}; set dtype: float32, or use "
                "engine: ddp."
            )


def import_deepspeed(device: torch.device) -> Any:
    """The package, silent on stdout and bound to the type of `device`.

    Raises UnsupportedError when it is not installed, or bound to another type.
    """
    # Its autotuner imports mlflow, which no rank needs here: a second, 140 MB, and telemetry that nobody switched off.
    # Where somebody has imported it, that is done already, and other threads must go on finding it.
    hidden = nullcontext() if "mlflow" in sys.modules else _set(sys.modules, "mlflow", None)
    # Its kind of device it chooses when it is imported; this is how it is told.
    bound = _set(os.environ, "DS_ACCELERATOR", device.type)
    with bound, hidden, redirect_stdout(sys.stderr):
        try:
            deepspeed = importlib.import_module("deepspeed")
        except ModuleNotFoundError as error:
            if error.name != "deepspeed":
                raise
            raise UnsupportedError(
                "engine: deepspeed needs the package deepspeed, which is not installed; "
                "run pip install 'distkgd[deepspeed]', or use engine: ddp."
            ) from None
        kind = deepspeed.get_accelerator().device_name()
    if kind != device.type:
        raise UnsupportedError(
            f"DeepSpeed in this process is bound to {kind}, and device is {device.type}; start a new process for it."
        )
    # It logs to stdout, where our launchers print tables; errors go where Python's own logging sends them.
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # A shared-memory all-reduce that would be compiled here and now, for most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _make_engine(
    deepspeed: Any, part: DensePart, make_optimizer: MakeOptimizer, zero: int, device: torch.device
) -> Any:
    numbers = sum(parameter.numel() for parameter in part.parameters())
    stage: dict[str, Any] = {"stage": zero}
    if zero:
        # The default bucket is 2 GB of float32, allocated at once.
        stage |= {"reduce_bucket_size": numbers, "overlap_comm": False}
    if zero in (1, 2):
        stage["compute_grad_norm"] = False  # nobody reads it, and it costs a collective
    if zero == 3:
        # Below the threshold (100,000 numbers) ZeRO 3 would shard nothing.
        stage |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # its default is 1.0; ours spans all groups and rows, and comes before
        "zero_allow_untested_optimizer": True,
        "zero_optimization": stage,
    }
    # DeepSpeed reads it in every process, start and step, also where no launcher set it.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    with redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(
            model=part, optimizer=make_optimizer(part.parameters()), config=config, dist_init_required=False
        )
    return engine


def _torch_optimizer(name: str, lr: float) -> MakeOptimizer:
    match name:
        case "sgd":
            return partial(torch.optim.SGD, lr=lr)
        case "adagrad":
            return partial(torch.optim.Adagrad, lr=lr, eps=ADAGRAD_EPS)
        case "rowwise_adagrad":
            return partial(RowwiseAdagrad, lr=lr)
        case "adam":
            return partial(torch.optim.Adam, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS)
    raise AssertionError(name)


def _bytes_per_step(tensors: Mapping[str, Tensor], zero: int, world: int) -> float:
    """Payload of DeepSpeed's collectives in one step, which our counters do not see.

    n numbers on W ranks. Stage 0: a ring all-reduce of the gradient, 2 n (W-1)/W. Stages 1 and 2: the same (this
    version all-reduces there, too), and an all-gather of the new values, n (W-1)/W, n padded to a multiple of 2 W.
    Stage 3: all-gather for forward, reduce-scatter, all-gather of the new values, 3 n (W-1)/W, each tensor padded to
    a multiple of W. Four bytes each. Start and checkpoints are not counted.
    """
    sizes = [tensor.numel() for tensor in tensors.values()]
    numbers: float = 2 * sum(sizes) / world
    if zero == 3:
        numbers = 3 * sum(math.ceil(size / world) for size in sizes)
    elif zero:
        numbers += 2 * math.ceil(sum(sizes) / (2 * world))
    return 4 * numbers * (world - 1)


class _LoneGroup:
    """The process group of one process that no launcher started: DeepSpeed does nothing without a process group."""

    def __init__(self) -> None:
        self._users = 0
        self._seen: weakref.ref[Any] | None = None

    def enter(self, ranks: Ranks, deepspeed: Any) -> bool:
        """Make sure that there is a process group that DeepSpeed knows; whether the caller must leave it."""
        alone = self._users > 0 or not dist.is_initialized()
        if not dist.is_initialized():
            if ranks.world > 1:
                raise AssertionError("these ranks have left their process group")
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        group = dist.group.WORLD
        if self._seen is not None and self._seen() is not group:
            # Ranks have left and joined again in this process; DeepSpeed still holds the groups of then.
            deepspeed.utils.groups._release_process_group_references()
        self._seen = weakref.ref(group)
        self._users += alone
        return alone

    def leave(self) -> None:
        """End the process group after its last user."""
        self._users -= 1
        if not self._users and dist.is_initialized():
            dist.destroy_process_group()
            # As in leave_ranks: gloo's threads may otherwise abort the interpreter at exit.
            gc.collect()
            time.sleep(0.05)


_LONE_GROUP = _LoneGroup()


@contextmanager
def _set(where: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    """where[key] is `value` for a while."""
    before = {key: where[key]} if key in where else {}
    where[key] = value
    try:
        yield
    finally:
        del where[key]
        where.update(before)
