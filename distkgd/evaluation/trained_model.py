"""A finished model and its vocabularies in one process: what `distkgd.load` returns."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.data.reading.folders import read_files
from distkgd.data.triples import words_of
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from distkgd.evaluation import known_triples, name_search
from distkgd.evaluation.answers import Answers
from distkgd.evaluation.classification import Classified, Classifier, false_triples, fit_classifier
from distkgd.evaluation.entity_lookup import Found, Words, columns_of, is_single, rows_of
from distkgd.evaluation.prediction import asking, best_relations, data_of, mean_scores, nearest, scores_of, top_k
from distkgd.models.model_folder import LoadedModel, load_model, save_model
from distkgd.models.newcomers import place_newcomers, with_row
from distkgd.models.remote import local_model
from distkgd.scorers import Scorer

QUESTIONS_AT_ONCE = 1 << 12


def load(
    path: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    query_bits: int = 32,
) -> "TrainedModel":
    """The finished model in a folder: of a stage, of its `model/`, or of an export that is a model folder.

    path: such a folder, or hf://OWNER/NAME (and @REVISION) of one on Hugging Face's hub.
    data: name or folder of the data set whose triples `exclude_known` leaves out; default: what it was trained on.
    device: "cpu" or "cuda". dtype: of computations; default: the model's own.
    query_bits: 8 rounds queries to it, of packed models only; else ConfigError.

    Raises ModelError where there is no model or a file of it is damaged.
    """
    path = local_model(path)
    loaded = load_model(path, Ranks(device=torch.device(device)), dtype)
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
        anchor, r = _paired(given, anchor, "relation", self._relations(relation, ids))

        def best_of(at: Tensor) -> tuple[Tensor, Tensor]:
            ends = anchor.ids[at]
            columns = ends, r.ids[at], torch.full_like(ends, side), ends
            return self._best(Queries(*(c.to(self.relation_rows.device) for c in columns)), k, exclude_known)

        words = {given: anchor.texts(self.entities), "relation": r.texts(self.relations)}
        return self._answers(best_of, words, asked, k, {**r.errors, **anchor.errors})

    def predict_relation(
        self, *, head: Words, tail: Words, k: int = 10, exclude_known: bool = False, ids: bool = False
    ) -> Answers:
        """The k best relations from head to tail. All else is as in `predict`.

        With reciprocal relations by the mean of a triple's two scores (`score`).
        """
        _check_k(k)
        h, t = _paired("head", self._entities(head, "head", ids), "tail", self._entities(tail, "tail", ids))

        def best_of(at: Tensor) -> tuple[Tensor, Tensor]:
            device, known = self.relation_rows.device, self._known if exclude_known else None
            return best_relations(self._model, h.ids[at].to(device), t.ids[at].to(device), k, known)

        words = {"head": h.texts(self.entities), "tail": t.texts(self.entities)}
        return self._answers(best_of, words, "relation", k, {**t.errors, **h.errors})

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
        queries = asking(h, r, t, ask)
        scores = self.relation_rows.new_full([len(h)], torch.nan)
        for at in _places(len(h), wrong):
            scores[at] = scores_of(self._model, Queries(*(c[at] for c in queries)))
        return scores

    def classifier(self, positives: Any = None, negatives: Any = None, *, seed: int = 0) -> Classifier:
        """Thresholds and probabilities per relation, fitted to triples that are true and to false ones beside them.

        positives: as `score` takes them, or the path of a file of triples; default: the data set's valid split.
        negatives: likewise; default: of each valid triple one end replaced, drawn by `seed`, by an entity that train
            has at that place of that relation.
        """
        if positives is None or negatives is None:
            graph, known = self._graph, self._known
            valid = graph.valid.to(self.relation_rows.device)
            if not len(valid):
                raise ConfigError(f"{graph.name} has no valid triples; give positives and negatives.")
        true = valid if positives is None else self._given_triples(positives)
        false = false_triples(valid, graph, known, seed) if negatives is None else self._given_triples(negatives)
        every = torch.cat([true, false])
        labels = torch.arange(len(every), device=every.device) < len(true)
        return fit_classifier(mean_scores(self._model, *every.unbind(1)), every[:, 1], labels, len(self.relations))

    def classify(self, triples: Any, *, classifier: Classifier | None = None, ids: bool = False) -> Classified:
        """Which of n triples are true, and how likely that is.

        triples, ids: as `score` takes them; with reciprocal relations by the mean of a triple's two scores.
        classifier: as `classifier` has made it; default: fitted once, to the data set's valid split.
        """
        fitted = self._classifier if classifier is None else classifier
        (h, r, t), wrong = self._triples(triples, ids)
        scores = self.relation_rows.new_full([len(h)], torch.nan)
        for at in _places(len(h), wrong):
            scores[at] = mean_scores(self._model, h[at], r[at], t[at])
        found = fitted.probabilities(scores, r)
        return Classified(found >= 0.5, found, scores, fitted.thresholds[r].where(r >= 0, torch.nan), wrong)

    def unknown(self, triples: Any, *, ids: bool = False) -> dict[int, str]:
        """Place of each triple that `score` has no score for -> why."""
        return self._triples(triples, ids)[1]

    def embedding(self, entity: Words, *, ids: bool = False) -> Tensor:
        """[dim] coordinates of an entity, [n, dim] of several: copies, without biases.

        NaN, with a warning, for one of several words that means nothing. ids: whole numbers are row numbers.
        """
        found = self._entities(entity, "entity", ids)
        rows = self.relation_rows.new_full([len(found.given), self.scorer.dim], torch.nan)
        known = (found.ids >= 0).nonzero().flatten()
        rows[known] = self.scorer.coordinates(self._model.entity.rows(found.ids[known].to(rows.device))).to(rows.dtype)
        if found.errors:
            warnings.warn(f"{len(found.errors)} of {len(rows)}: {next(iter(found.errors.values()))}", stacklevel=2)
        return rows[0] if is_single(entity) else rows

    def search(
        self, text: str, k: int = 10, *, kind: Literal["entity", "relation"] = "entity"
    ) -> list[name_search.Match]:
        """At most k entities (or relations) by a part of their name or label: (name, label, id, how) each.

        how: "exact", "prefix", "substring", or "fuzzy" (spelt like it); the strictest first, then the shortest.
        """
        _check_k(k)
        return name_search.search(self.entities if kind == "entity" else self.relations, text, k)

    def nearest(self, entity: Words, k: int = 10, *, ids: bool = False) -> Answers:
        """The k entities most like each given one, itself left out.

        By the cosine of their coordinates where the scorer multiplies entities or takes their direction, else by their
        distance, whose negative is the score; hyperbolic scorers: the distance of the tangent vectors.
        ids: whole numbers are row numbers; else they are names.
        """
        _check_k(k)
        found = self._entities(entity, "entity", ids)
        words, device = {"entity": found.texts(self.entities)}, self.relation_rows.device
        return self._answers(
            lambda at: nearest(self._model, found.ids[at].to(device), k), words, "neighbour", k, found.errors
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

    def with_entity(self, name: str, triples: Any) -> "TrainedModel":
        """A model with one entity more, placed by its neighbours without training (`distkgd.models.newcomers`).

        triples: as `score` takes them; each holds `name` once, and otherwise what the model knows. The data set must be
            at hand, whose train says who else has such triples.

        Raises DataError for a name that is known, and for triples without it or with words that mean nothing.
        """
        if self.entities.row_of_name(name) is not None:
            raise DataError(f"the model knows {name!r} already; with_entity is for a name that it does not know.")
        if self._model.query_bits != 32:
            raise ConfigError("a model with one entity more rounds no queries: load it without query_bits.")
        graph, labels = self._graph, self.entities.labels
        head, relation, tail = ([str(word) for word in column] for column in columns_of(triples))
        if not head or any((h == name) == (t == name) for h, t in zip(head, tail, strict=True)):
            raise DataError(f"each of the triples holds {name!r} once, as head or as tail; there is at least one.")
        names = pl.concat([self.entities.names, pl.Series("name", [name])])
        named = None if labels is None else pl.concat([labels, pl.Series("label", [None], dtype=pl.String)])
        entities = Vocabulary(names, named)
        loaded = replace(self._loaded, model=with_row(self._model, self.entity_rows[0]), entities=entities)
        made = TrainedModel(loaded, self._folder, self._data)
        added = made._given_triples(list(zip(head, relation, tail, strict=True)))
        every = torch.cat([graph.train.to(added.device), added])
        rows, newcomer = made.entity_rows, added.new_tensor([len(entities) - 1])
        rows[newcomer] = place_newcomers(rows, every, newcomer)
        made.__dict__["_graph"] = replace(graph, train=every.cpu(), entities=entities)
        return made

    def save(self, folder: str | Path) -> None:
        """Write a model folder; ConfigError when `folder` exists. Packed rows are widened."""
        if Path(folder).exists():
            raise ConfigError(f"{folder} exists; name a folder that does not exist yet.")
        kept = ("data", "source", "commit", "stage", "method")
        about = {key: self._loaded.config[key] for key in kept if key in self._loaded.config}
        save_model(Path(folder), self._model, self._loaded, about)

    @cached_property
    def _graph(self) -> Graph:
        graph, note = data_of(self._loaded, self._folder, self._data)
        if graph is None:
            raise ConfigError(
                "this needs the data set: distkgd.load(path, data=NAME_OR_FOLDER), or for exclude_known of an endpoint "
                f"distkgd register MODEL --known. {note}"
            )
        return graph

    @cached_property
    def _classifier(self) -> Classifier:
        return self.classifier()

    def _given_triples(self, given: Any) -> Tensor:
        """[n, 3] ids of triples, or of those in a file; DataError where a word of them means nothing."""
        if isinstance(given, str | Path):
            read = read_files({"train": given})
            given = words_of(read.rows["train"], read.entities, read.relations)
        columns, wrong = self._triples(given, False)
        if wrong:
            raise DataError(next(iter(wrong.values())))
        return torch.stack(columns, 1)

    @cached_property
    def _known(self) -> KnownAnswers:
        kept = None if self._data is not None else known_triples.read(Path(self._folder))
        triples = known_triples.of(self._graph) if kept is None else kept
        return KnownAnswers(triples.to(self.relation_rows.device), len(self.entities))

    def _best(self, queries: Queries, k: int, exclude_known: bool) -> tuple[Tensor, Tensor]:
        return top_k(self._model, queries, k, self._known.pairs(queries) if exclude_known else None)

    def _answers(
        self,
        best_of: Callable[[Tensor], tuple[Tensor, Tensor]],
        asked: dict[str, list[str]],
        answered: str,
        k: int,
        wrong: Mapping[int, str],
    ) -> Answers:
        """best_of: places of questions -> scores and ids of their answers. wrong: place of one that has none -> why."""
        vocabulary = self.relations if answered == "relation" else self.entities
        number = len(next(iter(asked.values())))
        places = _places(number, wrong)
        parts = [best_of(at) for at in places]
        shape = number, parts[0][0].shape[1] if parts else min(k, len(vocabulary))
        scores = (parts[0][0] if parts else self.relation_rows).new_full(shape, -torch.inf)
        ids = torch.full(shape, -1, device=scores.device)
        for at, (score, found) in zip(places, parts, strict=True):
            scores[at], ids[at] = score, found
        return Answers(ids.where(scores > -torch.inf, -1), scores, asked, answered, vocabulary, dict(wrong))

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


def keep_known(folder: Path) -> None:
    """Write the known triples of a model into its folder; ConfigError without its data set."""
    known_triples.write(folder, load(folder)._graph)


def _paired(name: str, found: Found, other_name: str, other: Found) -> tuple[Found, Found]:
    """Two columns of questions, as long as each other; a single word stands beside each of many."""
    if len(found.given) != len(other.given) and 1 not in (len(found.given), len(other.given)):
        raise ConfigError(
            f"{len(found.given)} of {name} and {len(other.given)} of {other_name}; give as many, or one of either."
        )
    num = max(len(found.given), len(other.given)) if len(found.given) and len(other.given) else 0
    return found.expand(num), other.expand(num)


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k={k}; allowed is a whole number >= 1.")


def _places(num: int, wrong: Mapping[int, str]) -> Sequence[Tensor]:
    """Places of the questions that have answers, so many at a time as are asked at once."""
    right = torch.tensor([place for place in range(num) if place not in wrong], dtype=torch.int64)
    return right.split(QUESTIONS_AT_ONCE) if len(right) else []
