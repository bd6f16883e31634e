"""Pairs of parameters in place of their full product: what fails, nearly always fails for two values together."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few rows, of one value of each parameter, in which any two values of two parameters stand together.

    Greedy, and the same in every process: each row begins with a pair that is still missing, and takes of every other
    parameter the value that brings most of the missing ones. ValueError: of less than two parameters, or one without
    values, there are no pairs.
    """
    columns = [list(values) for values in parameters]
    if len(columns) < 2 or not all(columns):
        raise ValueError(f"no pairs of {columns}")
    # A pair: (which parameter, which of its values), twice. A dict in place of a set: it keeps its order.
    missing = dict.fromkeys(
        ((a, i), (b, j))
        for a, b in combinations(range(len(columns)), 2)
        for i, j in product(range(len(columns[a])), range(len(columns[b])))
    )
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for column, values in enumerate(columns):
            if column not in row:
                gains = [sum(pair in missing for pair in _pairs(row | {column: i})) for i in range(len(values))]
                row[column] = gains.index(max(gains))
        for pair in _pairs(row):
            missing.pop(pair, None)
        rows.append(tuple(columns[column][row[column]] for column in range(len(columns))))
    return rows


def _pairs(row: dict[int, int]) -> Sequence[tuple[tuple[int, int], tuple[int, int]]]:
    return list(combinations(sorted(row.items()), 2))
