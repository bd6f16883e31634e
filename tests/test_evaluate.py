"""Ranking against a loop over all entities in plain Python."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.evaluate import HITS, TIE_TOLERANCE, breakdown, metrics, protocol, ranks_of
from distkgd.graph import Graph
from distkgd.graph.filters import KnownAnswers
from distkgd.model import Model
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


def naive_ranks(model: Model, triples: Tensor, known: Tensor, ties: str, filter_: str) -> Tensor:
    answers = every_query(known)
    out = []
    for head, relation, tail in triples.tolist():
        pair = []
        for anchor, side, answer in ((head, 0, tail), (tail, 1, head)):
            own = naive_score(model, anchor, relation, side, answer)
            tolerance = TIE_TOLERANCE * max(1.0, abs(own))
            better = equal = 0
            for entity in range(model.entity.total):
                if entity == answer:
                    continue
                if filter_ == "filtered" and entity in answers.get((anchor, relation, side), []):
                    continue
                score = naive_score(model, anchor, relation, side, entity)
                better += score > own + tolerance
                equal += own - tolerance <= score <= own + tolerance
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


def test_the_filter_takes_rivals_away() -> None:
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    model = toy_model(GRAPH)
    filtered, raw = (ranks_of(model, GRAPH.test, known, Ranks(), filter_=f) for f in ("filtered", "raw"))
    assert (filtered <= raw).all() and (filtered < raw).any()


@pytest.mark.parametrize("size", [0.01, 1.0, 1e4])
@pytest.mark.parametrize(("step", "rank"), [(0.0, 3.0), (0.5, 3.0), (-0.5, 3.0), (2.0, 5.0), (-2.0, 1.0)])
def test_scores_nearer_than_the_tolerance_are_equal_in_proportion_to_their_size_above_one(
    size: float, step: float, rank: float
) -> None:
    graph = toy_graph(entities=6, relations=1, triples=20)
    model = toy_model(graph, "distmult", 1)
    with torch.no_grad():
        model.relation.fill_(1.0)
        # The answer is entity 1; entities 2 … 5 are `step` tolerances above it.
        model.entity.weight[:, 0] = size + TIE_TOLERANCE * max(1.0, size) * step
        model.entity.weight[1, 0] = size
        model.entity.weight[0, 0] = 1.0
    triple = torch.tensor([[0, 0, 1], [0, 0, 0]])
    found = ranks_of(model, triple[:1], KnownAnswers(triple, 6), Ranks())
    assert found[0, 0] == rank


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
            small.setattr("distkgd.evaluate.SCORES_AT_ONCE", scores_at_once)
            small.setattr("distkgd.evaluate.TRIPLES_AT_ONCE", triples_at_once)
            assert torch.equal(ranks_of(model, GRAPH.test, known, Ranks()), whole)


def on_ranks(world: int, model: Model, graph: Graph = GRAPH, **more: Any) -> list[Tensor]:
    options = {"scorer": model.scorer.name, "dim": model.scorer.dim, "reciprocal": model.reciprocal}
    arguments = {"protocol": {}, "scores_at_once": WHOLE} | more
    return run_on_ranks(world, rank_on_ranks, graph=graph, options=options, tables=tables(model), **arguments)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("ties", "filter_"), list(product(TIES, ["filtered", "raw"])))
def test_any_number_of_ranks_finds_the_same_ranks(world: int, ties: str, filter_: str) -> None:
    model = tied_model()
    expected = naive_ranks(model, GRAPH.test, EVERYTHING, ties, filter_)
    for found in on_ranks(world, model, protocol={"ties": ties, "filter_": filter_}):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("scores_at_once", "triples_at_once"), [(1, 512), (40, 2), (450, 512), (WHOLE, 1)])
def test_any_number_of_ranks_may_work_in_blocks(world: int, scores_at_once: int, triples_at_once: int) -> None:
    """Shards of 9 and 10 rows, or 6, 6 and 7, are cut into different numbers of blocks by some of these."""
    model = toy_model(GRAPH)
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    expected = ranks_of(model, GRAPH.test, known, Ranks())
    for found in on_ranks(world, model, scores_at_once=scores_at_once, triples_at_once=triples_at_once):
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


def test_metrics_of_nothing_are_zero() -> None:
    assert set(metrics(torch.zeros(0, 2)).values()) == {0.0}
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
