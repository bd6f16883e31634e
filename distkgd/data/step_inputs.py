"""Ids, look-up plan and candidates of one rank's part of a batch, before any embedding is touched."""

import math
from collections.abc import Generator, Iterator
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from distkgd.common.random import Stream
from distkgd.data.filters import KnownAnswers
from distkgd.data.sampling import Batch, Kind, Sampler, excluded_from_groups, excluded_from_shared
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.candidate_layout import NO_LIMIT, CandidateLayout
from distkgd.distributed.tables import Route, foresee, plan_route_async, run_to_end

Move = Literal["rows", "queries", "nothing"]
FORESEEN = 1 << 20  # so many ids of a global batch, at most, are drawn on each rank in place of being sent


@dataclass(frozen=True)
class StepInputs:
    """What this rank has to do in one part of a batch, before any embedding is touched; shared by all its models.

    batch: this rank's triples and queries.
    candidates: shape of the candidates' ids, [N] or [groups, N]; None: every row of the shard.
    looked_up: whether candidate rows are looked up after the anchors and answers, or are those of the own shard.
    drawn_anchors: of each query, looked up before the candidates, which they meet in place of the query's own.
    label_share: [Q] 1 / number of training answers of each query (k-vs-all), or None.
    candidate_ids: [N] ascending global ids of candidates that all queries share; None: the shard's, or not shared.
    """

    batch: Batch
    route: Route
    layout: CandidateLayout
    candidates: tuple[int, ...] | None
    looked_up: bool
    label_share: Tensor | None
    seed: int
    drawn_anchors: int = 0
    candidate_ids: Tensor | None = None


