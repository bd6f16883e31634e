"""Entity tables whose rows are spread over ranks by contiguous global range, and the look-up that moves rows.

A step first plans a `Route` from ids alone (which rows each rank asks of each other, each id once), then opens one or
several tables on it. Teacher and student share one entity split, hence one route. What a step touches is gathered
into one leaf per table; after backward that leaf's gradient is exactly what the row optimiser needs.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.kernels.candidates import GatheredRows, Looked, looked_up
from distkgd.kernels.packed import PackedRows
from distkgd.kernels.quantiser import Quantiser
from distkgd.kernels.rows import Segments, add, segments, sortable, take

T = TypeVar("T")


@dataclass(frozen=True)
class Route:
    """Who needs which rows in one step.

    inverse: [n] position in the de-duplicated answer of each id looked up; None: nothing was de-duplicated.
    send, receive: rows sent to / received from each rank by the look-up.
    requested: [sum(send)] position in `touched` of each row other ranks (and this one) asked for; None: all, in order.
    touched: [m] local rows of this shard that were asked for or listed as candidates, as `distinct` has them; where
        nothing was de-duplicated, as they were asked for.
    candidates: [k] position in `touched` of this rank's candidate rows; None: every row of the shard is one.
    segments: of the ids looked up, where they were sorted.
    """

    inverse: Tensor | None
    send: list[int]
    receive: list[int]
    requested: Tensor | None
    touched: Tensor
    candidates: Tensor | None
    segments: Segments | None = None


def plan_route(ids: Tensor, candidates: Tensor | None, total: int, ranks: Ranks) -> Route:
    """The route of a step that looks up `ids` and scores against `candidates`.

    ids: [n] int64 global entity ids this rank needs as rows.
    candidates: [k] int64 *local* rows of this shard that are candidates; None: every row of every shard.
    total: number of entities.
    """
    return run_to_end(plan_route_async(ids, candidates, total, ranks))


class Asked(NamedTuple):
    """Rows of a look-up that go from rank to rank.

    receive, send: how many from and to each rank. requested: [sum(send)] *local* rows of this shard, in that order.
    """

    receive: list[int]
    send: list[int]
    requested: Tensor


def plan_route_async(
    ids: Tensor,
    candidates: Tensor | None,
    total: int,
    ranks: Ranks,
    fixed: tuple[Tensor, list[int]] | None = None,
    asked: Asked | None = None,
) -> Generator[None, None, Route]:
    """`plan_route` that yields whenever an exchange is on its way, so that other work can be done meanwhile.

    fixed: (position in `ids` of each row to be looked up, ids of each owner), when `ids` comes sorted by owner and
        every rank asks every other for as many rows; then nothing is de-duplicated and no counts are exchanged.
    asked: what `foresee` made of the ids of all ranks; then nothing is exchanged at all.
    """
    counts, on_host = None, ids.device.type == "cpu"
    if ranks.world == 1 and candidates is None and fixed is None and not on_host:
        # All rows have a gradient, to which those of these are added.
        return Route(None, [len(ids)], [len(ids)], None, ids, None)
    among = None
    if fixed is None and candidates is not None and not len(candidates) and sortable(ids):
        among = segments(ids, min(len(ids), total))  # of candidates that are looked up: their gradients are sorted, too
        unique, inverse = among.unique, among.place
    elif fixed is None:
        unique, inverse = distinct(ids, total)
    else:
        unique, (inverse, counts) = ids, fixed
    if ranks.world == 1:
        receive, send, requested = Asked([len(unique)], [len(unique)], unique)
        if counts is None and (candidates is None or not len(candidates)):
            return Route(inverse, send, receive, None, unique, candidates, among)
    elif asked is not None:
        receive, send, requested = asked
    else:
        receive, send, requested = yield from _ask(unique, inverse, counts, total, ranks)
    here = requested if candidates is None else torch.cat([requested, candidates])
    touched, position = distinct(here, ranks.share(total)[1] - ranks.share(total)[0])
    where = None if candidates is None else position[len(requested) :]
    return Route(inverse, send, receive, position[: len(requested)], touched, where, among)


def _ask(
    unique: Tensor, inverse: Tensor, counts: list[int] | None, total: int, ranks: Ranks
) -> Generator[None, None, Asked]:
    # Of every rank the rows that it owns; how many they are is told first, unless all know.
    receive, send = counts, counts
    if receive is None or send is None:
        on_host = unique.device.type == "cpu"
        edges = torch.searchsorted(unique, torch.arange(ranks.world + 1, device=unique.device) * total // ranks.world)
        if len(inverse) and not on_host:  # what `distinct` repeats is asked for once
            edges = torch.minimum(edges, inverse.max() + 1)
        wanted = (edges[1:] - edges[:-1]).contiguous()
        one_each = [1] * ranks.world
        arriving = ranks.all_to_all_async(wanted, one_each, one_each, "ids")
        if on_host:
            yield
        told = to_host(torch.stack([wanted, arriving()]))
        if not on_host:
            yield
        receive, send = told()
        unique = unique[: sum(receive)]
    requests = ranks.all_to_all_async(unique, receive, send, "ids")
    yield
    return Asked(receive, send, requests() - ranks.bounds(total)[ranks.rank])


def foresee(everyone: Tensor, total: int, ranks: Ranks, also: Tensor) -> Generator[None, None, tuple[Asked, list[int]]]:
    """(who asks whom for which rows, `also` on the host) where a rank can tell what all of them look up.

    everyone: [m] int64, rank * total + id of all that each rank looks up. also: [k] int64. Yields while numbers are on
    their way to the host, for which it waits once; nothing travels between ranks.
    """
    rank, world = ranks.rank, ranks.world
    keys, place = distinct(everyone, world * total)
    edges = torch.searchsorted(keys, _edges(world, total, keys.device))
    if len(place):
        edges = torch.minimum(edges, place.max() + 1)  # what `distinct` repeats is asked for once
    told = to_host(torch.cat([edges, also]).unsqueeze(0))
    yield
    numbers = told()[0]
    receive = [stop - start for start, stop in pairwise(numbers[rank * world : (rank + 1) * world + 1])]
    spans = [(numbers[at + rank], numbers[at + rank + 1]) for at in range(0, world * world, world)]
    requested = torch.cat([keys[start:stop] for start, stop in spans]) % total - ranks.bounds(total)[rank]
    return Asked(receive, [stop - start for start, stop in spans], requested), numbers[world * world + 1 :]


@lru_cache(maxsize=4)
def _edges(world: int, total: int, device: torch.device) -> Tensor:
    # [world² + 1]: where, for each rank that asks, each owner's part of its keys begins.
    cuts = [asking * total + owner * total // world for asking in range(world) for owner in range(world)]
    return torch.tensor([*cuts, world * total], device=device)


def to_host(numbers: Tensor) -> Callable[[], list[list[int]]]:
    """A matrix on its way to the host; of a GPU the result waits for no more than what was asked of it until now."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    there = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def arrived() -> list[list[int]]:
        done.synchronize()
        found: list[list[int]] = there.tolist()
        return found

    return arrived


