"""Batches, negatives, and what is left out of them."""

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.data.filters import KnownAnswers, Queries, both_sides
from distkgd.data.sampling import Batch, LeftOut, Sampler, Sides, excluded_from_groups, excluded_from_shared
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from tests.jobs import every_query, queries_of, toy_inputs
from tests.toys import toy_graph

GRAPH = toy_graph(entities=13, relations=4, triples=160)
SIDES: tuple[Sides, ...] = ("both", "uniform", "bernoulli")
EVERY_SIDES = pytest.mark.parametrize("sides", SIDES)


def sampler(
    batch_size: int = 10, sides: Sides = "both", seed: int = 0, train: Tensor = GRAPH.train, **more: Any
) -> Sampler:
    return Sampler(
        train, GRAPH.num_entities, GRAPH.num_relations, batch_size=batch_size, sides=sides, seed=seed, **more
    )


def listed(batch: Batch) -> list[list[int]]:
    return batch.triples.tolist()


# -- batches --------------------------------------------------------------------------------------------------------


@EVERY_SIDES
def test_a_batch_is_a_pure_function_of_seed_and_step(sides: Sides) -> None:
    one = sampler(sides=sides)
    in_order = [one.batch(step) for step in range(40)]
    for step in (39, 3, 17, 0, 17):
        for other in (one, sampler(sides=sides)):
            again = other.batch(step)
            assert torch.equal(again.triples, in_order[step].triples)
            assert all(torch.equal(a, b) for a, b in zip(again.queries, in_order[step].queries, strict=True))
            assert (again.step, again.size, again.offset) == (step, 10, 0)


@EVERY_SIDES
def test_another_seed_gives_other_batches(sides: Sides) -> None:
    one, other = (sampler(sides=sides, seed=seed).batch(0) for seed in (0, 1))
    assert not torch.equal(one.triples, other.triples)
    if sides != "both":
        assert not torch.equal(one.queries.side, other.queries.side)


