"""What several test files share: the naive side of their comparisons, and functions that rank processes import.

The naive side spells every query out: its negatives are a plain list of entities, its scores come one query at a time
from formulas written here, and nothing in it knows of tables, shards, fields or reductions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.data import Graph
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.data.sampling import Kind, Sampler, Sides
from distkgd.data.step_inputs import StepInputBuilder
from distkgd.distributed.optim.dense import DenseOptimizer, begin_reducing
from distkgd.distributed.optim.rows import RowOptimizer, clip_factor
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.candidate_layout import CandidateLayout, PairScores
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce, reduce_over_candidates
from distkgd.distributed.reductions.partials import Count, LogSumExp, Partial, SoftmaxMean, Sum
from distkgd.distributed.tables import ShardedTable, plan_route
from distkgd.evaluation.ranking import ranks_of
from distkgd.methods import Setup
from distkgd.models.model import Model, new_model
from distkgd.scorers import build_scorer

# -- step inputs and models
# ----------------------------------------------------------------------------------------------


def toy_inputs(
    graph: Graph,
    *,
    kind: Kind,
    num: int = 30,
    chunk: int = 4,
    batch_size: int = 12,
    sides: Sides = "both",
    filtered: bool = False,
    labels: bool = False,
) -> StepInputBuilder:
    """Inputs of the whole batch on one rank."""
    sampler = Sampler(graph.train, graph.num_entities, graph.num_relations, batch_size=batch_size, sides=sides, seed=3)
    known = KnownAnswers(graph.train, graph.num_entities)
    return StepInputBuilder(
        sampler, known, Ranks(), kind=kind, num=num, chunk=chunk, filtered=filtered, label_shares=labels
    )


def toy_setup(graph: Graph) -> Setup:
    """Of a stage whose method asks for nothing of it."""
    return Setup(1, 1, lambda dim, _name: toy_model(graph, dim=dim), toy_inputs(graph, kind="all"))


def toy_model(
    graph: Graph,
    scorer: str = "complex",
    dim: int = 6,
    *,
    reciprocal: bool = True,
    seed: int = 0,
    margin: float | None = None,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float64,
) -> Model:
    """An untrained model whose scores are spread over several units, ready to take gradients."""
    model = new_model(
        build_scorer(scorer, dim, margin),
        graph.num_entities,
        graph.num_relations,
        ranks or Ranks(),
        reciprocal=reciprocal,
        seed=seed,
        init_scale=0.8,
        dtype=dtype,
    )
    model.relation.mul_(0.8 / model.relation.std())
    model.relation.requires_grad_(True)
    return model


def entity_gradient(model: Model) -> Tensor:
    """[entities, dim] what backward left in everything that was opened of a one-rank model."""
    out = torch.zeros_like(model.entity.weight)
    for rows in model.entity.opened:
        found = rows.gradient()
        if found is not None:
            touched = torch.arange(len(out)) if found[0] is None else found[0]
            out.index_add_(0, touched, found[1])
    return out


def asked(ask: LossRequest) -> Tensor:
    """What one ask alone is answered."""
    found: Tensor = reduce_over_candidates({"": ask})[""]
    return found


# -- the naive side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One query in plain numbers. negatives: its other candidates, repeats kept. known: all its training answers."""

    anchor: int
    relation: int
    side: int
    answer: int
    negatives: list[int]
    known: set[int]


