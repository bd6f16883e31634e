"""Names, labels and row numbers in whatever a program has them, as rows of a model.

A whole number is a name (or a label) that is written so, as a column of a Parquet file holds it; it is the number of a
row only where the caller has said `ids`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.data.triples import loose
from distkgd.data.triples import rows_of as rows_among
from distkgd.errors import DataError, shorten

# Names, labels or whole numbers: one, or many of them in anything that can be iterated over.
Words = str | int | Iterable[str | int] | Tensor

FEW = 16  # names that are looked up one by one: a join reads the whole vocabulary; unknown words that get a hint
PLAIN = (str, int)  # and not bool, which is an int
Kind = Literal["entity", "relation"]
PLURAL = {"entity": "entities", "relation": "relations"}
NAMES_SHOWN = 5
WHOLE = re.compile(r"-?\d+")
ROW_NUMBERS = 'ids=True in Python, --ids with distkgd predict, "ids": true in a question'
EXACT = 1 << 53  # floating-point numbers from here on stand for several whole ones


@dataclass(frozen=True)
class Found:
    """What n words mean.

    ids: [n] int64 rows, -1 for a word that means none. errors: its place -> why. given: the words.
    """

    ids: Tensor
    errors: Mapping[int, str]
    given: Sequence[Any]

    def expand(self, num: int) -> "Found":
        """The same for each of `num` questions, where there is one word."""
        if len(self.given) == num:
            return self
        errors = {place: text for text in self.errors.values() for place in range(num)}
        return Found(self.ids.expand(num), errors, list(self.given) * num)

    def texts(self, vocabulary: Vocabulary) -> list[str]:
        """The names of the rows; the words themselves where they mean none."""
        if len(self.given) <= FEW:
            pairs = zip(self.ids.tolist(), self.given, strict=True)
            return [vocabulary.name(row) if row >= 0 else str(word) for row, word in pairs]
        names = vocabulary.names.gather(self.ids.clamp_min(0).numpy()).to_list()
        return [str(self.given[place]) if place in self.errors else name for place, name in enumerate(names)]


def rows_of(words: Any, vocabulary: Vocabulary, what: str, kind: Kind, ids: bool = False) -> Found:
    """The rows that words mean. What means nothing among many fails alone; a word by itself raises its DataError.

    what: the words are called in errors. ids: whole numbers are row numbers.

    Raises DataError where all words are numbers, no name or label is one and `ids` was not said.
    """
    single = is_single(words)
    listed: list[Any] = (
        [words.item() if isinstance(words, Tensor | np.ndarray) else words] if single else _listed(words)
    )
    keys: list[str | int | DataError] = [word if type(word) in PLAIN else _key(word, what) for word in listed]
    distinct = set(keys)
    wanted = (str(key) for key in distinct if isinstance(key, str) or (isinstance(key, int) and not ids))
    texts = sorted(text for text in wanted if text.isascii() or text.encode(errors="replace").decode() == text)
    named = dict(zip(texts, _rows_of_names(vocabulary, texts), strict=True))
    read: dict[str | int | DataError, int | DataError] = {}
    unknown = 0
    for key in distinct:
        if isinstance(key, DataError):
            read[key] = key
        elif ids and isinstance(key, int):
            read[key] = key if 0 <= key < len(vocabulary) else _outside(key, what, vocabulary)
        elif str(key) not in named:  # JSON has ways to write half a character, and polars has none
            read[key] = DataError(f"{what}: {key!r} is no text that can be written as UTF-8; no name is like that.")
        else:
            row = named[str(key)]
            read[key] = _other_reading(key, vocabulary, what, kind, unknown < FEW) if row is None else row
            unknown += isinstance(read[key], DataError)
    found = [read[key] for key in keys]
    errors = {place: str(row) for place, row in enumerate(found) if isinstance(row, DataError)}
    only_numbers = len(errors) == len(keys) > 0 and all(isinstance(key, int) for key in keys)
    if errors and (single or (only_numbers and not ids and not vocabulary.has_numbers)):
        raise DataError(errors[0])
    rows = [-1 if isinstance(row, DataError) else row for row in found] if errors else found
    return Found(torch.tensor(rows, dtype=torch.int64), errors, listed)


def is_single(words: Any) -> bool:
    """Whether it is a word by itself, and not one of many."""
    return isinstance(words, str) or not isinstance(words, Iterable) or getattr(words, "ndim", 1) == 0


def _listed(words: Any) -> list[Any]:
    return words.reshape(-1).tolist() if isinstance(words, Tensor | np.ndarray) else list(words)


def _key(word: Any, what: str) -> str | int | DataError:
    """A text, or the whole number that a word is."""
    if isinstance(word, str):
        return str(word)
    wrong = f"{what}: {word!r} is neither a text nor a whole number; give names, labels or row numbers."
    try:
        number = int(word)
        if isinstance(word, bool | np.bool_) or word != number:
            return DataError(wrong)
        if isinstance(word, float | np.floating) and abs(number) >= EXACT:
            return DataError(f"{what}: {word!r} has lost its last digits as a floating-point number; give it as text.")
        return number
    except (TypeError, ValueError, OverflowError):
        return DataError(wrong)


def _outside(row: int, what: str, vocabulary: Vocabulary) -> DataError:
    return DataError(f"{what}: the id {row} is outside the model, which has the ids 0 … {len(vocabulary) - 1}.")


def _other_reading(key: str | int, vocabulary: Vocabulary, what: str, kind: Kind, hint: bool) -> int | DataError:
    """What a word means that is no name."""
    try:
        return only_row(vocabulary, kind, str(key), exact=isinstance(key, int), hint=hint)
    except DataError as error:
        if isinstance(key, int) and not vocabulary.has_numbers:
            return DataError(
                f"{what}: {key} is a number, and none of the model's names is one. If row numbers are meant, say so: "
                f"{ROW_NUMBERS}."
            )
        return error


def _rows_of_names(vocabulary: Vocabulary, texts: Sequence[str]) -> list[int | None]:
    """Of each text the row that has it as its name."""
    if len(texts) <= FEW:
        return [vocabulary.row_of_name(text) for text in texts]
    return rows_among(pl.Series(texts, dtype=pl.String), vocabulary.names).to_list()


def only_row(
    vocabulary: Vocabulary, kind: Kind, text: str, ids: bool = False, exact: bool = False, hint: bool = True
) -> int:
    """The one row of `find_rows`; a guess between several would change the question, so that is a DataError."""
    rows = find_rows(vocabulary, kind, text, ids, exact, hint)
    if len(rows) > 1:
        raise _ambiguous(vocabulary, kind, text, rows)
    return rows[0]


def find_rows(
    vocabulary: Vocabulary, kind: Kind, text: str, ids: bool = False, exact: bool = False, hint: bool = True
) -> list[int]:
    """The rows that `text` may mean: a name, else labels, else (unless `exact`) the same loosely written, else the one
    name that ends so.

    ids: a whole number is a row number. hint: whether the error of an unknown word names the nearest spellings, which
    takes longest. Raises DataError where no row, or the end of several names, is meant.
    """
    if ids and WHOLE.fullmatch(text):
        row = int(text) if len(text) < 20 else len(vocabulary)  # Python reads no number of thousands of digits
        vocabulary.name(row)  # which refuses a row that is not there
        return [row]
    loosely = "" if exact else str(loose(pl.Series([text]))[0])
    for column, word in _readings(vocabulary, text, loosely):
        if rows := (column == word).arg_true().to_list():
            return [int(row) for row in rows]
    rows = _rows_that_end(vocabulary.loose[0], loosely.lstrip("/.:")) if loosely else []
    if len(rows) > 1:
        raise _ambiguous(vocabulary, kind, text, rows)
    if not rows:
        raise _unknown(vocabulary, kind, text, hint)
    return rows


def _readings(vocabulary: Vocabulary, text: str, loosely: str) -> Iterator[tuple[pl.Series, str]]:
    # Where to look for which word, the strictest first: only what is no name and no label costs the loose columns.
    for column in (vocabulary.names, vocabulary.labels):
        if column is not None:
            yield column, text
    if loosely:
        for column in vocabulary.loose:
            yield column, loosely


def _rows_that_end(names: pl.Series, wanted: str) -> list[int]:
    # "genre" for /film/film/genre, "OrderedDict" for class:collections.OrderedDict.
    if not wanted:
        return []
    ends = [names.str.ends_with(sign + wanted) for sign in "/.:"]
    return [int(row) for row in (ends[0] | ends[1] | ends[2]).arg_true().to_list()]


def describe(vocabulary: Vocabulary, row: int) -> str:
    """A name, with its label where that says more."""
    name, label = vocabulary.name(row), vocabulary.label(row)
    same, other = loose(pl.Series([label, name]))
    return name if same == other else f"{label} [{name}]"


def shown_names(names: Iterable[str], num: int) -> str:
    """The first of `num` names, and how many more there are."""
    more = f" and {num - NAMES_SHOWN} more" if num > NAMES_SHOWN else ""
    return ", ".join(islice(names, NAMES_SHOWN)) + more


def _ambiguous(vocabulary: Vocabulary, kind: Kind, text: str, rows: Sequence[int]) -> DataError:
    names = shown_names((repr(vocabulary.name(row)) for row in rows), len(rows))
    return DataError(f"{len(rows)} {PLURAL[kind]} fit {shorten(text)!r}: {names}; give one of these names.")


def _unknown(vocabulary: Vocabulary, kind: Kind, text: str, hint: bool) -> DataError:
    told = f"no {kind} of the model ({len(vocabulary):,}) is called {shorten(text)!r}"
    if hint:
        nearest = vocabulary.nearest(text)
        told += f"; nearest: {', '.join(map(repr, nearest))}" if nearest else "; nothing is spelt like it"
    told += f". If a row number is meant, say so: {ROW_NUMBERS}" if WHOLE.fullmatch(text) else ""
    return DataError(f"{told}.")


def columns_of(triples: Any) -> tuple[Any, Any, Any]:
    """Heads, relations and tails of a frame, a [n, 3] tensor or array, or a list of triples."""
    names = [str(name) for name in getattr(triples, "columns", [])]
    if names:
        if not {"head", "relation", "tail"} <= set(names):
            raise DataError(f"a frame of triples has the columns head, relation and tail; this one has {names}.")
        return triples["head"], triples["relation"], triples["tail"]
    rows = triples.tolist() if isinstance(triples, Tensor) or type(triples).__module__ == "numpy" else list(triples)
    if wrong := [row for row in rows if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 3]:
        raise DataError(f"a triple is (head, relation, tail), not {wrong[0]!r}; one triple is given as [triple].")
    head, relation, tail = zip(*rows, strict=True) if rows else ((), (), ())
    return head, relation, tail
