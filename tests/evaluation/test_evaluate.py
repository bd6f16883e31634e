"""Ranking against a loop over all entities in plain Python."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distkgd.data import Graph
from distkgd.data.filters import KnownAnswers, both_sides
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import (
    FIXED_ENTITIES,
    HITS,
    TIE_TOLERANCE,
    breakdown,
    metrics,
    protocol,
    ranks_and_ties_of,
    ranks_of,
    ranks_of_crops,
)
from distkgd.models.model import Model
from distkgd.scorers import SCORERS
from tests.jobs import every_query, rank_on_ranks, toy_model
from tests.ranks import run_on_ranks
from tests.scorers.naive import NAIVE
from tests.toys import toy_graph

GRAPH = toy_graph(entities=19, relations=3, triples=200)
EVERYTHING = torch.cat([GRAPH.train, GRAPH.valid, GRAPH.test])
TIES = {"realistic": 0.5, "optimistic": 0.0, "pessimistic": 1.0}
WHOLE = 1 << 22
# Every scorer with and, where it has head queries, without reciprocal relations.
FORMULAS = [(name, way) for name, scorer in SCORERS.items() for way in (True, False) if way or not scorer.tails_only]


def naive_score(model: Model, anchor: int, relation: int, side: int, entity: int) -> float:
    rows, relations = model.entity.weight.tolist(), model.relation.tolist()
    head, tail = (anchor, entity) if side == 0 else (entity, anchor)
    if model.reciprocal and side == 1:
        head, tail, relation = tail, head, relation + model.num_relations
    scorer = model.scorer
    return NAIVE[scorer.name](rows[head], relations[relation], rows[tail], scorer.margin, scorer.norm)


def naive_tolerance(scores: list[float], own: float) -> float:
    """Of a query's scores of all entities."""
    few = min(1024, len(scores))
    fixed = [scores[i * len(scores) // few] for i in range(few)]
    return max(1e-5 * (max(fixed) - min(fixed)), 16 * float(np.spacing(abs(own))))


def naive_ranks(model: Model, triples: Tensor, known: Tensor, ties: str, filter_: str) -> Tensor:
    answers = every_query(known)
    out = []
    for head, relation, tail in triples.tolist():
        pair = []
        for anchor, side, answer in ((head, 0, tail), (tail, 1, head)):
            scores = [naive_score(model, anchor, relation, side, entity) for entity in range(model.entity.total)]
            own = scores[answer]
            tolerance = naive_tolerance(scores, own)
            left_out = {answer, *(answers.get((anchor, relation, side), []) if filter_ == "filtered" else [])}
            rivals = [score for entity, score in enumerate(scores) if entity not in left_out]
            better = sum(score > own + tolerance for score in rivals)
            equal = sum(own - tolerance <= score <= own + tolerance for score in rivals)
            pair.append(1.0 + better + TIES[ties] * equal)
        out.append(pair)
    return torch.tensor(out, dtype=torch.float64)


def tables(model: Model) -> tuple[Tensor, Tensor]:
    return model.entity.weight.clone(), model.relation.detach().clone()


def tied_model(reciprocal: bool = True) -> Model:
    """Scores are small whole numbers, so most queries have ties."""
    model = toy_model(GRAPH, "distmult", 2, reciprocal=reciprocal)
    with torch.no_grad():
        model.entity.weight.copy_((2 * model.entity.weight).round().clamp(-1, 1))
        model.relation.copy_(model.relation.sign())
    return model


@pytest.mark.parametrize("filter_", ["filtered", "raw"])
@pytest.mark.parametrize(("scorer", "reciprocal"), FORMULAS)
def test_ranks_are_those_of_a_loop_over_all_entities(scorer: str, reciprocal: bool, filter_: str) -> None:
    model = toy_model(GRAPH, scorer, 4, reciprocal=reciprocal)
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    found = ranks_of(model, GRAPH.test, known, Ranks(), filter_=filter_)  # type: ignore[arg-type]
    expected = naive_ranks(model, GRAPH.test, EVERYTHING, "realistic", filter_)
    assert found.dtype == torch.float64 and torch.equal(found, expected)
    assert len({*expected.reshape(-1).tolist()}) > 5 and not torch.equal(expected[:, 0], expected[:, 1])


@pytest.mark.parametrize("filter_", ["filtered", "raw"])
@pytest.mark.parametrize("reciprocal", [True, False])
def test_ties_are_handled_as_they_are_called(reciprocal: bool, filter_: str) -> None:
    model = tied_model(reciprocal)
    found = {}
    for ties in TIES:
        known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
        found[ties] = ranks_of(model, GRAPH.test, known, Ranks(), ties=ties, filter_=filter_)  # type: ignore[arg-type]
        assert torch.equal(found[ties], naive_ranks(model, GRAPH.test, EVERYTHING, ties, filter_))
    assert torch.equal(found["realistic"], (found["optimistic"] + found["pessimistic"]) / 2)
    assert ((found["pessimistic"] - found["optimistic"]) > 1).any()


@pytest.mark.parametrize("filter_", ["filtered", "raw"])
def test_answers_are_tied_where_another_candidate_is_as_good(filter_: str) -> None:
    known, model = KnownAnswers(EVERYTHING, GRAPH.num_entities), tied_model()
    model.entity.weight[::2] += 0.01 * toy_model(GRAPH, "distmult", 2).entity.weight[::2]  # half of them tie no longer
    worst, best = (naive_ranks(model, GRAPH.test, EVERYTHING, ties, filter_) for ties in ("pessimistic", "optimistic"))
    for ties in TIES:
        rank, tied = ranks_and_ties_of(model, GRAPH.test, known, Ranks(), ties=ties, filter_=filter_)  # type: ignore[arg-type]
        assert torch.equal(tied, worst > best) and tied.any() and not tied.all()
        assert torch.equal(rank, ranks_of(model, GRAPH.test, known, Ranks(), ties=ties, filter_=filter_))  # type: ignore[arg-type]
    assert metrics(rank, tied) == metrics(rank) | {"tied": float((worst > best).double().mean())}
    assert metrics(rank[:0], tied[:0]) == metrics(rank[:0]) | {"tied": None}


def test_the_filter_takes_rivals_away() -> None:
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    model = toy_model(GRAPH)
    filtered, raw = (ranks_of(model, GRAPH.test, known, Ranks(), filter_=f) for f in ("filtered", "raw"))
    assert (filtered <= raw).all() and (filtered < raw).any()


def one_query(scores: list[float], size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[1] rank of entity 1 where the entities' scores are these times `size`; entity 0 is no candidate."""
    model = toy_model(toy_graph(entities=len(scores), relations=1, triples=20), "distmult", 1, dtype=dtype)
    with torch.no_grad():
        model.relation.fill_(size / scores[0])
        model.entity.weight[:, 0] = torch.tensor(scores, dtype=dtype)
    triples = torch.tensor([[0, 0, 1], [0, 0, 0]])
    return ranks_of(model, triples[:1], KnownAnswers(triples, len(scores)), Ranks())[0, :1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 0.01, 1.0, 1e4])
@pytest.mark.parametrize(("step", "rank"), [(0.0, 2.5), (0.5, 2.5), (-0.5, 2.5), (2.0, 4.0), (-2.0, 1.0)])
def test_scores_nearer_than_a_share_of_the_spread_are_equal(
    size: float, step: float, rank: float, dtype: torch.dtype
) -> None:
    close = 1.0 + step * TIE_TOLERANCE * 3.0
    assert one_query([1.0, 1.0, close, close, close, -2.0], size, dtype) == rank


@pytest.mark.parametrize(("ulps", "rank"), [(-17, 1.0), (-16, 1.5), (0, 1.5), (16, 1.5), (17, 2.0)])
def test_scores_a_few_units_in_the_last_place_apart_are_equal_however_narrow_the_spread(ulps: int, rank: float) -> None:
    assert one_query([1.0, 1.0, 1.0 + ulps * 2.0**-23]) == rank


def test_the_spread_is_that_of_entities_evenly_spaced_by_id() -> None:
    number = 2 * FIXED_ENTITIES
    scores = [1.0, 1.0 - 2e-5] + [0.5 + 0.1 * (i % 4 == 0) for i in range(2, number)]
    assert one_query(scores) == 1.0  # a spread of 0.5; entity 0 is no candidate
    scores[3], scores[5] = 1.0 - 1e-5, 1e3
    assert one_query(scores) == 3.0  # entity 5 is not among the fixed ones, and is better
    scores[4] = -1e3
    assert one_query(scores) == 2.5  # entity 4 is: now entity 3 is as good as the answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the compiled count, and without it
@pytest.mark.parametrize("filter_", ["filtered", "raw"])
@pytest.mark.parametrize("ties", TIES)
def test_scores_that_are_no_numbers_profit_nobody(ties: str, filter_: str, dtype: torch.dtype) -> None:
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    rules: Any = {"ties": ties, "filter_": filter_}
    model = toy_model(GRAPH, "distmult", 4, dtype=dtype)
    sound = ranks_of(model, GRAPH.test, known, Ranks(), **rules)
    triples, number = both_sides(GRAPH.test), GRAPH.num_entities
    answers = every_query(EVERYTHING)
    left_out = [
        {answer, *(answers[anchor, relation, side] if filter_ == "filtered" else [])}
        for anchor, relation, side, answer in zip(*(x.tolist() for x in triples), strict=True)
    ]
    last = torch.tensor([1.0 + number - len(left) for left in left_out]).reshape(-1, 2)
    row = model.entity.weight[7].clone()
    for value in (torch.nan, torch.inf, -torch.inf):
        model.entity.weight[7] = value  # infinities of both signs add up to NaN
        found = ranks_of(model, GRAPH.test, known, Ranks(), **rules)
        crops = ranks_of_crops(model, [1, 4], GRAPH.test, known, Ranks(), **rules)
        assert torch.equal(crops[4], found)
        touched = torch.stack([(triples.anchor == 7) | (triples.answer == 7)]).reshape(-1, 2)
        assert torch.equal(found[touched], last[touched].double()) and touched.any()
        assert torch.equal(crops[1][touched], last[touched].double())
        rival = torch.tensor([7 not in left for left in left_out]).reshape(-1, 2) & ~touched
        if math.isnan(value):  # it joins those that are better
            above = found[rival] - sound[rival]
            assert (above >= 0).all() and (above <= 1).all() and (above > 0).any()
    model.entity.weight[7] = row
    model.relation.data[:] = torch.nan
    assert torch.equal(ranks_of(model, GRAPH.test, known, Ranks(), **rules), last.double())


class Scaled:
    """A scorer whose scores are those of another one times a factor."""

    prefix_form = None

    def __init__(self, scorer: Any, factor: float) -> None:
        self._scorer, self._factor = scorer, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def crop(self, dim: int) -> "Scaled":
        return Scaled(self._scorer.crop(dim), self._factor)

    def score(self, *rows: Tensor) -> Tensor:
        return self._scorer.score(*rows) * self._factor

    def score_candidates(self, q: Tensor, c: Tensor) -> Tensor:
        return self._scorer.score_candidates(q, c) * self._factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the compiled count, and without it
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_times_a_positive_factor_rank_the_same(scorer: str, ties: str, dtype: torch.dtype) -> None:
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    model = toy_model(GRAPH, scorer, 4, reciprocal=True, dtype=dtype)
    model.entity.weight[1::3] = model.entity.weight[0:-1:3]  # rows that are alike tie
    plain = model.scorer
    found = {}
    for factor in (1.0, 2.0**-20, 2.0**20, 0.5, 1e-6, 0.37, 1e6):
        model.scorer = Scaled(plain, factor)  # type: ignore[assignment]
        whole = ranks_of(model, GRAPH.test, known, Ranks(), ties=ties)  # type: ignore[arg-type]
        crops = ranks_of_crops(model, [2, 4], GRAPH.test, known, Ranks(), ties=ties)  # type: ignore[arg-type]
        assert torch.equal(whole, crops[4])
        found[factor] = torch.stack([whole, crops[2]])
    for factor, ranks in found.items():
        assert torch.equal(ranks, found[1.0]), factor
    assert len(found[1.0].unique()) > 5


def test_a_model_whose_scores_are_all_equal_gets_the_mean_rank() -> None:
    model = toy_model(GRAPH)
    model.entity.weight.zero_()
    nothing_else = GRAPH.test[:1]
    known = KnownAnswers(nothing_else, GRAPH.num_entities)
    assert ranks_of(model, nothing_else, known, Ranks()).tolist() == [[10.0, 10.0]]  # (19 + 1) / 2
    assert ranks_of(model, nothing_else, known, Ranks(), ties="optimistic").tolist() == [[1.0, 1.0]]
    assert ranks_of(model, nothing_else, known, Ranks(), ties="pessimistic").tolist() == [[19.0, 19.0]]


def test_triples_with_entities_unseen_in_training_are_ranked_too() -> None:
    lonely = GRAPH.num_entities - 1
    train = GRAPH.train[(GRAPH.train[:, [0, 2]] != lonely).all(1)]
    test = torch.tensor([[lonely, 0, 3], [4, 1, lonely], [lonely, 2, lonely]])
    everything = torch.cat([train, test])
    model = toy_model(GRAPH)
    found = ranks_of(model, test, KnownAnswers(everything, GRAPH.num_entities), Ranks())
    assert torch.equal(found, naive_ranks(model, test, everything, "realistic", "filtered"))
    assert found.shape == (3, 2) and found.max() > 5


@pytest.mark.parametrize("filter_", ["filtered", "raw"])
def test_a_triple_that_the_filter_does_not_hold_is_no_rival_of_itself(filter_: str) -> None:
    model = toy_model(GRAPH)
    known = KnownAnswers(GRAPH.train, GRAPH.num_entities)
    found = ranks_of(model, GRAPH.test, known, Ranks(), filter_=filter_)  # type: ignore[arg-type]
    assert torch.equal(found, naive_ranks(model, GRAPH.test, GRAPH.train, "realistic", filter_))


# -- blocks and ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores_at_once", [1, 100, 700])
@pytest.mark.parametrize("triples_at_once", [1, 7])
def test_blocks_of_scores_and_of_triples_change_no_rank(
    monkeypatch: pytest.MonkeyPatch, scores_at_once: int, triples_at_once: int
) -> None:
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    for model in (toy_model(GRAPH), tied_model()):
        whole = ranks_of(model, GRAPH.test, known, Ranks())
        with monkeypatch.context() as small:
            small.setattr("distkgd.evaluation.ranking.SCORES_AT_ONCE", scores_at_once)
            small.setattr("distkgd.evaluation.ranking.TRIPLES_AT_ONCE", triples_at_once)
            assert torch.equal(ranks_of(model, GRAPH.test, known, Ranks()), whole)


def on_three_ranks(model: Model, graph: Graph = GRAPH, **more: Any) -> list[Tensor]:
    """What each finds; their shards are of different sizes, which those of two need not be."""
    options = {"scorer": model.scorer.name, "dim": model.scorer.dim, "reciprocal": model.reciprocal}
    arguments = {"protocol": {}, "scores_at_once": WHOLE} | more
    return run_on_ranks(3, rank_on_ranks, graph=graph, options=options, tables=tables(model), **arguments)


@pytest.mark.parametrize(("ties", "filter_"), list(product(TIES, ["filtered", "raw"])))
def test_any_number_of_ranks_finds_the_same_ranks(ties: str, filter_: str) -> None:
    model = tied_model()
    expected = naive_ranks(model, GRAPH.test, EVERYTHING, ties, filter_)
    for found in on_three_ranks(model, protocol={"ties": ties, "filter_": filter_}):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("scores_at_once", "triples_at_once"), [(1, 512), (40, 2), (450, 512), (WHOLE, 1)])
def test_any_number_of_ranks_may_work_in_blocks(scores_at_once: int, triples_at_once: int) -> None:
    """Shards of 6, 6 and 7 rows are cut into different numbers of blocks by some of these."""
    model = toy_model(GRAPH)
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    expected = ranks_of(model, GRAPH.test, known, Ranks())
    for found in on_three_ranks(model, scores_at_once=scores_at_once, triples_at_once=triples_at_once):
        assert torch.equal(found, expected)


def test_the_spread_is_the_same_on_any_number_of_ranks() -> None:
    graph = toy_graph(entities=1500, relations=3, triples=200)
    model = toy_model(graph, "distmult", 2)
    model.entity.weight[3] = 1e3 * model.entity.weight[2]  # of entity 3 the spread knows nothing
    model.entity.weight[5::2] = model.entity.weight[4:-1:2] * (1 + 1e-5)
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), 1500)
    expected = ranks_of(model, graph.test, known, Ranks())
    for found in on_three_ranks(model, graph):
        assert torch.equal(found, expected)