class StepInputBuilder:
    """Turns global batches into this rank's step inputs.

    kind, num, chunk: what a positive triple's answer is compared with (DualDE Eq. 3). filtered: known answers are left
        out.
    drawn_anchors: of each query, for its negatives, 0: its own. label_shares: k-vs-all.
    move: candidate rows to the queries, queries to the candidates, or neither: then candidates are drawn from the own
        shard only, and the model depends on the number of ranks.
    together: so many consecutive triples of a batch stay on one rank, beside what chunks ask for.
    """

    def __init__(
        self,
        sampler: Sampler,
        known: KnownAnswers,
        ranks: Ranks,
        *,
        kind: Kind,
        num: int,
        chunk: int,
        filtered: bool,
        label_shares: bool,
        drawn_anchors: int = 0,
        move: Move = "queries",
    ) -> None:
        self.sampler = sampler
        self.known = known
        self.ranks = ranks
        self.kind = kind
        self.num = num
        self.chunk = chunk
        self.filtered = filtered
        self.label_shares = label_shares
        self.drawn_anchors = drawn_anchors
        self.move = move
        self.together = 1
        self.cuts = ranks.bounds(sampler.num_entities)

    def quizzes(self, batch_size: int) -> "StepInputBuilder":
        """Inputs of `batch_size` (rounded down to whole chunks) of the triples that passes leave out, compared with
        candidates as these are."""
        quizzes = copy(self)
        unit = self.chunk if self.kind == "chunk" else 1
        quizzes.sampler, quizzes.together = self.sampler.quizzes(batch_size - batch_size % unit), 1
        return quizzes

    @property
    def own(self) -> list[int]:
        """First entity of this rank's shard, and the first behind it."""
        return self.cuts[self.ranks.rank : self.ranks.rank + 2]

    @property
    def grouped(self) -> bool:
        """Whether each chunk of triples, or each query, has candidates of its own."""
        return self.kind in ("chunk", "triple")

    def parts(self, step: int, accumulate: int) -> list[Batch]:
        """The `accumulate` consecutive parts of the global batch of `step`."""
        whole = self.sampler.batch(step)
        size = whole.size // accumulate
        return [whole.part(i * size, (i + 1) * size) for i in range(accumulate)]

    def inputs(self, part: Batch) -> StepInputs:
        """This rank's step inputs of one part of the global batch."""
        return run_to_end(self.prepare_async(part))

    def prepare_async(self, part: Batch) -> Generator[None, None, StepInputs]:
        """`inputs` that yields while ids are on their way to other ranks."""
        cuts = self.cuts_of(part)
        mine = part.part(cuts[self.ranks.rank], cuts[self.ranks.rank + 1])
        listed = self._grouped(part if self.move == "queries" else mine) if self.grouped else None
        length, rows = self._longest(listed), None
        if self.foresees(part, self.move):
            rows, told = yield from foresee(self._everyone(part, cuts), self.sampler.num_entities, self.ranks, length)
        else:
            told = length.tolist() if len(length) else []
        if listed is not None and told:
            listed, absent = self._own_part(listed, told[0])
        else:
            absent = None
        ids, local, layout = self._candidates(part, mine, cuts, listed, absent)
        looked_up = self.move == "rows"
        wanted = [mine.queries.anchor, mine.queries.answer]
        if ids is not None and looked_up:
            if self.drawn_anchors:
                wanted.append(self._anchors(mine).reshape(-1))
            wanted.append(ids.reshape(-1))
            local = ids.new_empty(0)
        asked, fixed = torch.cat(wanted), None
        # A shared list of candidates that is looked up is the same on all ranks: asking for it cannot be balanced.
        if self.sampler.balanced is not None and (self.grouped or not looked_up):
            asked, fixed = self._by_owner(mine, ids if looked_up else None)
        route = yield from plan_route_async(asked, local, self.sampler.num_entities, self.ranks, fixed, rows)
        share = self.known.counts(mine.queries).double().reciprocal() if self.label_shares else None
        shape = None if ids is None else tuple(ids.shape)
        shared = None if self.grouped else ids
        return StepInputs(mine, route, layout, shape, looked_up, share, self.sampler.seed, self.drawn_anchors, shared)

    def cuts_of(self, part: Batch) -> list[int]:
        """[world + 1] first triple of each rank in a part of the batch; chunks, and what stays together, are whole."""
        unit = math.lcm(self.together, self.chunk if self.kind == "chunk" else 1)
        return [cut * unit for cut in self.ranks.bounds(len(part.triples) // unit)]

    def drawn(self, batch: Batch) -> Tensor | None:
        """Global ids that the queries of a part of a batch are compared with: [groups, N], [N], or None for all.

        Drawn anchors are among them.
        """
        if self.grouped:
            listed = self._grouped(batch)
            return torch.cat([self._anchors(batch), listed], 1) if self.drawn_anchors else listed
        if self.kind != "batch":
            return None
        among = self.own if self.move == "nothing" else None
        return torch.sort(self.sampler.negatives(batch.step, self.num, cuts=among)[0]).values

    def _candidates(
        self, part: Batch, mine: Batch, cuts: list[int], listed: Tensor | None, absent: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, CandidateLayout]:
        # Global ids of the candidates met here (None: the whole shard), their local rows if they are here, the layout.
        # listed: [groups, N] ids of each group, without those that `absent` has as padding.
        travelling = self.move == "queries"
        met = part if travelling else mine
        counts = [(stop - start) * part.sides for start, stop in pairwise(cuts)] if travelling else None
        known = self.known if self.filtered else None
        lo, hi = self.own
        if listed is not None:
            left_out = None
            if not self.drawn_anchors:  # with these a negative is no answer of the query
                left_out = excluded_from_groups(met.queries, listed, self.sampler.num_entities, known)
                left_out = left_out if absent is None else left_out | absent.unsqueeze(1)
            layout = CandidateLayout(
                self.ranks,
                counts=counts,
                groups=len(listed),
                num_candidates=listed.shape[1],
                most_candidates=self.num,
                mask=left_out,
                block_numbers=NO_LIMIT
                if self.drawn_anchors
                else None,  # which anchor meets which stands in their order
            )
            return listed, _less(listed.reshape(-1), lo), layout
        ids: Tensor | None = None
        if self.kind == "batch":
            ids = self.drawn(part)
            if ids is not None and travelling and self.ranks.world > 1:
                ids = ids[(ids >= lo) & (ids < hi)]
        elif self.move == "rows":
            ids = torch.arange(self.sampler.num_entities, device=part.triples.device)
        number = hi - lo if ids is None else len(ids)
        excluded = answers = mask = None
        if known is not None or met.triples.device.type == "cpu":
            excluded = excluded_from_shared(met.queries, ids, lo, hi, known)
        elif self.kind != "batch":  # nothing whose size the host would have to wait for
            answers = _less(met.queries.answer, lo if ids is None else 0)
        elif ids is not None:
            mask = met.queries.answer.unsqueeze(1) == ids
        # What all ranks know of each other's lists: the largest shard, or all that were drawn.
        most = (
            max(b - a for a, b in pairwise(self.cuts)) if ids is None else self.num if self.kind == "batch" else number
        )
        layout = CandidateLayout(
            self.ranks,
            counts=counts,
            num_candidates=number,
            most_candidates=most,
            excluded=excluded,
            answers=answers,
            mask=mask,
        )
        return ids, None if ids is None else _less(ids, lo), layout

    def _grouped(self, met: Batch) -> Tensor:
        # [groups, N] global ids: per chunk of triples, or per query.
        per_group = self.chunk if self.kind == "chunk" else 1
        sides = 1 if self.kind == "chunk" else met.sides
        first, groups = met.offset * sides // per_group, len(met.triples) * sides // per_group
        cuts = self.own if self.move == "nothing" else self.cuts if self.sampler.balanced is not None else None
        return self.sampler.negatives(met.step, self.num, first, groups, cuts)

    def _anchors(self, met: Batch) -> Tensor:
        # [queries, drawn_anchors] global ids.
        first, queries = met.offset * met.sides, len(met.triples) * met.sides
        return self.sampler.negatives(met.step, self.drawn_anchors, first, queries, stream=Stream.NEGATIVE_ANCHORS)

    def _longest(self, listed: Tensor | None) -> Tensor:
        # [1]: the most ids of one group ([groups, N]) that this rank owns; [0] where these are not picked out.
        if listed is None or self.move != "queries":
            return torch.empty(0, dtype=torch.int64, device=self.sampler.train.device)
        own = self._is_own(listed).sum(1)
        return own.max().reshape(1) if len(listed) else own.new_zeros(1)

    def _is_own(self, ids: Tensor) -> Tensor:
        lo, hi = self.own
        return (ids >= lo) & (ids < hi)

    def _own_part(self, ids: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        # The ids of each group that this rank owns, moved to the front and padded to the longest list; what is padding.
        foreign = ~self._is_own(ids)
        order = torch.sort(foreign.to(torch.int8), dim=1, stable=True).indices[:, :longest]
        absent = foreign.gather(1, order)
        return ids.gather(1, order).masked_fill(absent, self.own[0]), absent

    def foresees(self, part: Batch, move: Move) -> bool:
        """Whether each rank draws what all look up, in place of ranks' telling each other.

        On a GPU, where a message takes long and drawing does not, and unless it is too much.
        """
        if self.ranks.world == 1 or self.sampler.balanced is not None or part.triples.device.type == "cpu":
            return False
        queries = len(part.triples) * part.sides
        each_of = {"triple": queries, "chunk": len(part.triples) // self.chunk}.get(self.kind, self.ranks.world)
        drawn = each_of * (self.sampler.num_entities if self.kind == "all" else self.num)
        looked_up = queries * self.drawn_anchors + drawn if move == "rows" else 0
        return 2 * queries + looked_up <= FORESEEN

    def _everyone(self, part: Batch, cuts: list[int]) -> Tensor:
        # [m] rank * entities + id of all that each rank looks up in a part.
        total, world = self.sampler.num_entities, self.ranks.world
        device, counts = part.triples.device, [(stop - start) * part.sides for start, stop in pairwise(cuts)]
        asking, each_rank = _asking(tuple(counts), total, device), _asking((1,) * world, total, device)
        wanted = [asking + part.queries.anchor, asking + part.queries.answer]
        if self.move == "rows" and self.kind == "all":
            wanted.append(torch.arange(world * total, device=device))
        elif self.move == "rows":
            drawn = self.drawn(part)
            assert drawn is not None
            by = asking.reshape(len(drawn), -1)[:, :1] if self.grouped else each_rank.unsqueeze(1)
            wanted.append((by + drawn).reshape(-1))
        return torch.cat(wanted)

    def _by_owner(self, mine: Batch, ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, list[int]]]:
        # Balanced batches: ids listed by their owner, as many from each; where each anchor, answer, candidate stands.
        # An owner's block: the heads, all of which this rank owns, then its tails, then its candidates.
        assert self.sampler.balanced is not None
        world, rank, k = self.ranks.world, self.ranks.rank, self.sampler.balanced.per_pair
        heads, tails = mine.triples[:, 0], mine.triples[:, 2]
        each = 0 if ids is None else ids.numel() // world
        places = torch.arange(len(heads) + world * (k + each), device=heads.device)
        start, stop = rank * (k + each), rank * (k + each) + len(heads)
        head_at = places[start:stop]
        blocks = torch.cat([places[:start], places[stop:]]).reshape(world, k + each)
        tail_at, id_at = blocks[:, :k].reshape(-1), blocks[:, k:]
        listed = torch.empty_like(places)
        listed[head_at], listed[tail_at] = heads, tails
        triple = torch.arange(len(heads), device=heads.device).repeat_interleave(mine.sides)
        is_head = mine.queries.side == 1
        inverse = [
            torch.where(is_head, tail_at[triple], head_at[triple]),
            torch.where(is_head, head_at[triple], tail_at[triple]),
        ]
        if ids is not None:
            where = id_at.reshape(world, len(ids), -1).transpose(0, 1).reshape(-1)
            listed[where] = ids.reshape(-1)
            inverse.append(where)
        counts = [k + each + len(heads) * (owner == rank) for owner in range(world)]
        return listed, (torch.cat(inverse), counts)


@lru_cache(maxsize=4)
def _asking(counts: tuple[int, ...], total: int, device: torch.device) -> Tensor:
    # [sum(counts)] int64: rank * total, as often as each rank's count says.
    ranks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return (ranks * total).to(device)


def _less(ids: Tensor, lo: int) -> Tensor:
    # To take 0 away would be a kernel on a GPU.
    return ids - lo if lo else ids


class Prefetcher:
    """The inputs of consecutive parts of batches, the next one's ids always on their way to other ranks."""

    def __init__(self, builder: StepInputBuilder, accumulate: int) -> None:
        self._builder = builder
        self._accumulate = accumulate
        self._parts: tuple[int, list[Batch]] = (-1, [])
        self._begun: tuple[int, int] | None = None  # step and part of what comes next
        self._steps: Iterator[None] = iter(())
        self._inputs: StepInputs | None = None

    def inputs(self, step: int, part: int) -> StepInputs:
        """The inputs of one part of the batch of `step`; the one that follows is begun."""
        if self._begun != (step, part):
            self.drop()
            self._begin(step, part)
        inputs = self._finished()
        self._begin(*((step, part + 1) if part + 1 < self._accumulate else (step + 1, 0)))
        return inputs

    def advance(self) -> None:
        """Called in the middle of a step, when the first exchange of the next inputs has had its time."""
        if self._begun is not None and self._inputs is None:
            try:
                next(self._steps)
            except StopIteration as stop:
                self._inputs = stop.value

    def drop(self) -> None:
        """Forget the inputs that were begun, once nothing of them is on its way any more; all ranks do so together."""
        if self._begun is not None:
            self._finished()
            self._begun = self._inputs = None

    def _begin(self, step: int, part: int) -> None:
        if self._parts[0] != step:
            self._parts = (step, self._builder.parts(step, self._accumulate))
        self._begun, self._inputs = (step, part), None
        self._steps = self._builder.prepare_async(self._parts[1][part])
        self.advance()

    def _finished(self) -> StepInputs:
        while self._inputs is None:
            self.advance()
        return self._inputs
