"""What an endpoint is asked, as mappings from column to value, and what it answers. No MLflow here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distkgd.errors import ConfigError, DataError, DistkgdError
from distkgd.evaluation.trained_model import TrainedModel

DEFAULT_K = 10
Side = Literal["head", "tail"]


@dataclass(frozen=True)
class Question:
    """(head, relation, ?) or (?, relation, tail). given: which end `entity` is; k: how many answers are wanted.

    ids: whether whole numbers among entity and relation are row numbers; else they are names.
    """

    given: Side
    entity: str | int
    relation: str | int
    k: int
    ids: bool


def read_question(record: Mapping[str, Any]) -> Question:
    """The question in a mapping {"head" or "tail", "relation", "k", "ids"}; absent, null and NaN are the same.

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
        if isinstance(found[key], bool) or not isinstance(found[key], str | int | float):
            raise ConfigError(f"{key}: {found[key]!r} is no text; give a name or a label.")
    k = found.get("k", DEFAULT_K)
    if isinstance(k, bool) or not isinstance(k, int | float) or not math.isfinite(k) or k != int(k) or k < 1:
        raise ConfigError(f"k: {k!r} is no number of answers; give a whole number >= 1.")
    ids = found.get("ids", False)
    if not isinstance(ids, bool):
        raise ConfigError(f"ids: {ids!r}; allowed are true (whole numbers are row numbers) and false (they are names).")
    return Question(ends[0], found[ends[0]], found["relation"], int(k), ids)


def answer_questions(model: TrainedModel, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping per question, in order: its words as the model knows them, `asked` ("tail" or "head"), and `names`,
    `ids` and `scores` of the answers, best first; `labels` too where the model has any.

    A question that cannot be answered has an `error` in place of answers, which names the nearest spellings of an
    unknown word. Raises the first one's ConfigError or DataError where no question can be answered.
    """
    groups: dict[tuple[Side, int, bool], list[tuple[int, Question]]] = {}
    answers: dict[int, dict[str, Any] | DistkgdError] = {}
    for place, record in enumerate(records):
        try:
            question = read_question(record)
            groups.setdefault((question.given, question.k, question.ids), []).append((place, question))
        except ConfigError as error:
            answers[place] = error
    for asked in groups.values():
        answers |= _answer_alike(model, asked)
    found = [answers[place] for place in range(len(records))]
    if found and isinstance(found[0], DistkgdError) and all(isinstance(one, DistkgdError) for one in found):
        raise found[0]
    return [{"error": str(one)} if isinstance(one, DistkgdError) else one for one in found]


def _answer_alike(
    model: TrainedModel, asked: Sequence[tuple[int, Question]]
) -> Mapping[int, dict[str, Any] | DistkgdError]:
    """Place -> answer of questions that differ in their words alone, asked together."""
    first = asked[0][1]
    ends: dict[str, Any] = {first.given: [one.entity for _, one in asked]}
    try:
        found = model.predict(**ends, relation=[one.relation for _, one in asked], k=first.k, ids=first.ids)
    except DistkgdError as error:  # of all of them alike
        return {place: error for place, _ in asked}
    answers: dict[int, dict[str, Any] | DistkgdError] = {}
    rows = zip(asked, found.questions, found.ids.tolist(), found.scores.tolist(), strict=True)
    for i, ((place, _), words, ids, scores) in enumerate(rows):
        if i in found.errors:
            answers[place] = DataError(found.errors[i])
        else:
            there = [one for one in ids if one >= 0]  # after the last answer they are -1
            answers[place] = {**words, "asked": found.answered, **_named(model, there), "scores": scores[: len(there)]}
    return answers


def _named(model: TrainedModel, ids: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"names": [model.entities.name(i) for i in ids]}
    if model.entities.labels is not None:
        found["labels"] = [model.entities.label(i) for i in ids]
    return found | {"ids": ids}