def test_no_triples_have_no_ranks() -> None:
    found = ranks_of(toy_model(GRAPH), GRAPH.test[:0], KnownAnswers(EVERYTHING, GRAPH.num_entities), Ranks())
    assert found.shape == (0, 2) and found.dtype == torch.float64


# -- numbers --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    found = metrics(torch.tensor([[1.0, 2.0], [3.0, 10.0], [10.5, 1.5]]))
    assert found == pytest.approx(
        {
            "mrr": (1 + 1 / 2 + 1 / 3 + 1 / 10 + 1 / 10.5 + 1 / 1.5) / 6,
            "hits_at_1": 1 / 6,
            "hits_at_3": 4 / 6,
            "hits_at_10": 5 / 6,
            "mean_rank": 28 / 6,
        }
    )
    assert HITS == (1, 3, 10)


def test_metrics_of_nothing_are_no_numbers() -> None:
    assert set(metrics(torch.zeros(0, 2)).values()) == {None}
    assert metrics(torch.zeros(0, 2)).keys() == metrics(torch.ones(1, 2)).keys()


def test_a_breakdown_by_hand() -> None:
    triples = torch.tensor([[0, 0, 1], [2, 1, 3], [4, 0, 5], [6, 3, 7]])
    rank = torch.tensor([[1.0, 4.0], [2.0, 2.0], [5.0, 10.0], [1.0, 20.0]], dtype=torch.float64)
    names = {0: "likes", 1: "has", 2: "never", 3: "eats"}
    found = breakdown(rank, triples, ["1-N", "N-N", "1-1", "1-N"], names)
    assert found["direction"]["tail"]["mrr"] == pytest.approx((1 + 0.5 + 0.2 + 1) / 4)
    assert found["direction"]["head"]["mrr"] == pytest.approx((0.25 + 0.5 + 0.1 + 0.05) / 4)
    assert found["category"].keys() == {"1-N", "N-N"}
    assert found["category"]["1-N"]["mrr"] == pytest.approx((1 + 0.25 + 0.2 + 0.1 + 1 + 0.05) / 6)
    assert found["category"]["1-N"]["num_triples"] == 3
    assert found["category"]["N-N"] == pytest.approx(metrics(torch.tensor([2.0, 2.0])) | {"num_triples": 1})
    assert found["relation"].keys() == {"likes", "has", "eats"}
    assert found["relation"]["likes"]["mean_rank"] == pytest.approx((1 + 4 + 5 + 10) / 4)
    assert found["relation"]["likes"]["num_triples"] == 2
    assert found["relation"]["eats"]["hits_at_1"] == 0.5


def test_the_protocol_says_how_the_numbers_were_made() -> None:
    said = protocol("optimistic", "raw")
    assert (said["ties"], said["filter"], said["candidates"], said["unseen"]) == ("optimistic", "raw", "all", "kept")
    assert said["tie_tolerance"] == TIE_TOLERANCE and protocol()["ties"] == "realistic"
