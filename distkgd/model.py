"""A model is an entity table, a relation table and a scorer; a view is what one batch sees of it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd import random
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rows import Field, Layout
from distkgd.distributed.tables import OpenRows, Route, ShardedTable, plan_route
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
) -> Model:
    """A model with fresh rows; each number depends on (seed, row, column) alone, not on the world size."""
    lo, hi = ranks.share(num_entities)
    entity_init = scorer.entity_init()
    if init_scale is not None:
        entity_init = Init(entity_init.kind, init_scale)
    entity = _fresh(lo, hi, scorer.dim, entity_init, seed, Stream.ENTITY_INIT, ranks.device, dtype)
    rows = num_relations * (2 if reciprocal else 1)
    size, init = scorer.relation_size, scorer.relation_init()
    relation = _fresh(0, rows, size, init, seed, Stream.RELATION_INIT, ranks.device, dtype)
    return Model(scorer, ShardedTable(entity, num_entities, ranks), relation, num_relations, reciprocal)


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


@dataclass(frozen=True)
class Scene:
    """What this rank has to do in one part of a batch, before any embedding is touched; shared by all its models.

    batch: this rank's triples and queries. negatives: [groups, N] candidate ids, or None when they are shared.
    label_share: [Q] 1 / number of training answers of each query (k-vs-all), or None.
    """

    batch: Batch
    route: Route
    layout: Layout
    negatives: Tensor | None
    label_share: Tensor | None
    seed: int


class SceneBuilder:
    """Turns global batches into this rank's scenes."""

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
    ) -> None:
        self.sampler = sampler
        self.known = known
        self.ranks = ranks
        self.kind = kind
        self.num = num
        self.chunk = chunk
        self.filtered = filtered
        self.label_shares = label_shares

    def parts(self, step: int, accumulate: int) -> list[Batch]:
        """The `accumulate` consecutive parts of the global batch of `step`."""
        whole = self.sampler.batch(step)
        size = whole.size // accumulate
        return [whole.part(i * size, (i + 1) * size) for i in range(accumulate)]

    def scene(self, part: Batch) -> Scene:
        """This rank's scene of one part of the global batch."""
        unit = self.chunk if self.kind == "chunk" else 1
        cuts = [cut * unit for cut in self.ranks.bounds(len(part.triples) // unit)]
        mine = part.part(cuts[self.ranks.rank], cuts[self.ranks.rank + 1])
        known = self.known if self.filtered else None
        shared = self.kind in ("all", "batch")
        candidates = negatives = None
        if shared:
            counts = [(stop - start) * part.sides for start, stop in pairwise(cuts)]
            candidates, layout = self._shared(part, counts, known)
        else:
            negatives = self._grouped(mine)
            mask = excluded_from_groups(mine.queries, negatives, self.sampler.num_entities, known)
            layout = Layout(self.ranks, groups=len(negatives), num_candidates=self.num, mask=mask)
        wanted = [mine.queries.anchor, mine.queries.answer]
        if negatives is not None:
            wanted.append(negatives.reshape(-1))
            candidates = negatives.new_empty(0)
        route = plan_route(torch.cat(wanted), candidates, self.sampler.num_entities, self.ranks)
        share = self.known.counts(mine.queries).double().reciprocal() if self.label_shares else None
        return Scene(mine, route, layout, negatives, share, self.sampler.seed)

    def _shared(self, part: Batch, counts: list[int], known: KnownAnswers | None) -> tuple[Tensor | None, Layout]:
        # This rank's local candidate rows (None: all of them) and the layout of all ranks' queries against them.
        lo, hi = self.ranks.share(self.sampler.num_entities)
        candidates = local = None
        if self.kind == "batch":
            drawn = torch.sort(self.sampler.shared_negatives(part.step, self.num)).values
            candidates = drawn[(drawn >= lo) & (drawn < hi)]
            local = candidates - lo
        excluded = excluded_from_shared(part.queries, candidates, lo, hi, known)
        number = hi - lo if candidates is None else len(candidates)
        return local, Layout(self.ranks, counts=counts, num_candidates=number, excluded=excluded)

    def _grouped(self, mine: Batch) -> Tensor:
        # [groups, N]: per chunk of triples, or per query.
        per_group = self.chunk if self.kind == "chunk" else 1
        sides = 1 if self.kind == "chunk" else mine.sides
        first, groups = mine.offset * sides // per_group, len(mine.triples) * sides // per_group
        return self.sampler.group_negatives(mine.step, first, groups, self.num)


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
        negatives = self.scene.negatives
        if negatives is None:
            return self.opened.candidates()
        n = len(self.scene.batch.queries.anchor)
        rows = self.opened.lookup(2 * n, 2 * n + negatives.numel())
        return rows.reshape(*negatives.shape, rows.shape[-1])

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
