"""Names, labels and row numbers in whatever a program has them, as rows of a model.

A whole number is a name (or a label) that is written so, as a column of a Parquet file holds it; it is the number of a
row only where the caller has said `ids`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.errors import DataError
from distkgd.evaluation.prediction import ROW_NUMBERS

# Names, labels or whole numbers: one, or many of them in anything that can be iterated over.
Words = str | int | Iterable[str | int] | Tensor

FEW = 16  # names that are looked up one by one: a join reads the whole vocabulary; unknown words that get a hint
PLAIN = (str, int)  # and not bool, which is an int
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
        pairs = zip(self.ids.tolist(), self.given, strict=True)
        return [vocabulary.name(row) if row >= 0 else str(word) for row, word in pairs]


def rows_of(
    words: Any, vocabulary: Vocabulary, what: str, one: Callable[[str, bool, bool], int], ids: bool = False
) -> Found:
    """The rows that words mean. What means nothing among many fails alone; a word by itself raises its DataError.

    one: reads a text that is no name; then whether as a label alone, written exactly so, and whether an unknown one is
        worth a hint. ids: whole numbers are row numbers.

    Raises DataError where all words are numbers, no name or label is one and `ids` was not said.
    """
    single = isinstance(words, str) or not isinstance(words, Iterable) or getattr(words, "ndim", 1) == 0
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
            read[key] = _other_reading(key, vocabulary, what, one, unknown < FEW) if row is None else row
            unknown += isinstance(read[key], DataError)
    found = [read[key] for key in keys]
    errors = {place: str(row) for place, row in enumerate(found) if isinstance(row, DataError)}
    only_numbers = len(errors) == len(keys) > 0 and all(isinstance(key, int) for key in keys)
    if errors and (single or (only_numbers and not ids and not vocabulary.has_numbers)):
        raise DataError(errors[0])
    rows = [-1 if isinstance(row, DataError) else row for row in found] if errors else found
    return Found(torch.tensor(rows, dtype=torch.int64), errors, listed)


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


def _other_reading(
    key: str | int, vocabulary: Vocabulary, what: str, one: Callable[[str, bool, bool], int], hint: bool
) -> int | DataError:
    """What a word means that is no name."""
    try:
        return one(str(key), isinstance(key, int), hint)
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
    names = pl.DataFrame({"name": vocabulary.names, "row": pl.int_range(len(vocabulary), eager=True)})
    return (
        pl.DataFrame({"name": texts}, schema={"name": pl.String})
        .join(names, on="name", how="left", maintain_order="left")["row"]
        .to_list()
    )


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
