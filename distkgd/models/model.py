"""A model is an entity table, a relation table and a scorer; a view is what one batch sees of it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.data.filters import Queries, both_sides
from distkgd.distributed.finite import Broken, broken_row, first_broken
from distkgd.distributed.pruning import Mask
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable, plan_route
from distkgd.errors import ConfigError
from distkgd.kernels.candidates import Candidates, embedded
from distkgd.kernels.packed import PackedRows, whole_queries
from distkgd.kernels.quantiser import Quantiser, Rounding
from distkgd.scorers import Init, Scorer
from distkgd.scorers.base import check_reciprocal

ScoreCandidates = Callable[[Tensor, Candidates], Tensor]

_INIT_NUMBERS = 1 << 17  # initialised at a time: a dozen temporaries of 8 bytes for each


class Model:
    """Tables and scorer of one model.

    relation: [num_relations or twice that, scorer.relation_size], replicated on every rank.
    reciprocal: head queries are tail queries of relation r + num_relations.
    mask: what of the tables its views see; None: all of it.
    relation_quantiser: how the relations are rounded for who sees them; the entities' is their table's.
    """

    def __init__(
        self,
        scorer: Scorer,
        entity: ShardedTable,
        relation: Tensor,
        num_relations: int,
        reciprocal: bool,
        mask: Mask | None = None,
        relation_quantiser: Quantiser | None = None,
    ):
        check_reciprocal(scorer, reciprocal)
        self.scorer = scorer
        self.entity = entity
        self.relation = relation
        self.num_relations = num_relations
        self.reciprocal = reciprocal
        self.mask = mask
        self.relation_quantiser = relation_quantiser

    @property
    def relations(self) -> Tensor:
        """[rows, relation_size] the relations as views see them."""
        seen = self.master_relations
        return seen if self.relation_quantiser is None else self.relation_quantiser(seen)

    @property
    def master_relations(self) -> Tensor:
        """[rows, relation_size] the relations as views see them, but not rounded."""
        return self.relation if self.mask is None else self.relation * self.mask.relation

    @property
    def num_parameters(self) -> int:
        """Real numbers stored, over all ranks."""
        return self.entity.total * self.entity.dim + self.relation.numel()

    def in_bits(self, bits: int) -> "Model":
        """This model, its entities' rows seen in a width that is nested in theirs; ConfigError where that is none.

        It stands on the same tables: what is learned through it is learned by this model.
        """
        seen, how = self.entity.in_bits(bits), self.relation_quantiser
        return Model(self.scorer, seen, self.relation, self.num_relations, self.reciprocal, self.mask, how)

    def crop(self, dim: int, bits: int | None = None) -> "Model":
        """A model of its own, made of the first `dim` columns of every entity and what of the relations goes with them.

        bits: as `in_bits`; None: all of them. ConfigError or UnsupportedError where the scorer has no such crop. Of
        packed rows the crop is not packed.
        """
        scorer = self.scorer.crop(dim)
        whole = (self if bits is None else self.in_bits(bits)).rounded()
        columns = self.scorer.crop_columns(dim).to(self.relation.device)
        table = whole.entity
        entity = ShardedTable(table.weight[:, : scorer.entity_size].clone(), table.total, table.ranks, table.dtype)
        relation = whole.relation.detach()[:, columns].clone()
        return Model(scorer, entity, relation, self.num_relations, self.reciprocal)

    def quantised(self, rounding: Rounding) -> "Model":
        """A model on the same tables, whose rows are seen rounded; ConfigError where its scorer cannot be."""
        table, how = self.entity, rounding.quantisers(self.scorer)
        seen = ShardedTable(table.weight, table.total, table.ranks, table.dtype, how.get("entity"))
        relation_quantiser = how.get("relation")
        return Model(
            self.scorer, seen, self.relation, self.num_relations, self.reciprocal, self.mask, relation_quantiser
        )

    @property
    def quantisers(self) -> dict[str, Quantiser]:
        """{"entity" or "relation": how that table is rounded}, of those that are."""
        found = {"entity": self.entity.quantiser, "relation": self.relation_quantiser}
        return {name: one for name, one in found.items() if one is not None}

    @torch.no_grad()
    def rounded(self) -> "Model":
        """This model, or if its rows are seen rounded a model of its own that holds them so."""
        table = self.entity
        if table.quantiser is None and self.relation_quantiser is None:
            return self
        weight = table.weight if table.quantiser is None else table.quantiser(table.weight)
        entity = ShardedTable(weight, table.total, table.ranks, table.dtype)
        return Model(self.scorer, entity, self.relations.detach(), self.num_relations, self.reciprocal)

    def widened(self) -> "Model":
        """This model, or if its entities' rows are packed a model of its own that holds them unpacked."""
        entity = self.entity.widened()
        if entity is self.entity:
            return self
        return Model(self.scorer, entity, self.relation, self.num_relations, self.reciprocal)

    @property
    def query_bits(self) -> int:
        """Of each number of a query: 8 where these are rounded (`in_query_bits`), else 32."""
        return self.entity.shard.query_bits if isinstance(self.entity.shard, PackedRows) else 32

    def in_query_bits(self, bits: int) -> "Model":
        """This model, whose queries are rounded to 8 bits; of 32 the model itself.

        ConfigError unless its rows are packed and its scorer multiplies these by queries.
        """
        table = self.entity
        if bits == 32:
            return self
        if bits != 8:
            raise ConfigError(f"{bits} query bits; allowed: 8, and 32, which rounds no query.")
        if not isinstance(table.shard, PackedRows) or self.scorer.candidate_form != "dot":
            raise ConfigError(
                "8 query bits are for packed rows of 8 bits or fewer (a pruned model's are not packed in memory), on a "
                f"CPU, of a scorer that multiplies them by queries; this is {self.scorer}, "
                f"{'packed' if isinstance(table.shard, PackedRows) else 'not packed'}."
            )
        seen = ShardedTable(replace(table.shard, query_bits=8), table.total, table.ranks, table.dtype)
        return Model(self.scorer, seen, self.relation, self.num_relations, self.reciprocal)

    def project(self, queries: Queries, anchor: Tensor, relation: Tensor) -> Tensor:
        """[Q, query_size] of queries whose anchor rows are [Q, entity_size] and relation rows [Q, relation_size]."""
        made = project(self.scorer, self.reciprocal, queries, anchor, relation)
        if self.query_bits == 8:
            whole, unit = whole_queries(made)
            return whole * unit
        return made

    def answer_scores(self, queries: Queries, anchor: Tensor, relation: Tensor, answer: Tensor) -> Tensor:
        """[Q]: the score of each query's own answer ([Q, entity_size])."""
        if self.query_bits == 8:
            return (self.project(queries, anchor, relation) * answer).sum(1)
        if self.reciprocal:
            return self.scorer.score(anchor, relation, answer)
        asks_head = (queries.side == 1).unsqueeze(1)
        return self.scorer.score(
            torch.where(asks_head, answer, anchor), relation, torch.where(asks_head, anchor, answer)
        )

    def relation_ids(self, queries: Queries) -> Tensor:
        """[Q] int64: row of each query's relation."""
        if not self.reciprocal:
            return queries.relation
        return torch.add(queries.relation, queries.side, alpha=self.num_relations)