def distinct(ids: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """([u] ascending, [n] where each of `ids` is among them) of ids [n] in [0, below).

    Many ids of few are found by ticking them off instead of sorting them. On an accelerator, where the host would have
    to wait to learn how many they are, u is as many as they could be, and the last of them is repeated.
    """
    if ids.device.type != "cpu" and len(ids):
        return _distinct_padded(ids, below)
    if below > 4 * len(ids):
        unique, inverse = torch.unique(ids, return_inverse=True)
        return unique, inverse
    place = ids.new_zeros(below).index_fill_(0, ids, 1)
    unique = place.nonzero().squeeze(1)
    place[unique] = torch.arange(len(unique), device=ids.device)
    return unique, place[ids]


def _distinct_padded(ids: Tensor, below: int) -> tuple[Tensor, Tensor]:
    if below > 4 * len(ids):
        if sortable(ids):
            return segments(ids, len(ids))[:2]
        listed, order = torch.sort(ids)
        among = F.pad((listed[1:] != listed[:-1]).cumsum(0), (1, 0))
        place, last = torch.empty_like(ids).scatter_(0, order, among), listed[-1:]
    else:
        place = (ids.new_zeros(below).index_fill_(0, ids, 1).cumsum(0) - 1)[ids]
        last = ids.max().reshape(1)
    return last.repeat(min(len(ids), below)).scatter_(0, place, ids), place


def run_to_end(steps: Generator[None, None, T]) -> T:
    """What a generator returns, run to its end."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        value: T = stop.value
        return value


class OpenRows:
    """The rows of one table that one step works on.

    leaf: [m, dim] the touched rows, in the precision of the computation; collects their gradient.
    shard: [rows, dim] the shard itself, collecting a gradient of its own, when every row is a candidate; else None.
    packed: [rows, dim] the shard, when every row is a candidate and it is packed.
    mask: [rows, dim] bool, what a step sees of the shard, the rest as 0; None: all. quantiser: rounds what it sees.
    """

    def __init__(
        self,
        leaf: Tensor,
        shard: Tensor | None,
        route: Route,
        ranks: Ranks,
        mask: Tensor | None = None,
        quantiser: Quantiser | None = None,
        packed: PackedRows | None = None,
    ) -> None:
        self.leaf = leaf
        self.ranks = ranks
        self.packed = packed
        self.shard = shard
        self.route = route
        self._unrounded = leaf if mask is None else leaf * mask[route.touched]
        self._seen = self._unrounded if quantiser is None else quantiser(self._unrounded)
        self._shard = shard if shard is None or mask is None else shard * mask
        if self._shard is not None and quantiser is not None:
            self._shard = quantiser(self._shard)
        self._answer = self._exchanged(self._seen)

    def lookup(self, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """[size, dim] each: the rows of the ids given to `plan_route`, in consecutive runs of `sizes`."""
        # One look-up of all and a split: the backward of each look-up fills a table of its own with zeros.
        rows, _ = self._looked_up(sum(sizes))
        found: tuple[Tensor, ...] = rows.split(list(sizes))
        return found

    def lookup_unrounded(self, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """As `lookup`, of rows that are not rounded, which travel by themselves."""
        rows, inverse = self._exchanged(self._unrounded), self.route.inverse
        rows = rows[: sum(sizes)] if inverse is None else looked_up(rows, inverse[: sum(sizes)])
        found: tuple[Tensor, ...] = rows.split(list(sizes))
        return found

    def lookup_and_list(self, sizes: Sequence[int], shape: Sequence[int]) -> tuple[tuple[Tensor, ...], GatheredRows]:
        """As `lookup`, and the ids after those, [prod(shape)], as candidates of that shape."""
        rows, table = self._looked_up(sum(sizes))
        assert self.route.inverse is not None
        index = self.route.inverse[len(rows) :].reshape(*shape)
        return rows.split(list(sizes)), GatheredRows(table, index, self.route.segments, len(rows))

    def _exchanged(self, rows: Tensor) -> Tensor:
        # Of touched rows [m, dim] those that this rank asked for.
        asked = rows if self.route.requested is None else looked_up(rows, self.route.requested)
        return self.ranks.exchange(asked, self.route.send, self.route.receive, "rows")

    def _looked_up(self, num: int) -> tuple[Tensor, Tensor]:
        if self.route.inverse is None:
            return self._answer[:num], self._answer
        found: tuple[Tensor, Tensor] = Looked.apply(self._answer, self.route.inverse[:num])  # type: ignore[no-untyped-call]
        return found

    def candidates(self) -> Tensor | PackedRows:
        """[k, dim]: this rank's candidate rows."""
        if self.packed is not None:
            return self.packed
        if self._shard is not None:
            return self._shard
        assert self.route.candidates is not None
        return looked_up(self._seen, self.route.candidates)

    def gradient(self) -> tuple[Tensor | None, Tensor] | None:
        """(local rows or None for all of them, their gradient) that backward left here, or None if it left none."""
        if self.shard is None or self.shard.grad is None:
            if self.leaf.grad is None:
                return None
            return self._once() if self.route.inverse is None else (self.route.touched, self.leaf.grad)
        if self.leaf.grad is not None:
            add(self.shard.grad, self.route.touched, self.leaf.grad.to(self.shard.dtype))
            self.leaf.grad = None
        return None, self.shard.grad

    def _once(self) -> tuple[Tensor, Tensor]:
        # Of rows that were not de-duplicated the sum of what each has.
        assert self.shard is not None and self.leaf.grad is not None
        touched, place = distinct(self.route.touched, len(self.shard))
        grad = self.leaf.new_zeros(len(touched), self.leaf.shape[1])
        add(grad, place, self.leaf.grad)
        return touched, grad


class ShardedTable:
    """Rows [lo, hi) of a [total, dim] table; the other rows live on the other ranks.

    shard: [hi - lo, dim], without gradient; steps see it through `open`. Packed rows are for reading only.
    dtype: of the computation; rows may be stored in bfloat16 or packed and are widened where they are used.
    quantiser: how rows are rounded for who sees them; the shard holds the master rows, which are trained.
    opened: what steps opened with a gradient since the optimiser last looked.
    """

    def __init__(
        self,
        shard: Tensor | PackedRows,
        total: int,
        ranks: Ranks,
        dtype: torch.dtype | None = None,
        quantiser: Quantiser | None = None,
    ) -> None:
        self.lo, self.hi = ranks.share(total)
        if len(shard) != self.hi - self.lo:
            raise AssertionError(f"shard has {len(shard)} rows, its range {self.lo}..{self.hi}")
        self.shard = shard
        self.total = total
        self.dim = shard.shape[1]
        self.dtype = dtype or shard.dtype
        self.ranks = ranks
        self.quantiser = quantiser
        self.opened: list[OpenRows] = []

    @property
    def weight(self) -> Tensor:
        """[hi - lo, dim]: the shard; of packed rows a copy of them, unpacked anew by every call."""
        return self.shard if isinstance(self.shard, Tensor) else self.shard.take(slice(None))

    def rows(self, which: Tensor | slice) -> Tensor:
        """[n, dim], in the precision of the computation: a copy of some rows of this shard, or for a slice a view."""
        if isinstance(self.shard, Tensor):
            found = self.shard[which] if isinstance(which, slice) else take(self.shard, which)
        else:
            found = self.shard.take(which)
        return found.to(self.dtype)

    def widened(self) -> "ShardedTable":
        """This table, or if its rows are packed one of its own that holds them unpacked."""
        if isinstance(self.shard, Tensor):
            return self
        return ShardedTable(self.weight, self.total, self.ranks, self.dtype)

    def in_bits(self, bits: int) -> "ShardedTable":
        """This table, its rows seen in a width that is nested in theirs; ConfigError where there is none such.

        What steps open of it is opened of this table too.
        """
        if isinstance(self.shard, PackedRows):
            seen = self.shard.crop(bits, torch.arange(self.shard.packed.columns))
            return ShardedTable(seen, self.total, self.ranks, self.dtype)
        if self.quantiser is None:
            raise ConfigError(
                f"{bits} bits: these rows have none that are nested; take a model that was trained with distill.bits, "
                "on a CPU, or round this one: distkgd export --bits."
            )
        return self.seen(self.quantiser.narrowed(bits))

    def seen(self, quantiser: Quantiser | None) -> "ShardedTable":
        """This table, its rows seen rounded in another way. What steps open of it is opened of this table too."""
        table = ShardedTable(self.shard, self.total, self.ranks, self.dtype, quantiser)
        table.opened = self.opened
        return table

    def open(self, route: Route, *, grad: bool, mask: Tensor | None = None) -> OpenRows:
        """The rows of `route`, as far as `mask` ([rows, dim] bool) lets them be seen; with `grad` they collect one.

        What the mask hides is 0, and so is its gradient.
        """
        leaf = self.rows(route.touched).requires_grad_(grad)
        every = route.candidates is None
        if isinstance(self.shard, PackedRows):
            if grad or mask is not None or self.quantiser is not None:
                raise AssertionError("packed rows are for reading only; widen the table first")
            return OpenRows(leaf, None, route, self.ranks, packed=self.shard.to(self.dtype) if every else None)
        shard = self.shard.detach().requires_grad_(grad) if every else None
        rows = OpenRows(leaf, shard, route, self.ranks, mask, self.quantiser)
        if grad:
            self.opened.append(rows)
        return rows