def spelled_out(input_builder: StepInputBuilder, step: int) -> list[Asked]:
    """Every query of the global batch of `step`: its candidates less its own answer, less, if filtered, known ones."""
    sampler = input_builder.sampler
    train = [tuple(triple) for triple in sampler.train.tolist()]
    batch = sampler.batch(step)
    out: list[Asked] = []
    for i, (head, relation, tail) in enumerate(batch.triples.tolist()):
        for side in (0, 1) if sampler.sides == "both" else (int(batch.queries.side[i]),):
            if input_builder.kind == "all":
                pool = list(range(sampler.num_entities))
            elif input_builder.kind == "batch":
                pool = sampler.negatives(step, input_builder.num)[0].tolist()
            else:
                group = i // input_builder.chunk if input_builder.kind == "chunk" else len(out)
                pool = sampler.negatives(step, input_builder.num, group, 1)[0].tolist()
            anchor, answer = (head, tail) if side == 0 else (tail, head)
            if side == 0:
                known = {t for h, r, t in train if h == anchor and r == relation}
            else:
                known = {h for h, r, t in train if t == anchor and r == relation}
            left_out = {answer} | (known if input_builder.filtered else set())
            out.append(Asked(anchor, relation, side, answer, [e for e in pool if e not in left_out], known))
    return out


