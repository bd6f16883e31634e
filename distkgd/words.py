"""Names, labels and ids in whatever a program has them, as rows of a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from distkgd.errors import DataError
from distkgd.graph import Vocabulary

# Names, labels or ids: one, or many of them in anything that can be iterated over.
Words = str | int | Iterable[str | int] | Tensor

FEW = 16  # names that are looked up one by one: a join reads the whole vocabulary


def rows_of(words: Any, vocabulary: Vocabulary, what: str, one: Callable[[str], int]) -> Tensor:
    """[n] int64: the rows that words or ids mean; `one` reads a text that is no name."""
    if isinstance(words, str | int):
        words = [words]
    listed = words.reshape(-1).tolist() if isinstance(words, Tensor) else list(words)
    texts = sorted({word for word in listed if isinstance(word, str)})
    named = zip(texts, _rows_of_names(vocabulary, texts), strict=True)
    rows = {text: one(text) if row is None else row for text, row in named}
    ids = [rows[word] if isinstance(word, str) else _id(word, what) for word in listed]
    for i in ids:
        if not 0 <= i < len(vocabulary):
            raise DataError(f"{what}: the id {i} is outside the model, which has the ids 0 … {len(vocabulary) - 1}.")
    return torch.tensor(ids, dtype=torch.int64)


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


def _id(word: Any, what: str) -> int:
    try:
        if isinstance(word, bool) or word != int(word):
            raise TypeError
        return int(word)
    except (TypeError, ValueError):
        raise DataError(f"{what}: {word!r} is neither a text nor an id; give names, labels or whole numbers.") from None


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
