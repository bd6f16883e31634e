"""Search among names and labels: what is called so, begins so, holds it, or is spelt like it."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import polars as pl

from distkgd.data import Vocabulary
from distkgd.data.triples import loose, nearest_spellings
from distkgd.errors import ConfigError

How = Literal["exact", "prefix", "substring", "fuzzy"]


class Match(NamedTuple):
    """A name that was found. id: its row. how: why it was found."""

    name: str
    label: str
    id: int
    how: How


def search(vocabulary: Vocabulary, text: str, k: int) -> list[Match]:
    """At most k matches, the strictest first: exact, prefix, substring, fuzzy; among equals the shortest, then by id.

    Upper and lower case are the same, and so are _ and a blank; a row is found by its name or by its label.
    """
    wanted = str(loose(pl.Series([text]))[0])
    if not wanted:
        raise ConfigError(f"search: {text!r} holds no letters; give a part of a name.")
    found: dict[int, How] = {}
    for how, rows in _readings(vocabulary, wanted):
        for row in rows:
            found.setdefault(row, how)
        if len(found) >= k:
            break
    return [Match(vocabulary.name(row), vocabulary.label(row), row, how) for row, how in list(found.items())[:k]]


def _readings(vocabulary: Vocabulary, wanted: str) -> Iterator[tuple[How, list[int]]]:
    texts = pl.concat([column.rename("text") for column in vocabulary.loose])
    number = len(vocabulary)
    frame = pl.DataFrame({"text": texts, "row": pl.int_range(number, eager=True).extend(_again(texts, number))})
    text = pl.col("text")
    holds = frame.filter(text.str.contains(wanted, literal=True)).with_columns(size=text.str.len_chars())
    holds = holds.sort("size", "row")
    yield "exact", holds.filter(text == wanted)["row"].to_list()
    yield "prefix", holds.filter(text.str.starts_with(wanted))["row"].to_list()
    yield "substring", holds["row"].to_list()
    spelt = nearest_spellings(wanted, frame["text"].drop_nulls(), count=10)
    order = {one: place for place, one in enumerate(spelt)}
    rows = frame.filter(text.is_in(spelt)).rows()
    yield "fuzzy", [row for _, row in sorted(rows, key=lambda one: (order[one[0]], one[1]))]


def _again(texts: pl.Series, number: int) -> pl.Series:
    # The rows of the labels, if they stand below the names.
    return pl.int_range(len(texts) - number, eager=True)
