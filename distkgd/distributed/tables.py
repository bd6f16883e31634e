"""Entity tables whose rows are spread over ranks by contiguous global range, and the look-up that moves rows.

A step first plans a `Route` from ids alone (which rows each rank asks of each other, each id once), then opens one or
several tables on it. Teacher and student share one entity split, hence one route. What a step touches is gathered
into one leaf per table; after backward that leaf's gradient is exactly what the row optimiser needs.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Route:
    """Who needs which rows in one step.

    inverse: [n] position in the de-duplicated answer of each id looked up.
    send, receive: rows sent to / received from each rank by the look-up.
    requested: [sum(send)] position in `touched` of each row other ranks (and this one) asked for; None: all, in order.
    touched: [m] local rows of this shard that were asked for or listed as candidates, ascending.
    candidates: [k] position in `touched` of this rank's candidate rows; None: every row of the shard is one.
    """

    inverse: Tensor
    send: list[int]
    receive: list[int]
    requested: Tensor | None
    touched: Tensor
    candidates: Tensor | None


def plan_route(ids: Tensor, candidates: Tensor | None, total: int, ranks: Ranks) -> Route:
    """The route of a step that looks up `ids` and scores against `candidates`.

    ids: [n] int64 global entity ids this rank needs as rows.
    candidates: [k] int64 *local* rows of this shard that are candidates; None: every row of every shard.
    total: number of entities.
    """
    return drain(planning(ids, candidates, total, ranks))


def planning(
    ids: Tensor,
    candidates: Tensor | None,
    total: int,
    ranks: Ranks,
    fixed: tuple[Tensor, list[int]] | None = None,
) -> Generator[None, None, Route]:
    """`plan_route` that yields whenever an exchange is on its way, so that other work can be done meanwhile.

    fixed: (position in `ids` of each row to be looked up, ids of each owner), when `ids` comes sorted by owner and
        every rank asks every other for as many rows; then nothing is de-duplicated and no counts are exchanged.
    """
    counts = None
    if fixed is None:
        unique, inverse = torch.unique(ids, return_inverse=True)
    else:
        unique, (inverse, counts) = ids, fixed
    receive, send, requested = [len(unique)], [len(unique)], unique
    if ranks.world > 1:
        lo = ranks.bounds(total)[ranks.rank]
        if counts is not None:
            receive, send = counts, counts
        else:
            edges = torch.searchsorted(unique, torch.tensor(ranks.bounds(total), device=unique.device))
            wanted = (edges[1:] - edges[:-1]).contiguous()
            one_each = [1] * ranks.world
            asked = ranks.begin_exchange(wanted, one_each, one_each, "ids")
            yield
            receive, send = wanted.tolist(), asked().tolist()
        requests = ranks.begin_exchange(unique, receive, send, "ids")
        yield
        requested = requests() - lo
    nobody_else = ranks.world == 1 and counts is None
    if nobody_else and (candidates is None or not len(candidates)):
        return Route(inverse, send, receive, None, unique, candidates)
    here = requested if candidates is None else torch.cat([requested, candidates])
    touched, position = torch.unique(here, return_inverse=True)
    where = None if candidates is None else position[len(requested) :]
    return Route(inverse, send, receive, position[: len(requested)], touched, where)


def drain(steps: Generator[None, None, T]) -> T:
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
    """

    def __init__(self, leaf: Tensor, shard: Tensor | None, route: Route, ranks: Ranks) -> None:
        self.leaf = leaf
        self.shard = shard
        self.route = route
        asked = leaf if route.requested is None else _rows(leaf, route.requested)
        self._answer = ranks.exchange(asked, route.send, route.receive, "rows")

    def lookup(self, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """[size, dim] each: the rows of the ids given to `plan_route`, in consecutive runs of `sizes`."""
        # One look-up of all and a split: the backward of each look-up fills a table of its own with zeros.
        found: tuple[Tensor, ...] = _rows(self._answer, self.route.inverse).split(list(sizes))
        return found

    def candidates(self) -> Tensor:
        """[k, dim]: this rank's candidate rows."""
        if self.shard is not None:
            return self.shard
        assert self.route.candidates is not None
        return _rows(self.leaf, self.route.candidates)

    def gradient(self) -> tuple[Tensor | None, Tensor] | None:
        """(local rows or None for all of them, their gradient) that backward left here, or None if it left none."""
        if self.shard is None or self.shard.grad is None:
            return None if self.leaf.grad is None else (self.route.touched, self.leaf.grad)
        if self.leaf.grad is not None:
            self.shard.grad.index_add_(0, self.route.touched, self.leaf.grad.to(self.shard.dtype))
            self.leaf.grad = None
        return None, self.shard.grad


class ShardedTable:
    """Rows [lo, hi) of a [total, dim] table; the other rows live on the other ranks.

    weight: [hi - lo, dim], without gradient; steps see it through `open`.
    dtype: of the computation; rows may be stored in bfloat16 and are widened where they are used.
    opened: what steps opened with a gradient since the optimiser last looked.
    """

    def __init__(self, weight: Tensor, total: int, ranks: Ranks, dtype: torch.dtype | None = None) -> None:
        self.lo, self.hi = ranks.share(total)
        if len(weight) != self.hi - self.lo:
            raise AssertionError(f"shard has {len(weight)} rows, its range {self.lo}..{self.hi}")
        self.weight = weight
        self.total = total
        self.dim = weight.shape[1]
        self.dtype = dtype or weight.dtype
        self.ranks = ranks
        self.opened: list[OpenRows] = []

    def open(self, route: Route, *, grad: bool) -> OpenRows:
        """The rows of `route`; with `grad` they collect a gradient."""
        leaf = self.weight.index_select(0, route.touched).to(self.dtype).requires_grad_(grad)
        shard = self.weight.detach().requires_grad_(grad) if route.candidates is None else None
        rows = OpenRows(leaf, shard, route, self.ranks)
        if grad:
            self.opened.append(rows)
        return rows


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    # The second derivative of an embedding of no rows cannot be taken; that of a slice can.
    return F.embedding(ids, table) if len(ids) else table[:0]
