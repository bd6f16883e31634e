"""Entity tables whose rows are spread over ranks by contiguous global range, and the look-up that moves rows.

A step first plans a `Route` from ids alone (which rows each rank asks of each other, each id once), then opens one or
several tables on it. Teacher and student share one entity split, hence one route. What a step touches is gathered
into one leaf per table; after backward that leaf's gradient is exactly what the row optimiser needs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.ranks import Ranks


@dataclass(frozen=True)
class Route:
    """Who needs which rows in one step.

    inverse: [n] position in the de-duplicated answer of each id looked up.
    send, receive: rows sent to / received from each rank by the look-up.
    requested: [sum(send)] position in `touched` of each row other ranks (and this one) asked for.
    touched: [m] local rows of this shard that take part in the step, ascending; None: all of them.
    candidates: [k] position in `touched` of this rank's candidate rows; None: all rows are candidates, or none is.
    """

    inverse: Tensor
    send: list[int]
    receive: list[int]
    requested: Tensor
    touched: Tensor | None
    candidates: Tensor | None


def plan_route(ids: Tensor, candidates: Tensor | None, total: int, ranks: Ranks) -> Route:
    """The route of a step that looks up `ids` and scores against `candidates`.

    ids: [n] int64 global entity ids this rank needs as rows.
    candidates: [k] int64 *local* rows of this shard that are candidates; None: every row of every shard.
    total: number of entities.
    """
    unique, inverse = torch.unique(ids, return_inverse=True)
    requested, receive, send = _ask(unique, total, ranks)
    if candidates is None:
        return Route(inverse, send, receive, requested, None, None)
    touched, position = torch.unique(torch.cat([requested, candidates]), return_inverse=True)
    return Route(inverse, send, receive, position[: len(requested)], touched, position[len(requested) :])


def _ask(unique: Tensor, total: int, ranks: Ranks) -> tuple[Tensor, list[int], list[int]]:
    # The local rows others want from us, how many rows we get from each rank, how many each gets from us.
    if ranks.world == 1:
        return unique, [len(unique)], [len(unique)]
    cuts = torch.tensor(ranks.bounds(total), device=unique.device)
    edges = torch.searchsorted(unique, cuts)
    wanted = (edges[1:] - edges[:-1]).contiguous()
    one_each = [1] * ranks.world
    asked = ranks.exchange(wanted, one_each, one_each)
    receive, send = wanted.tolist(), asked.tolist()
    requests = ranks.exchange(unique, receive, send)
    return requests - ranks.bounds(total)[ranks.rank], receive, send


class OpenRows:
    """The rows of one table that one step works on; `leaf` [m, dim] collects their gradient."""

    def __init__(self, leaf: Tensor, route: Route, ranks: Ranks) -> None:
        self.leaf = leaf
        self.route = route
        asked = _rows(leaf, route.requested)
        self._answer = ranks.exchange(asked, route.send, route.receive)

    def lookup(self, start: int, stop: int) -> Tensor:
        """[stop - start, dim]: the rows of ids[start:stop] as given to `plan_route`."""
        return _rows(self._answer, self.route.inverse[start:stop])

    def candidates(self) -> Tensor:
        """[k, dim]: this rank's candidate rows."""
        if self.route.candidates is None:
            return self.leaf
        return _rows(self.leaf, self.route.candidates)


class ShardedTable:
    """Rows [lo, hi) of a [total, dim] table; the other rows live on the other ranks.

    weight: [hi - lo, dim], without gradient; steps see it through `open`.
    opened: what steps opened with a gradient since the optimiser last looked.
    """

    def __init__(self, weight: Tensor, total: int, ranks: Ranks) -> None:
        self.lo, self.hi = ranks.share(total)
        if len(weight) != self.hi - self.lo:
            raise AssertionError(f"shard has {len(weight)} rows, its range {self.lo}..{self.hi}")
        self.weight = weight
        self.total = total
        self.dim = weight.shape[1]
        self.ranks = ranks
        self.opened: list[OpenRows] = []

    def open(self, route: Route, *, grad: bool) -> OpenRows:
        """The rows of `route`; with `grad` their leaf requires a gradient."""
        if route.touched is None:
            leaf = self.weight.detach()
        else:
            leaf = self.weight.index_select(0, route.touched)
        rows = OpenRows(leaf.requires_grad_(grad), route, self.ranks)
        if grad:
            self.opened.append(rows)
        return rows


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    # The second derivative of an embedding of no rows cannot be taken; that of a slice can.
    return F.embedding(ids, table) if len(ids) else table[:0]
