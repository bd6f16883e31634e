"""Known answers against a plain dict."""

import pytest
import torch

from distkgd.data.filters import KnownAnswers, both_sides
from tests.jobs import every_query, queries_of
from tests.toys import toy_graph

GRAPH = toy_graph(entities=13, relations=4, triples=160)
KNOWN = every_query(GRAPH.train)
SOME = [(12, 3, 1, 0), (0, 0, 0, 5), (12, 3, 0, 0), (0, 0, 0, 5), (7, 2, 1, 1)]
ASKED = {
    "every query there is": [(anchor, r, side, 0) for anchor in range(13) for r in range(4) for side in (0, 1)],
    "some, one of them twice": SOME,
    "none": [],
}


def test_both_sides_asks_for_the_tail_then_for_the_head_of_each_triple() -> None:
    queries = both_sides(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert queries.anchor.tolist() == [1, 3, 4, 6]
    assert queries.relation.tolist() == [2, 2, 5, 5]
    assert queries.side.tolist() == [0, 1, 0, 1]
    assert queries.answer.tolist() == [3, 1, 6, 4]
    assert all(len(column) == 0 for column in both_sides(torch.zeros(0, 3).long()))


@pytest.mark.parametrize("asked", ASKED)
def test_counts_and_pairs_are_those_of_a_dict(asked: str) -> None:
    rows = ASKED[asked]
    expected = [sorted(KNOWN.get((anchor, relation, side), [])) for anchor, relation, side, _ in rows]
    answers = KnownAnswers(GRAPH.train, GRAPH.num_entities)
    queries = queries_of(rows)
    assert answers.counts(queries).tolist() == [len(found) for found in expected]
    query, entity = answers.pairs(queries)
    assert query.tolist() == [i for i, found in enumerate(expected) for _ in found]
    assert [sorted(entity[query == i].tolist()) for i in range(len(rows))] == expected


def test_some_queries_of_these_tests_have_many_answers_and_some_have_none() -> None:
    sizes = [len(KNOWN.get(row[:3], [])) for row in ASKED["every query there is"]]
    assert max(sizes) > 2 and min(sizes) == 0


def test_a_graph_without_triples_answers_nothing() -> None:
    answers = KnownAnswers(torch.zeros(0, 3).long(), 13)
    query, entity = answers.pairs(queries_of(SOME))
    assert answers.counts(queries_of(SOME)).tolist() == [0] * 5 and len(query) == len(entity) == 0


def test_entities_relations_and_sides_are_never_mixed_up() -> None:
    """One triple in a big vocabulary: no other query finds it."""
    answers = KnownAnswers(torch.tensor([[2, 1, 4]]), 5)
    found = {
        (anchor, relation, side): answers.pairs(queries_of([(anchor, relation, side, 0)]))[1].tolist()
        for anchor in range(5)
        for relation in range(3)
        for side in (0, 1)
    }
    assert {key: entities for key, entities in found.items() if entities} == {(2, 1, 0): [4], (4, 1, 1): [2]}


def test_a_vocabulary_too_big_for_one_number_per_answer_gives_the_same_answers() -> None:
    """Up to 2^63 a key and its answer are sorted as one number; beyond they are sorted apart."""
    triples = GRAPH.train.clone()
    triples[:, [0, 2]] += 2**33
    few, many = KnownAnswers(GRAPH.train, GRAPH.num_entities), KnownAnswers(triples, 2**34)
    assert few.tensors["answers"].dtype == torch.int32 and many.tensors["answers"].dtype == torch.int64
    queries = queries_of(ASKED["every query there is"])
    query, entity = few.pairs(queries)
    other_query, other_entity = many.pairs(queries._replace(anchor=queries.anchor + 2**33))
    assert torch.equal(other_query, query)
    assert sorted(zip(query.tolist(), entity.tolist(), strict=True)) == sorted(
        zip(query.tolist(), (other_entity - 2**33).tolist(), strict=True)
    )


@pytest.mark.parametrize("num_entities", [2**31, 2**31 + 1])
def test_the_last_entity_is_found_where_32_bits_just_hold_it_and_where_they_do_not(num_entities: int) -> None:
    last = num_entities - 1
    answers = KnownAnswers(torch.tensor([[last, 0, 0], [0, 0, last]]), num_entities)
    query, entity = answers.pairs(queries_of([(0, 0, 0, 0), (last, 0, 0, 0)]))
    assert (query.tolist(), entity.tolist(), entity.dtype) == ([0, 1], [last, 0], torch.int64)


def test_the_triples_are_left_as_they_were() -> None:
    triples = GRAPH.train.clone()
    KnownAnswers(triples, GRAPH.num_entities)
    assert torch.equal(triples, GRAPH.train)


def test_answers_made_from_tensors_share_their_memory() -> None:
    answers = KnownAnswers(GRAPH.train, GRAPH.num_entities)
    again = KnownAnswers.from_tensors(answers.tensors, GRAPH.num_entities)
    assert all(again.tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in answers.tensors.items())
    queries = queries_of(ASKED["every query there is"])
    assert all(torch.equal(*pair) for pair in zip(again.pairs(queries), answers.pairs(queries), strict=True))
