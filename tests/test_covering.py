"""Pairs in place of products: none is missing, they are few, and the same in every process."""

from itertools import combinations, product
from math import prod
from typing import Any

import pytest

from tests.covering import all_pairs

PARAMETERS: list[list[list[Any]]] = [
    [["a", "b"], [1, 2, 3]],
    [["a", "b"], [True, False], [None, 0]],
    [list("abcdefg"), [1, 2], [3, 4, 5], [6], [7, 8, 9]],
    [[{"of": "dicts"}, {}], [[1], []], [(), None]],
    [[1, 1, 2], [3, 4]],  # a value that is given twice counts twice
    [list(range(4))] * 6,
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda values: "x".join(str(len(one)) for one in values))
def test_any_two_values_of_two_parameters_stand_together_in_few_rows(parameters: list[list[Any]]) -> None:
    rows = all_pairs(*parameters)
    for row in rows:
        assert len(row) == len(parameters)
        assert all(value in values for value, values in zip(row, parameters, strict=True))
    for a, b in combinations(range(len(parameters)), 2):
        found = [[row[a], row[b]] for row in rows]
        assert all([one, other] in found for one, other in product(parameters[a], parameters[b])), (a, b)
    least = prod(sorted(map(len, parameters))[-2:])
    assert least <= len(rows) <= min(prod(map(len, parameters)), 2 * least)


def test_rows_are_the_same_each_time_and_iterables_are_enough() -> None:
    assert all_pairs("abc", range(3), {"x": 1, "y": 2}) == all_pairs(["a", "b", "c"], [0, 1, 2], ["x", "y"])


@pytest.mark.parametrize("parameters", [(), ([1, 2],), ([1, 2], [])])
def test_where_there_are_no_pairs_it_is_an_error_and_not_no_test(parameters: tuple[list[int], ...]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        all_pairs(*parameters)
