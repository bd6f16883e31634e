"""A model is an entity table, a relation table and a scorer; a view is what one batch sees of it."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd import random
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rows import Field, Layout
from distkgd.distributed.tables import OpenRows, Route, ShardedTable, drain, planning
from distkgd.graph.filters import KnownAnswers, Queries
from distkgd.graph.sampling import Batch, Kind, Sampler, excluded_from_groups, excluded_from_shared
from distkgd.random import Stream
from distkgd.scorers import Init, Scorer

Meet = Callable[[Tensor, Tensor], Tensor]

_INIT_ROWS = 1 << 14  # rows initialised at a time, to bound the counters' memory


class Model:
    """Tables and scorer of one model.

    relation: [num_relations or twice that, scorer.relation_size], replicated on every rank.
    reciprocal: head queries are tail queries of relation r + num_relations.
    """

    def __init__(self, scorer: Scorer, entity: ShardedTable, relation: Tensor, num_relations: int, reciprocal: bool):
        self.scorer = scorer
        self.entity = entity
        self.relation = relation
        self.num_relations = num_relations
        self.reciprocal = reciprocal

    @property
    def num_parameters(self) -> int:
        """Real numbers stored, over all ranks."""
        return self.entity.total * self.entity.dim + self.relation.numel()

    def project(self, queries: Queries, anchor: Tensor, relation: Tensor) -> Tensor:
        """[Q, query_size] of queries whose anchor rows are [Q, dim] and relation rows [Q, relation_size]."""
        if self.reciprocal:
            return self.scorer.tail_query(anchor, relation)
        asks_head = queries.side == 1
        if asks_head.all():
            return self.scorer.head_query(anchor, relation)
        if not asks_head.any():
            return self.scorer.tail_query(anchor, relation)
        # Each formula runs on its own queries only; the permutation puts them back in order.
        order = torch.sort(queries.side, stable=True).indices
        tails = order[: int((~asks_head).sum())]
        heads = order[len(tails) :]
        parts = [
            self.scorer.tail_query(anchor[tails], relation[tails]),
            self.scorer.head_query(anchor[heads], relation[heads]),
        ]
        return torch.cat(parts)[torch.sort(order).indices]

    def answer_scores(self, queries: Queries, anchor: Tensor, relation: Tensor, answer: Tensor) -> Tensor:
        """[Q]: the score of each query's own answer ([Q, dim])."""
        if self.reciprocal:
            return self.scorer.score(anchor, relation, answer)
        asks_head = (queries.side == 1).unsqueeze(1)
        return self.scorer.score(
            torch.where(asks_head, answer, anchor), relation, torch.where(asks_head, anchor, answer)
        )

    def relation_ids(self, queries: Queries) -> Tensor:
        """[Q] int64: row of each query's relation."""
        return queries.relation + self.num_relations * queries.side if self.reciprocal else queries.relation


def new_model(
    scorer: Scorer,
    num_entities: int,
    num_relations: int,
    ranks: Ranks,
    *,
    reciprocal: bool,
    seed: int,
    init_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    row_dtype: torch.dtype | None = None,
) -> Model:
    """A model with fresh rows; each number depends on (seed, row, column) alone, not on the world size.

    row_dtype: in which entity rows are stored; default: dtype.
    """
    lo, hi = ranks.share(num_entities)
    entity_init = scorer.entity_init()
    if init_scale is not None:
        entity_init = Init(entity_init.kind, init_scale)
    entity = _fresh(lo, hi, scorer.dim, entity_init, seed, Stream.ENTITY_INIT, ranks.device, row_dtype or dtype)
    rows = num_relations * (2 if reciprocal else 1)
    size, init = scorer.relation_size, scorer.relation_init()
    relation = _fresh(0, rows, size, init, seed, Stream.RELATION_INIT, ranks.device, dtype)
    return Model(scorer, ShardedTable(entity, num_entities, ranks, dtype), relation, num_relations, reciprocal)