@pytest.mark.parametrize("batch_size", [1, 10, 64, len(GRAPH.train)])
def test_every_pass_visits_each_triple_once_and_in_an_order_of_its_own(batch_size: int) -> None:
    made = sampler(batch_size)
    n, passes = len(GRAPH.train), 3
    stream = [row for step in range(-(-passes * n // batch_size)) for row in listed(made.batch(step))]
    everything = sorted(GRAPH.train.tolist())
    orders = [stream[epoch * n : (epoch + 1) * n] for epoch in range(passes)]
    for order in orders:
        assert sorted(order) == everything
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_batch_that_crosses_the_end_of_a_pass_is_full_and_goes_on_with_the_next() -> None:
    n = len(GRAPH.train)
    assert n % 10 != 0, "otherwise no batch crosses"
    step = n // 10
    crossing, ones = sampler(10).batch(step), sampler(1)
    assert len(crossing.triples) == 10
    assert listed(crossing) == [listed(ones.batch(position))[0] for position in range(10 * step, 10 * step + 10)]
    assert sampler(10).steps_per_epoch == step + 1 and sampler(n).steps_per_epoch == 1


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("batch_size", [1, 10, 64])
def test_a_pass_leaves_out_a_share_which_quizzes_go_round(batch_size: int, anew: bool) -> None:
    made = sampler(batch_size, left_out=LeftOut(0.1, anew))
    m = math.ceil(0.1 * len(GRAPH.train))
    n = len(GRAPH.train) - m
    assert made.num_left_out == m and made.steps_per_epoch == math.ceil(n / batch_size)
    stream = [row for step in range(math.ceil(3 * n / batch_size)) for row in listed(made.batch(step))]
    left = []
    for turn in range(3):
        trained = stream[turn * n : (turn + 1) * n]
        left.append(sorted(row for row in GRAPH.train.tolist() if row not in trained))
        assert len({tuple(row) for row in trained}) == n and len(left[-1]) == m
        begins = math.ceil(turn * n / batch_size)  # the first step that begins in this pass
        assert sorted(listed(made.quizzes(m).batch(begins))) == left[-1]
    assert (left[0] == left[1] == left[2]) is not anew


def test_quizzes_take_up_where_the_last_one_ended() -> None:
    made = sampler(1, left_out=LeftOut(0.1))
    m = made.num_left_out
    assert m % 4 != 0, "otherwise no quiz begins anew in its midst"
    order = listed(made.quizzes(m).batch(0))
    found = [row for step in range(m) for row in listed(made.quizzes(4).batch(step))]
    assert found == order * 4


@pytest.mark.parametrize("size", [0, 17])
def test_quizzes_larger_than_what_is_left_out_are_refused(size: int) -> None:
    assert math.ceil(0.1 * len(GRAPH.train)) < 17
    with pytest.raises(ConfigError, match=f"quizzes of {size} triples: passes leave out"):
        sampler(left_out=LeftOut(0.1)).quizzes(size)


def test_both_sides_of_every_triple_are_asked() -> None:
    batch = sampler().batch(4)
    expected = both_sides(batch.triples)
    assert batch.sides == 2 and batch.num_queries == 20
    assert all(torch.equal(a, b) for a, b in zip(batch.queries, expected, strict=True))


@pytest.mark.parametrize("sides", ["uniform", "bernoulli"])
def test_a_drawn_side_asks_for_one_end_of_every_triple(sides: Sides) -> None:
    batch = sampler(50, sides).batch(1)
    assert batch.sides == 1 and batch.num_queries == 50 and set(batch.queries.side.tolist()) == {0, 1}
    for (head, relation, tail), anchor, r, side, answer in zip(
        listed(batch), *(column.tolist() for column in batch.queries), strict=True
    ):
        assert (anchor, answer) == ((head, tail) if side == 0 else (tail, head)) and r == relation


def naive_head_probability(train: Tensor) -> dict[int, float]:
    """tph / (tph + hpt) of each relation (Wang et al. 2014, section 3)."""
    out = {}
    for relation in set(train[:, 1].tolist()):
        tails: dict[int, set[int]] = {}
        heads: dict[int, set[int]] = {}
        for h, r, t in train.tolist():
            if r == relation:
                tails.setdefault(h, set()).add(t)
                heads.setdefault(t, set()).add(h)
        per_head = sum(map(len, tails.values())) / len(tails)
        per_tail = sum(map(len, heads.values())) / len(heads)
        out[relation] = per_head / (per_head + per_tail)
    return out


def test_bernoulli_asks_for_the_head_as_often_as_the_statistics_say() -> None:
    # Relation 0: one head with many tails; relation 1: the reverse; relation 2: one to one; relation 3: never.
    rows = [[0, 0, t] for t in range(1, 10)] + [[h, 1, 0] for h in range(1, 5)] + [[i, 2, i + 1] for i in range(7)]
    train = torch.tensor(rows)
    expected = naive_head_probability(train)
    assert expected == pytest.approx({0: 0.9, 1: 0.2, 2: 0.5})
    for sides in ("bernoulli", "uniform"):
        made = sampler(len(train), sides, train=train)  # type: ignore[arg-type]
        asked: Counter[int] = Counter()
        steps = 400
        for step in range(steps):
            queries = made.batch(step).queries
            asked.update(queries.relation[queries.side == 1].tolist())
        for relation, number in Counter(train[:, 1].tolist()).items():
            share = asked[relation] / (steps * number)
            assert share == pytest.approx(expected[relation] if sides == "bernoulli" else 0.5, abs=0.04)


def test_bernoulli_statistics_of_a_random_graph_are_those_of_sets() -> None:
    made = sampler(sides="bernoulli")
    assert made._head_probability is not None
    found = dict(enumerate(made._head_probability.tolist()))
    assert found == pytest.approx(naive_head_probability(GRAPH.train))


@pytest.mark.parametrize("batch_size", [0, -1, len(GRAPH.train) + 1])
def test_a_batch_size_that_does_not_fit_is_refused_with_the_number_of_triples(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size={batch_size} does not fit {len(GRAPH.train)} training triples"):
        sampler(batch_size)


# -- parts ----------------------------------------------------------------------------------------------------------


@EVERY_SIDES
def test_parts_are_slices_that_remember_where_they_are(sides: Sides) -> None:
    whole = sampler(12, sides).batch(5)
    parts = [whole.part(0, 5), whole.part(5, 6), whole.part(6, 6), whole.part(6, 12)]
    assert torch.cat([part.triples for part in parts]).tolist() == listed(whole)
    assert torch.cat([part.query_index() for part in parts]).tolist() == list(range(12 * whole.sides))
    for i, column in enumerate(whole.queries):
        assert torch.equal(torch.cat([part.queries[i] for part in parts]), column)
    assert all((part.num_queries, part.step) == (whole.num_queries, 5) for part in parts)
    nested = whole.part(2, 10).part(3, 7)
    assert nested.offset == 5 and listed(nested) == listed(whole)[5:9]
    assert torch.equal(nested.query_index(), whole.query_index()[5 * whole.sides : 9 * whole.sides])


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_the_parts_of_an_accumulated_batch_make_up_the_batch(accumulate: int) -> None:
    input_builder = toy_inputs(GRAPH, kind="triple", batch_size=12)
    whole, parts = input_builder.sampler.batch(3), input_builder.parts(3, accumulate)
    assert [len(part.triples) for part in parts] == [12 // accumulate] * accumulate
    assert torch.cat([part.triples for part in parts]).tolist() == listed(whole)


@pytest.mark.parametrize(("kind", "sides"), list(product(["chunk", "triple"], ["both", "uniform"])))
def test_the_negatives_of_a_part_are_its_share_of_the_whole_batchs(kind: str, sides: Sides) -> None:
    input_builder = toy_inputs(GRAPH, kind=kind, sides=sides, num=7, chunk=3, batch_size=12)  # type: ignore[arg-type]
    (whole,) = (input_builder.drawn(part) for part in input_builder.parts(3, 1))
    shares = [input_builder.drawn(part) for part in input_builder.parts(3, 4)]
    groups = 4 if kind == "chunk" else 12 * (2 if sides == "both" else 1)
    assert whole is not None and whole.shape == (groups, 7)
    assert torch.equal(torch.cat([share for share in shares if share is not None]), whole)


# -- negatives ------------------------------------------------------------------------------------------------------


def test_shared_negatives_are_a_pure_function_of_seed_and_step() -> None:
    made = sampler()
    first = made.negatives(4, 50)[0]
    assert torch.equal(made.negatives(4, 50)[0], first) and torch.equal(sampler().negatives(4, 50)[0], first)
    assert torch.equal(made.negatives(4, 20)[0], first[:20])
    assert not torch.equal(made.negatives(5, 50)[0], first)
    assert not torch.equal(sampler(seed=1).negatives(4, 50)[0], first)


def test_a_group_draws_the_same_negatives_whoever_asks() -> None:
    made = sampler()
    whole = made.negatives(4, 6, 0, 9)
    for first, groups in ((0, 1), (3, 4), (8, 1), (5, 0)):
        assert torch.equal(made.negatives(4, 6, first, groups), whole[first : first + groups])
    assert len({tuple(row) for row in whole.tolist()}) == 9


def test_negatives_are_spread_evenly_over_all_entities() -> None:
    made = sampler()
    counts = torch.zeros(GRAPH.num_entities)
    for step in range(20):
        shared, grouped = made.negatives(step, 500)[0], made.negatives(step, 20, 10, 25)
        for drawn in (shared, grouped):
            counts += torch.bincount(drawn.reshape(-1), minlength=GRAPH.num_entities)
    expected = counts.sum() / GRAPH.num_entities
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 33  # 12 degrees of freedom: exceeded once in 1000


# -- left out -------------------------------------------------------------------------------------------------------

CANDIDATES = {
    "all": None,
    "drawn": [0, 0, 2, 3, 3, 3, 7, 11, 12],
    "none": [],
}
HELD_OUT = GRAPH.test[:6]


def left_out(queries: Queries, filtered: bool) -> list[set[int]]:
    """Per query, the entities that must not be its candidates."""
    known = every_query(GRAPH.train)
    columns = [column.tolist() for column in queries]
    return [
        {answer} | (set(known.get((anchor, relation, side), [])) if filtered else set())
        for anchor, relation, side, answer in zip(*columns, strict=True)
    ]


def asked(held_out: bool) -> Queries:
    return both_sides(HELD_OUT if held_out else GRAPH.train[:15])


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("held_out", [False, True], ids=["training triples", "held-out triples"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_pairs_left_out_of_shared_candidates_are_the_own_and_the_known_answers(
    candidates: str, filtered: bool, held_out: bool, world: int
) -> None:
    queries = asked(held_out)
    known = KnownAnswers(GRAPH.train, GRAPH.num_entities) if filtered else None
    entities = CANDIDATES[candidates]
    expected = left_out(queries, filtered)
    for rank in range(world):
        lo, hi = Ranks(rank, world).share(GRAPH.num_entities)
        mine = list(range(lo, hi)) if entities is None else [e for e in entities if lo <= e < hi]
        given = None if entities is None else torch.tensor(mine, dtype=torch.int64)
        query, candidate = excluded_from_shared(queries, given, lo, hi, known)
        assert candidate.tolist() == sorted(candidate.tolist())
        found = set(zip(query.tolist(), candidate.tolist(), strict=True))
        assert found == {(i, j) for i, never in enumerate(expected) for j, e in enumerate(mine) if e in never}


def test_these_candidates_hold_answers_more_than_once() -> None:
    drawn = CANDIDATES["drawn"]
    assert drawn is not None
    hits = [sum(e in never for e in drawn) for never in left_out(asked(False), True)]
    assert max(hits) > 3 and any(drawn.count(int(answer)) == 3 for answer in asked(False).answer)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("held_out", [False, True], ids=["training triples", "held-out triples"])
@pytest.mark.parametrize("groups", [1, 3, 6, 12])
def test_the_mask_of_grouped_negatives_marks_the_own_and_the_known_answers(
    filtered: bool, held_out: bool, groups: int
) -> None:
    queries = Queries(*(column[:12] for column in asked(held_out)))
    known = KnownAnswers(GRAPH.train, GRAPH.num_entities) if filtered else None
    negatives = sampler().negatives(2, 20, 0, groups)
    expected = left_out(queries, filtered)
    per_group = 12 // groups
    found = excluded_from_groups(queries, negatives, GRAPH.num_entities, known)
    assert found.tolist() == [
        [[e in expected[g * per_group + i] for e in negatives[g].tolist()] for i in range(per_group)]
        for g in range(groups)
    ]
    assert found.any() and not found.all()


def test_no_queries_leave_nothing_out() -> None:
    nobody = queries_of([])
    for known in (None, KnownAnswers(GRAPH.train, GRAPH.num_entities)):
        query, candidate = excluded_from_shared(nobody, None, 0, GRAPH.num_entities, known)
        assert len(query) == len(candidate) == 0


@pytest.mark.parametrize("known", [None, KnownAnswers(GRAPH.train, GRAPH.num_entities)], ids=["raw", "filtered"])
def test_no_groups_have_an_empty_mask(known: KnownAnswers | None) -> None:
    found = excluded_from_groups(queries_of([]), torch.zeros(0, 20).long(), GRAPH.num_entities, known)
    assert len(found) == 0 and found.shape[-1] == 20 and found.dtype == torch.bool
