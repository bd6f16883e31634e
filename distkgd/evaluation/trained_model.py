"""A finished model and its vocabularies in one process: what `distkgd.load` returns."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.evaluation.entity_lookup import Found, Words, columns_of, rows_of
from distkgd.evaluation.prediction import best, data_of, top_k
from distkgd.models.model_folder import LoadedModel, load_model, save_model
from distkgd.scorers import Scorer

if TYPE_CHECKING:
    import pandas

QUESTIONS_AT_ONCE = 1 << 12
NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Answers:
    """The best answers of Q questions, best first.

    ids: [Q, k] int64, -1 where a question has fewer than k answers. scores: [Q, k], -inf there.
    questions: for each question its columns, e.g. {"head": "paris", "relation": "capital_of"}.
    answered: the column that the answers belong to: "head", "tail" or "neighbour".
    errors: place of a question that has no answers because a word of it means nothing -> why.
    """

    ids: Tensor
    scores: Tensor
    questions: list[dict[str, str]]
    answered: str
    entities: Vocabulary
    errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def names(self) -> list[list[str]]:
        """Of the answers of each question."""
        return [[self.entities.name(i) for i in row if i >= 0] for row in self.ids.tolist()]

    def frame(self) -> "pandas.DataFrame":
        """One row per answer: the question's columns, the answer under `answered`, its label, rank, id and score.

        With any `errors` there is a column `error` too, and one row for each question that has one.
        """
        pandas = _import_pandas()
        rows: list[dict[str, Any]] = []
        answers = zip(self.questions, self.ids.tolist(), self.scores.tolist(), strict=True)
        for place, (question, ids, scores) in enumerate(answers):
            if place in self.errors:
                rows.append({**question, self.answered: None, "error": self.errors[place]})
            for rank, (i, score) in enumerate(zip(ids, scores, strict=True), 1):
                if i >= 0:
                    named = {self.answered: self.entities.name(i), "label": self.entities.label(i)}
                    rows.append({**question, **named, "rank": rank, "id": i, "score": score})
        columns = [self.answered, "label", "rank", "id", "score", *(["error"] if self.errors else [])]
        return pandas.DataFrame(rows, columns=[*(self.questions[0] if self.questions else []), *columns])

    def __len__(self) -> int:
        return len(self.questions)


def load(
    path: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    query_bits: int = 32,
) -> "TrainedModel":
    """The finished model in a folder: of a stage, of its `model/`, or of an export that is a model folder.

    data: name or folder of the data set whose triples `exclude_known` leaves out; default: what it was trained on.
    device: "cpu" or "cuda". dtype: of computations; default: the model's own.
    query_bits: 8 rounds queries to it, of packed models only; else ConfigError.

    Raises ModelError where there is no model or a file of it is damaged.
    """
    loaded = load_model(Path(path), Ranks(device=torch.device(device)), dtype)
    loaded = replace(loaded, model=loaded.model.in_query_bits(query_bits))
    return TrainedModel(loaded, str(path), None if data is None else str(data))


class TrainedModel:
    """A finished model and its vocabularies, held by one process. Made by `load`; nothing here changes it."""

    def __init__(self, loaded: LoadedModel, folder: str, data: str | None = None) -> None:
        self._loaded, self._folder, self._data = loaded, folder, data
        self._model = loaded.model

    def __repr__(self) -> str:
        sizes = f"{len(self.entities):,} entities, {len(self.relations):,} relations"
        return f"TrainedModel({self.scorer}, {sizes})"

    @property
    def entities(self) -> Vocabulary:
        """Names and labels by id."""
        return self._loaded.entities

    @property
    def relations(self) -> Vocabulary:
        """Names and labels by id."""
        return self._loaded.relations

    @property
    def scorer(self) -> Scorer:
        """The formula and its constants; `scorer.dim` is the number of coordinates per entity."""
        return self._model.scorer

    @property
    def config(self) -> dict[str, Any]:
        """What config.json of the model folder says."""
        return dict(self._loaded.config)

    @property
    def entity_rows(self) -> Tensor:
        """[num_entities, scorer.entity_size]: biases, if the scorer has them, then coordinates.

        Of a packed model a copy of all rows, widened anew by every call.
        """
        return self._model.entity.weight

    @property
    def relation_rows(self) -> Tensor:
        """[num_relations, scorer.relation_size], twice as many with reciprocal relations, inverse ones last."""
        return self._model.relation

    def predict(
        self,
        *,
        head: Words | None = None,
        relation: Words,
        tail: Words | None = None,
        k: int = 10,
        exclude_known: bool = False,
        ids: bool = False,
    ) -> Answers:
        """The k best tails of (head, relation), or heads of (relation, tail); give exactly one of head and tail.

        head, tail, relation: one or many; one of them beside many of the other is asked with each of these.
        exclude_known: leave out answers that the data set's splits hold.
        ids: whole numbers are row numbers; else they are names.

        Equal scores are ordered by id. Raises DataError for a word by itself that is unknown, ambiguous or out of
        range (one of many is told in `Answers.errors`), and for numbers where no name is one; ConfigError for a
        question that cannot be asked or a data set that is not at hand.
        """
        if (head is None) == (tail is None):
            raise ConfigError("give exactly one of head and tail; the other one is what is asked for.")
        _check_k(k)
        given, asked, side = ("head", "tail", 0) if head is not None else ("tail", "head", 1)
        anchor = self._entities(head if head is not None else tail, given, ids)
        r = self._relations(relation, ids)
        if len(anchor.given) != len(r.given) and 1 not in (len(anchor.given), len(r.given)):
            raise ConfigError(
                f"{len(anchor.given)} of {given} and {len(r.given)} of relation; give as many, or one of either."
            )
        num = max(len(anchor.given), len(r.given)) if len(anchor.given) and len(r.given) else 0
        anchor, r = anchor.expand(num), r.expand(num)

        def best_of(at: Tensor) -> tuple[Tensor, Tensor]:
            ends = anchor.ids[at]
            columns = ends, r.ids[at], torch.full_like(ends, side), ends
            return self._best(Queries(*(c.to(self.relation_rows.device) for c in columns)), k, exclude_known)

        names = anchor.texts(self.entities), r.texts(self.relations)
        questions = [{given: a, "relation": b} for a, b in zip(*names, strict=True)]
        return self._answers(best_of, questions, asked, k, {**r.errors, **anchor.errors})

    def score(self, triples: Any, *, ask: Literal["tail", "head"] = "tail", ids: bool = False) -> Tensor:
        """[n] scores of n triples; higher is better. NaN, with a warning, for a triple with a word that means nothing.

        triples: (head, relation, tail) each; a [n, 3] tensor or array; a pandas or polars frame with the columns head,
            relation, tail.
        ask: with reciprocal relations a triple has a score as an answer of (head, relation, ?) and another as one of
            (?, relation, tail).
        ids: whole numbers are row numbers; else they are names, and DataError where no name is one.
        """
        (h, r, t), wrong = self._triples(triples, ids)
        if wrong:
            first = next(iter(wrong))
            warnings.warn(
                f"{len(wrong)} of {len(h)} triples have no score; triple {first}: {wrong[first]} (TrainedModel.unknown "
                "tells of all)",
                stacklevel=2,
            )
        side = torch.full_like(h, int(ask == "head"))
        queries = Queries(t, r, side, h) if ask == "head" else Queries(h, r, side, t)
        scores = self.relation_rows.new_full([len(h)], torch.nan)
        for at in _places(len(h), wrong):
            scores[at] = self._score(Queries(*(c[at] for c in queries)))
        return scores

    def unknown(self, triples: Any, *, ids: bool = False) -> dict[int, str]:
        """Place of each triple that `score` has no score for -> why."""
        return self._triples(triples, ids)[1]

    def nearest(self, entity: Words, k: int = 10, *, ids: bool = False) -> Answers:
        """The k entities most like each given one, itself left out.

        By the cosine of their coordinates where the scorer multiplies entities or takes their direction, else by their
        distance, whose negative is the score; hyperbolic scorers: the distance of the tangent vectors.
        ids: whole numbers are row numbers; else they are names.
        """
        _check_k(k)
        found = self._entities(entity, "entity", ids)
        questions = [{"entity": text} for text in found.texts(self.entities)]
        device = self.relation_rows.device
        return self._answers(
            lambda at: self._nearest(found.ids[at].to(device), k), questions, "neighbour", k, found.errors
        )

    def crop(self, dim: int | None = None, bits: int | None = None) -> "TrainedModel":
        """The model made of the first `dim` coordinates; ConfigError or UnsupportedError where there is none.

        bits: of each number, of those that the model was trained with (`distill.bits`); default: as many as there are.
        Of a packed model the crop is not packed, and so cannot round queries: ConfigError where this one does.
        """
        if self._model.query_bits != 32:
            raise ConfigError("a crop is not packed, and rounds no queries: load the model without query_bits.")
        model = self._model.crop(self.scorer.dim if dim is None else dim, bits)
        return TrainedModel(replace(self._loaded, model=model), self._folder, self._data)

    def save(self, folder: str | Path) -> None:
        """Write a model folder; ConfigError when `folder` exists. Packed rows are widened."""
        if Path(folder).exists():
            raise ConfigError(f"{folder} exists; name a folder that does not exist yet.")
        kept = ("data", "source", "commit", "stage", "method")
        about = {key: self._loaded.config[key] for key in kept if key in self._loaded.config}
        save_model(Path(folder), self._model, self._loaded, about)

    @cached_property
    def _known(self) -> KnownAnswers:
        graph, note = data_of(self._loaded, self._folder, self._data)
        if graph is None:
            raise ConfigError(f"exclude_known needs the data set: distkgd.load(path, data=NAME_OR_FOLDER). {note}")
        device = self.relation_rows.device
        return KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]).to(device), graph.num_entities)

    def _best(self, queries: Queries, k: int, exclude_known: bool) -> tuple[Tensor, Tensor]:
        return top_k(self._model, queries, k, self._known.pairs(queries) if exclude_known else None)

    @torch.no_grad()
    def _score(self, queries: Queries) -> Tensor:
        anchor, answer = (
            self._model.entity.rows(ids).to(self.relation_rows.dtype) for ids in (queries.anchor, queries.answer)
        )
        relation = self.relation_rows[self._model.relation_ids(queries)]
        return self._model.answer_scores(queries, anchor, relation, answer)

    @torch.no_grad()
    def _nearest(self, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scorer, table = self.scorer, self._model.entity
        by_angle = scorer.candidate_form == "dot" or scorer.name == "pairre"

        def rows(which: Tensor | slice) -> Tensor:
            found = scorer.coordinates(table.rows(which)).double()
            return found / found.norm(dim=1, keepdim=True).clamp_min(1e-12) if by_angle else found

        own, k = rows(ids), min(k, table.total - 1)
        scores, found = own.new_empty(len(ids), 0), ids.new_empty(len(ids), 0)
        width = max(k + 1, NUMBERS_AT_ONCE // max(1, len(ids)))
        for lo in range(0, table.total, width):
            block = rows(slice(lo, lo + width))
            near = own @ block.T if by_angle else -torch.cdist(own, block, compute_mode="donot_use_mm_for_euclid_dist")
            here = torch.arange(lo, lo + len(block), device=ids.device).expand(len(ids), -1)
            near[here == ids.unsqueeze(1)] = -torch.inf
            scores, found = best(torch.cat([scores, near], 1), torch.cat([found, here], 1), k)
        return scores, found

    def _answers(
        self,
        best_of: Callable[[Tensor], tuple[Tensor, Tensor]],
        questions: list[dict[str, str]],
        answered: str,
        k: int,
        wrong: Mapping[int, str],
    ) -> Answers:
        """best_of: places of questions -> scores and ids of their answers. wrong: place of one that has none -> why."""
        places = _places(len(questions), wrong)
        parts = [best_of(at) for at in places]
        shape = len(questions), parts[0][0].shape[1] if parts else min(k, len(self.entities))
        scores = (parts[0][0] if parts else self.relation_rows).new_full(shape, -torch.inf)
        ids = torch.full(shape, -1, device=scores.device)
        for at, (score, found) in zip(places, parts, strict=True):
            scores[at], ids[at] = score, found
        return Answers(ids.where(scores > -torch.inf, -1), scores, questions, answered, self.entities, dict(wrong))

    def _triples(self, triples: Any, ids: bool) -> tuple[tuple[Tensor, Tensor, Tensor], dict[int, str]]:
        """Heads, relations and tails, -1 for what means nothing, and what is wrong with such a triple, by its place."""
        head, relation, tail = columns_of(triples)
        h, r, t = self._entities(head, "head", ids), self._relations(relation, ids), self._entities(tail, "tail", ids)
        wrong = {place: text for one in (t, r, h) for place, text in one.errors.items()}
        device = self.relation_rows.device
        return (h.ids.to(device), r.ids.to(device), t.ids.to(device)), dict(sorted(wrong.items()))

    def _entities(self, words: Words | None, what: str, ids: bool) -> Found:
        return rows_of(words, self.entities, what, "entity", ids)

    def _relations(self, words: Words, ids: bool) -> Found:
        return rows_of(words, self.relations, "relation", "relation", ids)


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k={k}; allowed is a whole number >= 1.")


def _places(num: int, wrong: Mapping[int, str]) -> Sequence[Tensor]:
    """Places of the questions that have answers, so many at a time as are asked at once."""
    right = torch.tensor([place for place in range(num) if place not in wrong], dtype=torch.int64)
    return right.split(QUESTIONS_AT_ONCE) if len(right) else []


def _import_pandas() -> Any:
    try:
        import pandas  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("a frame of answers needs pandas: pip install 'distkgd[export]'.") from None
    return pandas
