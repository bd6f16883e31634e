"""The best answers of questions that were asked in words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.errors import ConfigError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Answers:
    """The best answers of Q questions, best first.

    ids: [Q, k] int64, -1 where a question has fewer than k answers. scores: [Q, k], -inf there.
    asked: column -> its word in each question, e.g. {"head": ["paris"], "relation": ["capital_of"]}.
    answered: the column that the answers belong to: "head", "relation", "tail" or "neighbour".
    vocabulary: of the answers.
    errors: place of a question that has no answers because a word of it means nothing -> why.
    """

    ids: Tensor
    scores: Tensor
    asked: Mapping[str, list[str]]
    answered: str
    vocabulary: Vocabulary
    errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def questions(self) -> list[dict[str, str]]:
        """For each question its columns, e.g. {"head": "paris", "relation": "capital_of"}."""
        return [dict(zip(self.asked, words, strict=True)) for words in zip(*self.asked.values(), strict=True)]

    @property
    def names(self) -> list[list[str]]:
        """Of the answers of each question."""
        return [[self.vocabulary.name(i) for i in row if i >= 0] for row in self.ids.tolist()]

    def table(self) -> pl.DataFrame:
        """One row per answer: the place of its question, that one's columns, the answer under `answered`, its label,
        rank, id, score, and an error, null but in the one row of each question that has one.
        """
        ids, scores = self.ids.cpu(), self.scores.cpu()
        place, column = (ids >= 0).nonzero(as_tuple=True)
        rows = ids[place, column]
        names = self.vocabulary.names.gather(rows.numpy())
        labels = names if self.vocabulary.labels is None else self.vocabulary.labels.gather(rows.numpy())
        answers = {
            self.answered: names,
            "label": labels.zip_with(labels.is_not_null(), names),
            "rank": pl.Series(column.add(1).numpy()),
            "id": pl.Series(rows.numpy()),
            "score": pl.Series(scores[place, column].numpy()),
        }
        found = self._asked(pl.Series(place.numpy())).with_columns(**answers)
        wrong = self._asked(pl.Series(list(self.errors), dtype=pl.Int64))
        wrong = wrong.with_columns(pl.Series("error", list(self.errors.values()), dtype=pl.String))
        return pl.concat([found, wrong], how="diagonal").sort("question", maintain_order=True)

    def _asked(self, places: pl.Series) -> pl.DataFrame:
        # The place of each of some questions, and its columns.
        texts = {name: pl.Series(words, dtype=pl.String) for name, words in self.asked.items()}
        return pl.DataFrame({"question": places, **{name: text.gather(places) for name, text in texts.items()}})

    def frame(self) -> "pandas.DataFrame":
        """One row per answer: the question's columns, the answer under `answered`, its label, rank, id and score.

        With any `errors` there is a column `error` too, and one row for each question that has one.
        """
        table = self.table().drop("question")
        return to_pandas(table if self.errors else table.drop("error"))

    def __len__(self) -> int:
        return len(self.ids)


def to_pandas(table: pl.DataFrame) -> "pandas.DataFrame":
    """A polars frame as a pandas one; ConfigError where pandas is not installed."""
    try:
        import pandas  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("a frame needs pandas: pip install 'distkgd[export]'.") from None
    columns: dict[str, Any] = table.to_dict(as_series=False)
    return pandas.DataFrame(columns)
