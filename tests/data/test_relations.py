"""Relation categories against a naive count."""

import random
from collections import defaultdict

import pytest
import torch

from distkgd.data.relations import relation_categories


def naive_categories(triples: list[tuple[int, int, int]], num_relations: int) -> list[str]:
    """Bordes et al. 2013, section 4, word by word."""
    categories = []
    for relation in range(num_relations):
        tails_of, heads_of = defaultdict(set), defaultdict(set)
        for head, _, tail in (triple for triple in triples if triple[1] == relation):
            tails_of[head].add(tail)
            heads_of[tail].add(head)
        tails = sum(map(len, tails_of.values())) / max(1, len(tails_of))
        heads = sum(map(len, heads_of.values())) / max(1, len(heads_of))
        categories.append(("1" if heads < 1.5 else "N") + "-" + ("1" if tails < 1.5 else "N"))
    return categories


def test_each_of_the_four_categories_is_told_from_the_others():
    one_to_one = [(0, 0, 1), (2, 0, 3)]
    one_to_many = [(0, 1, 1), (0, 1, 2), (0, 1, 3)]
    many_to_one = [(1, 2, 0), (2, 2, 0), (3, 2, 0)]
    many_to_many = [(h, 3, t) for h in (0, 1) for t in (2, 3)]
    train = torch.tensor(one_to_one + one_to_many + many_to_one + many_to_many)
    assert relation_categories(train, 4) == ["1-1", "1-N", "N-1", "N-N"]


def test_an_average_of_exactly_one_and_a_half_counts_as_many():
    train = torch.tensor([(0, 0, 1), (0, 0, 2), (3, 0, 4)])
    assert relation_categories(train, 1) == ["1-N"]


def test_doubled_triples_do_not_change_the_category():
    assert relation_categories(torch.tensor([(0, 0, 1)] * 5), 1) == ["1-1"]


def test_a_relation_without_triples_is_one_to_one():
    assert relation_categories(torch.tensor([(0, 1, 1), (0, 1, 2)]), 3) == ["1-1", "1-N", "1-1"]
    assert relation_categories(torch.empty(0, 3, dtype=torch.int64), 2) == ["1-1", "1-1"]


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_agree_with_the_naive_count(seed):
    random_ = random.Random(seed)
    num_entities = random_.choice([3, 8, 30])
    triples = [
        (random_.randrange(num_entities), random_.randrange(6), random_.randrange(num_entities // 2 + 1))
        for _ in range(60)
    ]
    assert relation_categories(torch.tensor(triples), 6) == naive_categories(triples, 6)


def test_a_wrong_shape_and_a_too_small_number_of_relations_are_refused():
    with pytest.raises(ValueError, match=r"must be \[n, 3\].*got \[4\]"):
        relation_categories(torch.zeros(4, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="holds relation 5, but num_relations is 2"):
        relation_categories(torch.tensor([(0, 5, 1)]), 2)
