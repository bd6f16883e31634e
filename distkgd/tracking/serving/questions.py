"""What an endpoint is asked, as mappings from column to value, and what it answers. No MLflow here."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from distkgd.data import Vocabulary
from distkgd.data.triples import COLUMNS
from distkgd.errors import ConfigError, DataError, DistkgdError, shorten
from distkgd.evaluation.trained_model import TrainedModel

DEFAULT_K = 10
WORD: dict[str, Any] = {"type": ["string", "integer"]}
# What a question may hold, as JSON schema: two of the first three, the third is asked for.
KEYS: dict[str, dict[str, Any]] = {
    "head": WORD | {"description": "Name or label of an entity; with ids the number of its row."},
    "relation": WORD | {"description": "Name or label of a relation; left out where the relations are asked for."},
    "tail": WORD | {"description": "Name or label of an entity; with ids the number of its row."},
    "k": {"type": "integer", "minimum": 1, "default": DEFAULT_K, "description": "How many answers are wanted."},
    "ids": {"type": "boolean", "default": False, "description": "Whether whole numbers are row numbers, not names."},
    "exclude_known": {
        "type": "boolean",
        "default": False,
        "description": "Leaves out answers that are known triples. The model needs them beside it, or its data set: "
        "distkgd register MODEL --known.",
    },
}


class Alike(NamedTuple):
    """What questions that are answered together have in common. given: two of head, relation and tail."""

    given: tuple[str, ...]
    k: int
    ids: bool
    exclude_known: bool


def read_question(record: Mapping[str, Any]) -> tuple[Alike, Mapping[str, Any]]:
    """The question in a mapping with KEYS, and its words; absent, null and NaN are the same.

    Raises ConfigError for what is no question, naming what is wrong with it.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f"{shorten(repr(record))} is no question; a question is a mapping with {', '.join(KEYS)}.")
    found = {key: value for key, value in record.items() if value is not None and value == value}  # noqa: PLR0124 - NaN
    for key in found:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, 1, 0.0)[0]
            raise ConfigError(f"a question has no {str(key)!r}; did you mean {near!r}? Allowed: {', '.join(KEYS)}.")
    given = tuple(column for column in COLUMNS if column in found)
    if len(given) != 2:
        raise ConfigError(
            "a question has two of head, relation and tail, and the third is asked for; this one has "
            f"{', '.join(map(repr, given)) or 'nothing'}."
        )
    for key in given:
        if isinstance(found[key], bool) or not isinstance(found[key], str | int | float):
            raise ConfigError(f"{key}: {found[key]!r} is no text; give a name or a label.")
    k = found.get("k", DEFAULT_K)
    if isinstance(k, bool) or not isinstance(k, int | float) or not math.isfinite(k) or k != int(k) or k < 1:
        raise ConfigError(f"k: {k!r} is no number of answers; give a whole number >= 1.")
    for key, means in (("ids", "whole numbers are row numbers, or names"), ("exclude_known", "known ones left out")):
        if not isinstance(found.get(key, False), bool):
            raise ConfigError(f"{key}: {found[key]!r}; allowed are true and false ({means}).")
    alike = Alike(given, int(k), found.get("ids", False), found.get("exclude_known", False))
    return alike, {key: found[key] for key in given}


def answer_questions(model: TrainedModel, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping per question, in order: its words as the model knows them, `asked` ("tail", "head" or "relation"),
    and `names`, `ids` and `scores` of the answers, best first; `labels` too where the model has any.

    A question that cannot be answered has an `error` in place of answers, which names the nearest spellings of an
    unknown word. Raises the first one's ConfigError or DataError where no question can be answered.
    """
    groups: dict[Alike, list[tuple[int, Mapping[str, Any]]]] = {}
    answers: dict[int, dict[str, Any] | DistkgdError] = {}
    for place, record in enumerate(records):
        try:
            alike, words = read_question(record)
            groups.setdefault(alike, []).append((place, words))
        except ConfigError as error:
            answers[place] = error
    for alike, asked in groups.items():
        answers |= _answer_alike(model, alike, asked)
    found = [answers[place] for place in range(len(records))]
    if found and isinstance(found[0], DistkgdError) and all(isinstance(one, DistkgdError) for one in found):
        raise found[0]
    return [{"error": str(one)} if isinstance(one, DistkgdError) else one for one in found]


def _answer_alike(
    model: TrainedModel, alike: Alike, asked: Sequence[tuple[int, Mapping[str, Any]]]
) -> Mapping[int, dict[str, Any] | DistkgdError]:
    """Place -> answer of questions that differ in their words alone, asked together."""
    words: dict[str, Any] = {column: [one[column] for _, one in asked] for column in alike.given}
    ask = model.predict if "relation" in alike.given else model.predict_relation
    try:
        found = ask(**words, k=alike.k, exclude_known=alike.exclude_known, ids=alike.ids)
    except DistkgdError as error:  # of all of them alike
        return {place: error for place, _ in asked}
    answers: dict[int, dict[str, Any] | DistkgdError] = {}
    rows = zip(asked, found.questions, found.ids.tolist(), found.scores.tolist(), strict=True)
    for i, ((place, _), known, ids, scores) in enumerate(rows):
        if i in found.errors:
            answers[place] = DataError(found.errors[i])
        else:
            there = [one for one in ids if one >= 0]  # after the last answer they are -1
            named = _named(found.vocabulary, there)
            answers[place] = {**known, "asked": found.answered, **named, "scores": scores[: len(there)]}
    return answers


def _named(vocabulary: Vocabulary, ids: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"names": [vocabulary.name(i) for i in ids]}
    if vocabulary.labels is not None:
        found["labels"] = [vocabulary.label(i) for i in ids]
    return found | {"ids": ids}