class NaiveModel:
    """A copy of a model's tables with gradients of its own, and the papers' formulas for whole rows."""

    def __init__(self, model: Model) -> None:
        self.scorer, self.reciprocal, self.num_relations = model.scorer, model.reciprocal, model.num_relations
        self.entity = model.entity.weight.detach().clone().requires_grad_()
        self.relation = model.relation.detach().clone().requires_grad_()

    def head_tail(self, asked: Asked, entities: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows of the true head and tail when `entities` complete the query, one of them a single row."""
        given, found = self.entity[asked.anchor], self.entity[torch.tensor(entities, dtype=torch.int64)]
        return (given, found) if asked.side == 0 else (found, given)

    def relation_row(self, asked: Asked) -> Tensor:
        """The row of the query's relation, or of its inverse."""
        return self.relation[asked.relation + (self.num_relations if self.reciprocal and asked.side else 0)]

    def scores(self, asked: Asked, entities: Sequence[int]) -> Tensor:
        """[n]: scores of the triples that `entities` make of the query."""
        h, t = self.head_tail(asked, entities)
        if self.reciprocal and asked.side:
            h, t = t, h
        r = self.relation_row(asked)
        if self.scorer.name == "distmult":
            return (h * r * t).sum(-1)
        if self.scorer.name == "transe":
            return self.scorer.margin - (h + r - t).abs().sum(-1)
        assert self.scorer.name == "complex"
        h, r, t = (torch.complex(x[..., 0::2], x[..., 1::2]) for x in (h, r, t))
        return (h * r * t.conj()).sum(-1).real

    def own(self, asked: Asked) -> Tensor:
        """[]: the score of the query's own answer."""
        return self.scores(asked, [asked.answer])[0]

    def others(self, asked: Asked) -> Tensor:
        """[n]: the scores of its negatives."""
        return self.scores(asked, asked.negatives)


def assert_same_gradients(model: Model, naive: NaiveModel) -> None:
    """The real model's gradients are those of the naive one, which must not be all zero.

    Squared distances that are expanded into products lose some digits, and more near the edge of the ball.
    """
    close = {"rtol": 1e-8, "atol": 2e-9} if model.scorer.biases else {"rtol": 1e-9, "atol": 1e-11}
    assert naive.entity.grad is not None and naive.entity.grad.abs().max() > 0
    assert naive.relation.grad is not None and model.relation.grad is not None
    torch.testing.assert_close(entity_gradient(model), naive.entity.grad, **close)
    torch.testing.assert_close(model.relation.grad, naive.relation.grad, **close)


# -- run on ranks: score rows ---------------------------------------------------------------------------------------


def dot(queries: Tensor, rows: Tensor) -> Tensor:
    """[..., Q, n] inner products."""
    return queries @ rows.mT


def closeness(queries: Tensor, rows: Tensor) -> Tensor:
    """[..., Q, n] 1 - squared distances."""
    return 1.0 - (queries.unsqueeze(-2) - rows.unsqueeze(-3)).square().sum(-1)


def every_partial(z: Tensor, other: Tensor, threshold: Tensor) -> dict[str, Partial]:
    """One of each kind of partial sum; the two-column one stands in the middle."""
    return {
        "sum": Sum(F.softplus(z - threshold)),
        "count": Count(z > threshold),
        "mean": SoftmaxMean(0.7 * z, (z - other).square()),
        "lse": LogSumExp(1.3 * other),
    }


PARTIALS = ("sum", "count", "mean", "mean.lse", "lse")


@dataclass(frozen=True)
class RowsCase:
    """queries [Q, a], candidates [N, a], thresholds [Q], weights [Q, partials], pairs ([p, 2] query, candidate)."""

    queries: Tensor
    candidates: Tensor
    thresholds: Tensor
    weights: Tensor
    pairs: Tensor


def reduce_on_ranks(
    ranks: Ranks, case: RowsCase, cuts: Sequence[int], block_numbers: int | None = None, only: str | None = None
) -> dict[str, Tensor]:
    """This rank's partials and gradients; it owns queries by even shares, and candidates cuts[rank] … cuts[rank + 1].

    only: the one partial to ask for, by its name in `every_partial`; its values then stand alone in "values".
    """
    bounds = ranks.bounds(len(case.queries))
    lo, hi = cuts[ranks.rank], cuts[ranks.rank + 1]
    mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    queries, thresholds = (x[mine].clone().requires_grad_() for x in (case.queries, case.thresholds))
    rows = case.candidates[lo:hi].clone().requires_grad_()
    pairs = case.pairs[(case.pairs[:, 1] >= lo) & (case.pairs[:, 1] < hi)]
    pairs = pairs[torch.sort(pairs[:, 1], stable=True).indices]
    layout = CandidateLayout(
        ranks,
        counts=[stop - start for start, stop in pairwise(bounds)],
        num_candidates=hi - lo,
        excluded=(pairs[:, 0], pairs[:, 1] - lo),
        block_numbers=block_numbers,
    )
    fields = [PairScores(layout, score_candidates, queries, rows) for score_candidates in (dot, closeness)]

    def asked(*scores: Tensor) -> dict[str, Partial]:
        return {name: partial for name, partial in every_partial(*scores).items() if only in (None, name)}

    got = reduce(asked, *fields, per_query=(thresholds,))
    names = [name for name in PARTIALS if name in got]
    values = torch.stack([got[name] for name in names], 1)
    weights = case.weights[mine][:, [PARTIALS.index(name) for name in names]]
    # The thresholds' own square stands for all the rest of a loss that does not pass through the candidates.
    ((values * weights).sum() + thresholds.square().sum()).backward()
    blocks = len(layout.blocks(len(case.queries)))
    gradients = {"queries": queries, "thresholds": thresholds, "rows": rows}
    return {"values": values.detach(), "blocks": torch.tensor([blocks])} | {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in gradients.items()
    }


# -- run on ranks: tables and optimisers ----------------------------------------------------------------------------


def look_up_on_ranks(
    ranks: Ranks, weight: Tensor, ids: Sequence[list[int]], factors: Sequence[Tensor], candidates: list[int] | None
) -> dict[str, Tensor]:
    """Rows of ids[rank] and this shard's gradient, first and second, of sum(factors * sin(rows)).

    factors: per rank [len(ids[rank]), dim]. candidates: global ids that are candidates, or None for all.
    """
    lo, hi = ranks.share(len(weight))
    table = ShardedTable(weight[lo:hi].clone(), len(weight), ranks)
    local = None if candidates is None else torch.tensor([e - lo for e in candidates if lo <= e < hi]).long()
    mine = torch.tensor(ids[ranks.rank], dtype=torch.int64)
    opened = table.open(plan_route(mine, local, len(weight), ranks), grad=True)
    rows = opened.lookup([len(mine)])[0]
    value = (factors[ranks.rank] * rows.sin()).sum()
    (first,) = torch.autograd.grad(value, opened.leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), opened.leaf)
    touched = opened.route.touched
    return {
        "rows": rows.detach(),
        "first": torch.zeros(hi - lo, weight.shape[1], dtype=weight.dtype).index_copy(0, touched, first.detach()),
        "second": torch.zeros(hi - lo, weight.shape[1], dtype=weight.dtype).index_copy(0, touched, second),
        "candidates": opened.candidates().detach(),
        "touched": touched + lo,
    }