def _fresh(
    lo: int, hi: int, dim: int, init: Init, seed: int, stream: Stream, device: torch.device, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(hi - lo, dim, device=device, dtype=dtype)
    for start in range(lo, hi, _INIT_ROWS):
        stop = min(start + _INIT_ROWS, hi)
        index = torch.arange(start * dim, stop * dim, device=device)
        if init.kind == "normal":
            values = random.normal(seed, stream, 0, index) * init.scale
        else:
            values = (2.0 * random.uniform(seed, stream, 0, index) - 1.0) * init.scale
        out[start - lo : stop - lo] = values.reshape(-1, dim).to(dtype)
    return out


Move = Literal["rows", "queries", "nothing"]


@dataclass(frozen=True)
class Scene:
    """What this rank has to do in one part of a batch, before any embedding is touched; shared by all its models.

    batch: this rank's triples and queries.
    candidates: shape of the candidates' ids, [N] or [groups, N]; None: every row of the shard.
    looked_up: whether candidate rows are looked up after the anchors and answers, or are those of the own shard.
    label_share: [Q] 1 / number of training answers of each query (k-vs-all), or None.
    """

    batch: Batch
    route: Route
    layout: Layout
    candidates: tuple[int, ...] | None
    looked_up: bool
    label_share: Tensor | None
    seed: int


class SceneBuilder:
    """Turns global batches into this rank's scenes.

    kind, num, chunk: what a positive triple's answer is compared with. filtered: known answers are left out.
    label_shares: k-vs-all. move: candidate rows to the queries, queries to the candidates, or neither: then candidates
        are drawn from the own shard only, and the model depends on the number of ranks.
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
        self.move = move
        self.cuts = ranks.bounds(sampler.num_entities)

    @property
    def grouped(self) -> bool:
        """Whether each chunk of triples, or each query, has candidates of its own."""
        return self.kind in ("chunk", "triple")

    def parts(self, step: int, accumulate: int) -> list[Batch]:
        """The `accumulate` consecutive parts of the global batch of `step`."""
        whole = self.sampler.batch(step)
        size = whole.size // accumulate
        return [whole.part(i * size, (i + 1) * size) for i in range(accumulate)]

    def scene(self, part: Batch) -> Scene:
        """This rank's scene of one part of the global batch."""
        return drain(self.planning(part))

    def planning(self, part: Batch) -> Generator[None, None, Scene]:
        """`scene` that yields while ids are on their way to other ranks."""
        cuts = self.cuts_of(part)
        mine = part.part(cuts[self.ranks.rank], cuts[self.ranks.rank + 1])
        ids, local, layout = self._candidates(part, mine, cuts)
        looked_up = self.move == "rows"
        wanted = [mine.queries.anchor, mine.queries.answer]
        if ids is not None and looked_up:
            wanted.append(ids.reshape(-1))
            local = ids.new_empty(0)
        asked, fixed = torch.cat(wanted), None
        # A shared list of candidates that is looked up is the same on all ranks: asking for it cannot be balanced.
        if self.sampler.balanced is not None and (self.grouped or not looked_up):
            asked, fixed = self._by_owner(mine, ids if looked_up else None)
        route = yield from planning(asked, local, self.sampler.num_entities, self.ranks, fixed)
        share = self.known.counts(mine.queries).double().reciprocal() if self.label_shares else None
        shape = None if ids is None else tuple(ids.shape)
        return Scene(mine, route, layout, shape, looked_up, share, self.sampler.seed)

    def cuts_of(self, part: Batch) -> list[int]:
        """[world + 1] first triple of each rank in a part of the batch; chunks stay whole."""
        unit = self.chunk if self.kind == "chunk" else 1
        return [cut * unit for cut in self.ranks.bounds(len(part.triples) // unit)]

    def drawn(self, batch: Batch) -> Tensor | None:
        """Global ids that the queries of a part of a batch are compared with: [groups, N], [N], or None for all."""
        if self.grouped:
            return self._grouped(batch)
        if self.kind != "batch":
            return None
        among = (self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1]) if self.move == "nothing" else None
        return torch.sort(self.sampler.shared_negatives(batch.step, self.num, among)).values

    def _candidates(self, part: Batch, mine: Batch, cuts: list[int]) -> tuple[Tensor | None, Tensor | None, Layout]:
        # Global ids of the candidates met here (None: the whole shard), their local rows if they are here, the layout.
        travelling = self.move == "queries"
        met = part if travelling else mine
        counts = [(stop - start) * part.sides for start, stop in pairwise(cuts)] if travelling else None
        known = self.known if self.filtered else None
        lo, hi = self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1]
        if self.grouped:
            listed, absent = self._grouped(met), None
            if travelling:
                listed, absent = self._own_part(listed)
            mask = excluded_from_groups(met.queries, listed, self.sampler.num_entities, known)
            mask = mask if absent is None else mask | absent.unsqueeze(1)
            layout = Layout(self.ranks, counts=counts, groups=len(listed), num_candidates=listed.shape[1], mask=mask)
            return listed, listed.reshape(-1) - lo, layout
        ids: Tensor | None = None
        if self.kind == "batch":
            ids = self.drawn(part)
            ids = ids[(ids >= lo) & (ids < hi)] if ids is not None and travelling else ids
        elif self.move == "rows":
            ids = torch.arange(self.sampler.num_entities, device=part.triples.device)
        excluded = excluded_from_shared(met.queries, ids, lo, hi, known)
        number = hi - lo if ids is None else len(ids)
        layout = Layout(self.ranks, counts=counts, num_candidates=number, excluded=excluded)
        return ids, None if ids is None else ids - lo, layout

    def _grouped(self, met: Batch) -> Tensor:
        # [groups, N] global ids: per chunk of triples, or per query.
        per_group = self.chunk if self.kind == "chunk" else 1
        sides = 1 if self.kind == "chunk" else met.sides
        first, groups = met.offset * sides // per_group, len(met.triples) * sides // per_group
        if self.move == "nothing":
            among = self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1]
            return self.sampler.group_negatives(met.step, first, groups, self.num, among)
        if self.sampler.balanced is not None:
            return self.sampler.stratified_negatives(met.step, first, groups, self.num, self.cuts)
        return self.sampler.group_negatives(met.step, first, groups, self.num)

    def _own_part(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # The ids of each group that this rank owns, moved to the front and padded to the longest list; what is padding.
        lo, hi = self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1]
        foreign = (ids < lo) | (ids >= hi)
        order = torch.sort(foreign.to(torch.int8), dim=1, stable=True).indices
        longest = int((~foreign).sum(1).max()) if len(ids) else 0
        order = order[:, :longest]
        absent = foreign.gather(1, order)
        return ids.gather(1, order).masked_fill(absent, lo), absent

    def _by_owner(self, mine: Batch, ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, list[int]]]:
        # Balanced batches: ids listed by their owner, as many from each; where each anchor, answer, candidate stands.
        assert self.sampler.balanced is not None
        world, rank, k = self.ranks.world, self.ranks.rank, self.sampler.balanced.per_pair
        heads, tails = mine.triples[:, 0], mine.triples[:, 2]
        each = 0 if ids is None else ids.numel() // world
        by_owner = None if ids is None else ids.reshape(len(ids), world, -1).transpose(0, 1).reshape(world, each)
        listed, counts, tail_at, id_at, at = [], [], [], [], 0
        head_at = torch.empty(0)
        for owner in range(world):
            start = at
            if owner == rank:
                listed.append(heads)
                head_at = torch.arange(at, at + len(heads), device=heads.device)
                at += len(heads)
            listed.append(tails[owner * k : (owner + 1) * k])
            tail_at.append(torch.arange(at, at + k, device=heads.device))
            at += k
            if by_owner is not None:
                listed.append(by_owner[owner])
                id_at.append(torch.arange(at, at + each, device=heads.device))
                at += each
            counts.append(at - start)
        tail_positions = torch.cat(tail_at)
        triple = torch.arange(len(heads), device=heads.device).repeat_interleave(mine.sides)
        is_head = mine.queries.side == 1
        anchor = torch.where(is_head, tail_positions[triple], head_at[triple])
        answer = torch.where(is_head, head_at[triple], tail_positions[triple])
        inverse = [anchor, answer]
        if ids is not None:
            where = torch.stack(id_at).reshape(world, len(ids), -1).transpose(0, 1)
            inverse.append(where.reshape(-1))
        return torch.cat(listed), (torch.cat(inverse), counts)


