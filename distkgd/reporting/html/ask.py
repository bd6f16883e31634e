"""A finished model asked without being loaded: the rows of a few entities, and all rows in blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distkgd.data.filters import KnownAnswers, Queries
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable
from distkgd.evaluation.prediction import best
from distkgd.evaluation.ranking import Ties, fixed_entities, rank_of_counts, spread_of, thresholds, unsound_last
from distkgd.models.export.source import Source, Table
from distkgd.models.model import Model

SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Asked:
    """What a model answers to Q queries. own, other: [Q] score of the answer, and of another entity.

    rank: [Q] float64, of the answer. scores, ids: [Q, k] the best candidates, best first.
    """

    own: Tensor
    other: Tensor
    rank: Tensor
    scores: Tensor
    ids: Tensor


@torch.no_grad()
def ask(source: Source, queries: Queries, other: Tensor, known: KnownAnswers | None, *, ties: Ties, k: int) -> Asked:
    """Rank and score queries in one pass over the files of a model, a block of rows in memory at a time.

    The ranks are those of `evaluate.ranks_of`. other: [Q] an entity each, to be scored beside the answer.
    known: answers that do not compete, None: all do (`raw`).
    """
    relation = torch.cat(list(source.relation.blocks()))
    dtype, config = relation.dtype, source.config
    rowless = ShardedTable(relation.new_empty(0, source.scorer.entity_size), 0, Ranks(), dtype)
    model = Model(source.scorer, rowless, relation, int(config["num_relations"]), bool(config["reciprocal"]))
    anchor, answer, others = (source.entity.rows(ids).to(dtype) for ids in (queries.anchor, queries.answer, other))
    rows = relation[model.relation_ids(queries)]
    own = model.answer_scores(queries, anchor, rows, answer)
    beside = model.answer_scores(queries, anchor, rows, others)
    projected = model.project(queries, anchor, rows)
    total = source.entity.shape[0]
    fixed = source.entity.rows(fixed_entities(total)).to(dtype)
    spread = spread_of(source.scorer.score_candidates(projected, fixed))
    high, low = (limit.unsqueeze(1) for limit in thresholds(own, spread))
    q = torch.arange(len(own))
    query, entity = (q[:0], q[:0]) if known is None else known.pairs(queries)
    at_most, below = torch.zeros(2, len(own), dtype=torch.float64)
    scores, ids = own.new_empty(len(own), 0), queries.anchor.new_empty(len(own), 0)
    for lo, block in _blocks(source.entity, len(own)):
        z = source.scorer.score_candidates(projected, block.to(dtype))
        hi = lo + len(block)
        here = (entity >= lo) & (entity < hi)
        z[query[here], entity[here] - lo] = -torch.inf
        mine = (queries.answer >= lo) & (queries.answer < hi)
        at = q[mine], queries.answer[mine] - lo
        z[at] = -torch.inf  # an answer does not compete with itself
        at_most += (z <= high).sum(1)
        below += (z < low).sum(1)
        z[at] = own[mine]  # but may be among the best
        numbers = torch.arange(lo, hi).expand(len(own), -1)
        scores, ids = best(torch.cat([scores, z], 1), torch.cat([ids, numbers], 1), k)
    rank = unsound_last(rank_of_counts(total - at_most, total - below, ties), own, queries, total, known)
    return Asked(own, beside, rank, scores, ids)


def _blocks(table: Table, queries: int) -> Iterator[tuple[int, Tensor]]:
    # The first row's number, and the rows.
    width = max(1, SCORES_AT_ONCE // max(1, queries))
    start = 0
    for block in table.blocks():
        for piece in block.split(width):
            yield start, piece
            start += len(piece)