def optimise_on_ranks(
    ranks: Ranks, weight: Tensor, small: Tensor, steps: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Rows, replicated tensor and clip factors after some steps of one optimiser.

    Each step: parts, a list of (ids, row gradients) whose ids are looked up together and may repeat over parts, or
    (None, [entities, dim]) for all rows; small, the gradient of the replicated tensor; scale; limit of the norm.
    The row gradients and that of the replicated tensor are split evenly over ranks, each rank bringing its share.
    """
    lo, hi = ranks.share(len(weight))
    table = ShardedTable(weight[lo:hi].clone(), len(weight), ranks)
    small = small.clone().requires_grad_()
    optimizer = RowOptimizer(options["name"], table, lr=options["lr"], **options.get("more", {}))
    dense = DenseOptimizer(options["name"], {"small": small}, lr=options["small_lr"])
    clips = []
    for step in steps:
        for ids, gradient in step["parts"]:
            if ids is None:
                opened = table.open(plan_route(torch.zeros(0).long(), None, len(weight), ranks), grad=True)
                opened.candidates().backward(gradient[lo:hi])
                continue
            cut = slice(*ranks.share(len(ids)))
            route = plan_route(ids[cut], torch.zeros(0).long(), len(weight), ranks)
            table.open(route, grad=True).lookup([len(ids[cut])])[0].backward(gradient[cut])
        if step.get("small") is not None:
            small.grad = step["small"] * (ranks.rank + 1) / sum(range(1, ranks.world + 1))
        begin_reducing([dense], ranks, torch.zeros(0))()
        clips.append(clip_factor([optimizer], [small], step.get("limit", 0.0), ranks))
        optimizer.step(step.get("scale", 1.0), clips[-1])
        dense.step(step.get("scale", 1.0), clips[-1])
    state = {key: value.clone() for key, value in optimizer.state.items()}
    return {"rows": table.weight.clone(), "small": small.detach().clone(), "clips": clips, "state": state}


# -- run on ranks: evaluation ---------------------------------------------------------------------------------------


def rank_on_ranks(
    ranks: Ranks,
    graph: Graph,
    options: Mapping[str, Any],
    tables: tuple[Tensor, Tensor],
    protocol: Mapping[str, Any],
    scores_at_once: int,
    triples_at_once: int = 512,
) -> Tensor:
    """[n, 2]: ranks of the graph's test triples by the model of these whole tables."""
    entity, relation = tables
    model = toy_model(graph, ranks=ranks, **options)
    model.entity.weight.copy_(entity[model.entity.lo : model.entity.hi])
    model.relation = relation
    everything = torch.cat([graph.train, graph.valid, graph.test])
    with (
        patch("distkgd.evaluation.ranking.SCORES_AT_ONCE", scores_at_once),
        patch("distkgd.evaluation.ranking.TRIPLES_AT_ONCE", triples_at_once),
    ):
        return ranks_of(model, graph.test, KnownAnswers(everything, graph.num_entities), ranks, **protocol)


# -- plain Python ---------------------------------------------------------------------------------------------------


def queries_of(rows: Sequence[tuple[int, int, int, int]]) -> Queries:
    """(anchor, relation, side, answer) rows as Queries."""
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return Queries(*columns)


def every_query(train: Tensor) -> dict[tuple[int, int, int], list[int]]:
    """(anchor, relation, side) -> its answers, for both directions of every triple."""
    out: dict[tuple[int, int, int], list[int]] = {}
    for head, relation, tail in train.tolist():
        out.setdefault((head, relation, 0), []).append(tail)
        out.setdefault((tail, relation, 1), []).append(head)
    return out
