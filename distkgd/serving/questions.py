"""What an endpoint is asked, as mappings from column to value, and what it answers. No MLflow here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distkgd.api import TrainedModel
from distkgd.errors import ConfigError

DEFAULT_K = 10
Side = Literal["head", "tail"]


@dataclass(frozen=True)
class Question:
    """(head, relation, ?) or (?, relation, tail). given: which end `entity` is; k: how many answers are wanted."""

    given: Side
    entity: str
    relation: str
    k: int


def read_question(record: Mapping[str, Any]) -> Question:
    """The question in a mapping {"head" or "tail", "relation", "k"}; absent, null and NaN are the same.

    Raises ConfigError for what is no question, naming what is wrong with it.
    """
    found = {key: value for key, value in record.items() if value is not None and value == value}  # noqa: PLR0124 - NaN
    ends: list[Side] = [end for end in ("head", "tail") if end in found]
    if len(ends) != 1:
        raise ConfigError(
            f"a question has a relation and either a head or a tail, whose other end is asked for; this one has "
            f"{', '.join(map(repr, found)) or 'nothing'}."
        )
    if "relation" not in found:
        raise ConfigError(f"the question about {ends[0]} {found[ends[0]]!r} has no relation.")
    for key in (ends[0], "relation"):
        if not isinstance(found[key], str):
            raise ConfigError(f"{key}: {found[key]!r} is no text; give a name or a label.")
    k = found.get("k", DEFAULT_K)
    if isinstance(k, bool) or not isinstance(k, int | float) or not math.isfinite(k) or k != int(k) or k < 1:
        raise ConfigError(f"k: {k!r} is no number of answers; give a whole number >= 1.")
    return Question(ends[0], found[ends[0]], found["relation"], int(k))


def answer_questions(model: TrainedModel, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping per question, in order: its words as the model knows them, `asked` ("tail" or "head"), and `names`,
    `ids` and `scores` of the answers, best first; `labels` too where the model has any.

    Raises ConfigError for what is no question and DataError for an unknown word, which names the nearest spellings.
    """
    groups: dict[tuple[Side, int], list[tuple[int, Question]]] = {}
    for place, record in enumerate(records):
        question = read_question(record)
        groups.setdefault((question.given, question.k), []).append((place, question))
    answers: dict[int, dict[str, Any]] = {}
    for (given, k), asked in groups.items():
        entities, relations = [one.entity for _, one in asked], [one.relation for _, one in asked]
        ends: dict[str, Any] = {given: entities}
        found = model.predict(**ends, relation=relations, k=k)
        rows = zip(asked, found.questions, found.ids.tolist(), found.scores.tolist(), strict=True)
        for (place, _), words, ids, scores in rows:
            answers[place] = {**words, "asked": found.answered, **_named(model, ids), "scores": scores}
    return [answers[place] for place in range(len(records))]


def _named(model: TrainedModel, ids: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"names": [model.entities.name(i) for i in ids]}
    if model.entities.labels is not None:
        found["labels"] = [model.entities.label(i) for i in ids]
    return found | {"ids": ids}