class Upcoming:
    """The scene of a later part of a batch, its ids travelling while the present one is computed."""

    def __init__(self, steps: Generator[None, None, Scene]) -> None:
        self._steps = steps
        self._scene: Scene | None = None
        self.advance()

    def advance(self) -> None:
        """Take in what has arrived and send what depends on it."""
        if self._scene is None:
            try:
                next(self._steps)
            except StopIteration as stop:
                self._scene = stop.value

    def scene(self) -> Scene:
        """The finished scene."""
        while self._scene is None:
            self.advance()
        return self._scene


class Lookahead:
    """The scenes of consecutive parts of batches, the next one's ids always on their way to other ranks."""

    def __init__(self, builder: SceneBuilder, accumulate: int) -> None:
        self._builder = builder
        self._accumulate = accumulate
        self._parts: tuple[int, list[Batch]] = (-1, [])
        self._next: tuple[tuple[int, int], Upcoming] | None = None

    def scene(self, step: int, part: int) -> Scene:
        """The scene of one part of the batch of `step`; the one that follows is begun."""
        if self._next is None or self._next[0] != (step, part):
            self.drop()
            self._begin(step, part)
        assert self._next is not None
        scene = self._next[1].scene()
        self._begin(*((step, part + 1) if part + 1 < self._accumulate else (step + 1, 0)))
        return scene

    def advance(self) -> None:
        """Called in the middle of a step, when the next scene's first exchange has had its time."""
        if self._next is not None:
            self._next[1].advance()

    def drop(self) -> None:
        """Forget the scene that was begun, once nothing of it is on its way any more; all ranks do so together."""
        if self._next is not None:
            self._next[1].scene()
            self._next = None

    def _begin(self, step: int, part: int) -> None:
        if self._parts[0] != step:
            self._parts = (step, self._builder.parts(step, self._accumulate))
        self._next = (step, part), Upcoming(self._builder.planning(self._parts[1][part]))