@torch.no_grad()
def packed_in_memory(model: Model, rounding: Rounding) -> Model:
    """A model rounded as `rounding` says, as its files would be loaded: on a CPU rows of few bits stay packed."""
    seen, table = model.quantised(rounding), model.entity
    quantiser = seen.entity.quantiser
    if quantiser is None or quantiser.bits == 16 or table.weight.device.type != "cpu":
        return seen.rounded()
    rows = PackedRows(quantiser.pack(table.weight), quantiser, table.dtype)
    entity = ShardedTable(rows, table.total, table.ranks, table.dtype)
    return Model(model.scorer, entity, seen.relations.detach(), model.num_relations, model.reciprocal)


def broken_row_of(model: Model) -> Broken | None:
    """The first row of a model's tables that holds NaN or an infinity, None where none does. All ranks call it."""
    table = model.entity
    parts = {"entity": table.shard} if isinstance(table.shard, Tensor) else {}
    if isinstance(table.shard, PackedRows):
        packed = table.shard.packed
        parts = {"entity.step": packed.step, "entity.bias": packed.bias, "entity.coarser": packed.coarser}
    mine = next(filter(None, (broken_row(name, part, table.lo) for name, part in parts.items())), None)
    mine = mine or broken_row("relation", model.relation)
    return first_broken(mine, table.ranks)


