"""The ranks of one process group and the few collectives distkgd needs; at world 1 none of them does anything."""

import gc
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distkgd.distributed.rendezvous import meet
from distkgd.errors import ConfigError, RendezvousError

# A peer that died ends the others at once; one that hangs is given up after this. NCCL does not raise then, it aborts,
# and what it waits for may be a straggler, a slow disk or its own first connections: it is given more time.
PEER_TIMEOUT = timedelta(seconds=45)
NCCL_TIMEOUT = timedelta(minutes=30)
LONGEST_TIMEOUT = 7 * 24 * 3600  # seconds
LARGEST_WORLD = 1 << 20
# What gloo and NCCL say of a peer that is not there any more, or silent.
_LOST = re.compile(r"connection|broken pipe|timed? ?out", re.IGNORECASE)
START = "start the ranks with torchrun, which sets WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE."


class Ranks:
    """This process's place among `world` processes, and how it talks to them.

    traffic: payload bytes this rank has handed to collectives, by kind (ids, rows, queries, partials, dense, control);
        what stays on the rank is not counted, an all-reduce counts as its ring does: 2 (world - 1) / world of its size.
    in_order: what ranks have for each other is added up in their order, so that a sum is the same every time: by an
        exchange, whose copies a network of GPUs would carry one by one. Else by the backend's own collectives.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.world = world
        self.device = torch.device(device)
        self.traffic: Counter[str] = Counter()
        self.in_order = self.device.type == "cpu"

    def sent(self, kind: str, num_bytes: float) -> None:
        """Take note of payload handed to a collective."""
        self.traffic[kind] += round(num_bytes)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that prints, tracks and writes shared files."""
        return self.rank == 0

    def share(self, total: int) -> tuple[int, int]:
        """[lo, hi) of `total` items that belong to this rank: contiguous, sizes differ by at most one."""
        return self.bounds(total)[self.rank], self.bounds(total)[self.rank + 1]

    def bounds(self, total: int) -> list[int]:
        """The world + 1 cut points of `total` items."""
        return [rank * total // self.world for rank in range(self.world + 1)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            with self._peers():
                dist.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._peers():
            dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor, kind: str = "control") -> Tensor:
        """`tensor`, which is contiguous, summed over ranks, in place."""
        return self.begin_all_reduce(tensor, kind)()

    def begin_all_reduce(self, tensor: Tensor, kind: str = "control") -> Callable[[], Tensor]:
        """`all_reduce` on its way while other work is done; the result waits for it."""
        if self.world == 1:
            return lambda: tensor
        if not tensor.is_contiguous():
            raise AssertionError("what is summed over ranks must be contiguous")
        self.sent(kind, 2 * tensor.numel() * tensor.element_size() * (self.world - 1) / self.world)
        return self._arrival(dist.all_reduce(tensor, async_op=True), tensor)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], kind: str) -> Tensor:
        """[sum(receive), ...]: rows sent to ranks 0, 1, … in runs of `send`; differentiable any number of times.

        rows: [sum(send), ...].
        """
        if self.world == 1:
            return rows
        out: Tensor = _Exchange.apply(rows, self, list(send), list(receive), kind)  # type: ignore[no-untyped-call]
        return out

    def all_to_all_async(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], kind: str
    ) -> Callable[[], Tensor]:
        """`exchange` without gradient, on its way while other work is done; the result waits for it."""
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        kept = rows.contiguous()
        self.sent(kind, (sum(send) - send[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size())
        return self._arrival(dist.all_to_all_single(out, kept, list(receive), list(send), async_op=True), out)

    def gather(self, rows: Tensor, counts: Sequence[int], kind: str) -> Tensor:
        """[sum(counts), ...]: every rank's rows ([counts[rank], ...]) in rank order; differentiable."""
        if self.world == 1:
            return rows
        if not self.in_order:
            there_and_back = self.all_gather, self.sum_for_each
            out: Tensor = _Collective.apply(rows, *there_and_back, list(counts), kind)  # type: ignore[no-untyped-call]
            return out
        copies = rows.repeat(self.world, *([1] * (rows.dim() - 1)))
        return self.exchange(copies, [len(rows)] * self.world, counts, kind)

    def all_gather(self, rows: Tensor, counts: Sequence[int], kind: str) -> Tensor:
        """[sum(counts), ...]: every rank's rows ([counts[rank], ...]) in rank order, without gradient, in one message.

        It is as long as the longest: collectives are of equal parts.
        """
        most = max(counts)
        padded = rows.new_empty(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        out = rows.new_empty(self.world * most, *rows.shape[1:])
        self.sent(kind, (self.world - 1) * rows.numel() * rows.element_size())
        self._arrival(dist.all_gather_into_tensor(out, padded, async_op=True), out)()
        if min(counts) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(most), counts, strict=True)])

    def sum_for_each(self, rows: Tensor, counts: Sequence[int], kind: str) -> Tensor:
        """[counts[rank], ...]: of rows for ranks 0, 1, … in runs of `counts`, this rank's summed over all, as above."""
        most = max(counts)
        padded = rows.new_zeros(self.world, most, *rows.shape[1:])
        for part, mine in zip(padded, rows.split(list(counts)), strict=True):
            part[: len(mine)] = mine
        out = rows.new_empty(most, *rows.shape[1:])
        self.sent(kind, (len(rows) - counts[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size())
        self._arrival(dist.reduce_scatter_tensor(out, padded.flatten(0, 1), async_op=True), out)()
        return out[: counts[self.rank]]

    def _arrival(self, work: Any, result: Tensor) -> Callable[[], Tensor]:
        def arrived() -> Tensor:
            with self._peers():
                work.wait()
            return result

        return arrived

    @contextmanager
    def _peers(self) -> Iterator[None]:
        # RendezvousError in place of what torch says of a peer that has died or is silent.
        try:
            yield
        except RuntimeError as error:
            # The first sentence, without the place in their source that comes before it.
            reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0].rstrip(".")
            if not _LOST.search(reason):
                raise
            raise RendezvousError(
                f"rank {self.rank} has lost another rank, whose own error, if it had one, is above or in its log "
                f"({reason})."
            ) from error


class _Exchange(torch.autograd.Function):
    # The backward is the same function with the counts swapped, so second-order gradients come for free.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, send: list[int], receive: list[int], kind: str) -> Tensor:
        ctx.args = (ranks, receive, send, kind)
        return ranks.all_to_all_async(rows, send, receive, kind)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back: Tensor = _Exchange.apply(grads[0], *ctx.args)  # type: ignore[no-untyped-call]
        return back, None, None, None, None


class _Collective(torch.autograd.Function):
    # Of two collectives, each the other's backward: a gather, and the sum of what every rank has for each rank's rows.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Callable[..., Tensor], back: Callable[..., Tensor], *how: Any) -> Tensor:
        ctx.there, ctx.back, ctx.how = there, back, how
        return there(rows, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back: Tensor = _Collective.apply(grads[0], ctx.back, ctx.there, *ctx.how)  # type: ignore[no-untyped-call]
        return back, None, None, None, None


def peer_timeout(device: torch.device) -> timedelta:
    """How long a rank waits for a silent one: `DISTKGD_PEER_SECONDS`, or what suits the device's backend."""
    if os.environ.get("DISTKGD_PEER_SECONDS"):
        return timedelta(seconds=_number("DISTKGD_PEER_SECONDS", 1, LONGEST_TIMEOUT, "unset it"))
    return NCCL_TIMEOUT if device.type == "cuda" else PEER_TIMEOUT


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; under torchrun each process takes its local GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device=cuda was asked for, but torch sees no GPU here; use device=cpu or device=auto.")
        local = _number("LOCAL_RANK", 0, torch.cuda.device_count() - 1) if "LOCAL_RANK" in os.environ else 0
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        return device
    if name == "cpu":
        return torch.device("cpu")
    raise ConfigError(f"device={name!r} is not known; allowed: auto, cpu, cuda.")


def join_ranks(device_name: str = "auto") -> Ranks:
    """The ranks torchrun started (RANK, WORLD_SIZE, …), or a world of one when it did not."""
    device = pick_device(device_name)
    world = _number("WORLD_SIZE", 1, LARGEST_WORLD) if "WORLD_SIZE" in os.environ else 1
    if world == 1:
        return Ranks(device=device)
    rank, port = _number("RANK", 0, world - 1), _number("MASTER_PORT", 1, 65535)
    address = _given("MASTER_ADDR")
    meeting = peer_timeout(torch.device("cpu"))  # ranks that do not come are told of early, on GPUs too
    try:
        base = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=meeting,
        )
    except RuntimeError as error:  # of whatever kind; torch has several
        reason = str(error).partition("\n")[0]
        raise RendezvousError(
            f"rank {rank} has no store at MASTER_ADDR {address}, MASTER_PORT {port} ({reason}); {START}"
        ) from None
    store = meet(base, rank, world, meeting)
    # On GPUs objects are gathered by gloo, which needs no GPU to wait for.
    where = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    dist.init_process_group(**where, store=store, rank=rank, world_size=world, timeout=peer_timeout(device))
    return Ranks(rank, world, device)


def _given(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise RendezvousError(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')!r} and {name} is not set; {START}")
    return value


def _number(name: str, least: int, most: int, remedy: str = START) -> int:
    value = _given(name)
    if not (value.isascii() and value.isdecimal() and least <= int(value) <= most):
        raise RendezvousError(f"{name} is {value[:40]!r}; allowed is a whole number from {least} to {most}; {remedy}")
    return int(value)


def leave_ranks(ranks: Ranks) -> None:
    """Shut the process group down; gloo's threads need the short sleep or may abort the interpreter at exit."""
    if ranks.world > 1 and dist.is_initialized():
        ranks.barrier()
        dist.destroy_process_group()
        gc.collect()
        time.sleep(0.05)