class View:
    """The embeddings and scores of one model for one scene.

    anchor, relation, answer: [Q, ·] rows before dropout. positive: [Q] scores of the queries' own answers.
    negatives: the scores of the other candidates, as a Field.
    """

    def __init__(
        self,
        model: Model,
        scene: Scene,
        *,
        grad: bool,
        dropout: float = 0.0,
        relation_dropout: float = 0.0,
        bf16: bool = False,
    ) -> None:
        with torch.set_grad_enabled(grad):
            queries = scene.batch.queries
            n = len(queries.anchor)
            self.model, self.scene = model, scene
            self.opened: OpenRows = model.entity.open(scene.route, grad=grad)
            self.anchor = self.opened.lookup(0, n)
            self.answer = self.opened.lookup(n, 2 * n)
            self.relation = F.embedding(model.relation_ids(queries), model.relation)
            anchor = _drop(self.anchor, dropout, scene, Stream.ENTITY_DROPOUT)
            relation = _drop(self.relation, relation_dropout, scene, Stream.RELATION_DROPOUT)
            self.positive = model.answer_scores(queries, anchor, relation, self.answer)
            meet = _meet_bf16(model.scorer) if bf16 else model.scorer.meet
            self.negatives = Field(scene.layout, meet, model.project(queries, anchor, relation), self._candidate_rows())

    def _candidate_rows(self) -> Tensor:
        shape = self.scene.candidates
        if shape is None:
            return self.opened.candidates()
        n = len(self.scene.batch.queries.anchor)
        looked_up = self.scene.looked_up
        rows = self.opened.lookup(2 * n, 2 * n + math.prod(shape)) if looked_up else self.opened.candidates()
        return rows.reshape(*shape, rows.shape[-1])

    def field(self, queries: Tensor, meet: Meet) -> Field:
        """Another number per (query, candidate) over the same candidates, e.g. a cosine."""
        return Field(self.scene.layout, meet, queries, self.negatives.rows)


def _meet_bf16(scorer: Scorer) -> Meet:
    def meet(queries: Tensor, rows: Tensor) -> Tensor:
        return scorer.meet(queries.bfloat16(), rows.bfloat16()).to(queries.dtype)

    return meet


def _drop(rows: Tensor, rate: float, scene: Scene, stream: Stream) -> Tensor:
    # Inverted dropout whose mask depends on the query's global index, never on the rank.
    if not rate:
        return rows
    dim = rows.shape[1]
    index = scene.batch.query_index().unsqueeze(1) * dim + torch.arange(dim, device=rows.device)
    keep = random.uniform(scene.seed, stream, scene.batch.step, index) >= rate
    return rows * (keep.to(rows.dtype) / (1.0 - rate))