@torch.no_grad()
def overflows(model: Model, triples: Tensor) -> int:
    """How many of the [n, 3] triples have a score that is NaN or infinite, as the answer to either question.

    All ranks call it with the same triples and get the same number.
    """
    ranks, total = model.entity.ranks, model.entity.total
    lo, hi = ranks.share(len(triples))
    queries = both_sides(triples[lo:hi])
    n = len(queries.anchor)
    route = plan_route(torch.cat([queries.anchor, queries.answer]), None, total, ranks)
    anchor, answer = model.entity.open(route, grad=False).lookup([n, n])
    relation = embedded(model.relations, model.relation_ids(queries))
    scores = model.answer_scores(queries, anchor, relation, answer)
    bad = (~scores.isfinite()).reshape(-1, 2).any(1).sum().double().reshape(1)
    return int(ranks.all_reduce(bad))


def project(scorer: Scorer, reciprocal: bool, queries: Queries, anchor: Tensor, relation: Tensor) -> Tensor:
    """[Q, query_size]: what of queries meets their candidates; `Model.project` for any scorer."""
    if reciprocal:
        return scorer.tail_query(anchor, relation)
    if queries.side.device.type != "cpu":
        turned = scorer.turned(relation, queries.side)
        if turned is not None:
            return scorer.tail_query(anchor, turned)
    asks_head = queries.side == 1
    if asks_head.device.type != "cpu":  # whose questions the host does not know, and would have to wait for
        both = scorer.head_query(anchor, relation), scorer.tail_query(anchor, relation)
        return torch.where(asks_head.unsqueeze(1), *both)
    if asks_head.all():
        return scorer.head_query(anchor, relation)
    if not asks_head.any():
        return scorer.tail_query(anchor, relation)
    # Each formula runs on its own queries only; the permutation puts them back in order.
    order = torch.sort(queries.side, stable=True).indices
    tails = order[: int((~asks_head).sum())]
    heads = order[len(tails) :]
    parts = [
        scorer.tail_query(anchor[tails], relation[tails]),
        scorer.head_query(anchor[heads], relation[heads]),
    ]
    return torch.cat(parts)[torch.sort(order).indices]


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
        entity_init = replace(entity_init, scale=init_scale)
    stored, width = row_dtype or dtype, scorer.entity_size
    entity = _fresh(lo, hi, width, entity_init, seed, Stream.ENTITY_INIT, ranks.device, stored)
    rows = num_relations * (2 if reciprocal else 1)
    size, init = scorer.relation_size, scorer.relation_init()
    relation = _fresh(0, rows, size, init, seed, Stream.RELATION_INIT, ranks.device, dtype)
    return Model(scorer, ShardedTable(entity, num_entities, ranks, dtype), relation, num_relations, reciprocal)


def _fresh(
    lo: int, hi: int, dim: int, init: Init, seed: int, stream: Stream, device: torch.device, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(hi - lo, dim, device=device, dtype=dtype)
    rows = max(1, _INIT_NUMBERS // dim)
    scale = init.scale * torch.tensor(init.columns or [1.0] * dim, dtype=torch.float64, device=device)
    for start in range(lo, hi, rows):
        stop = min(start + rows, hi)
        index = torch.arange(start * dim, stop * dim, device=device)
        if init.kind == "normal":
            values = random.normal(seed, stream, 0, index)
        else:
            values = 2.0 * random.uniform(seed, stream, 0, index) - 1.0
        out[start - lo : stop - lo] = (values.reshape(-1, dim) * scale).to(dtype)
    return out
