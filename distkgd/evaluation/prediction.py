"""Link prediction for people: the best heads or tails of one question, asked in words.

`top_k` answers any number of queries in bounded memory and on any number of ranks; `predict` turns words into one
query and its answers into rows that can be printed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import polars as pl
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from distkgd.data import Graph, Vocabulary, load_graph
from distkgd.data.filters import Queries
from distkgd.data.triples import SPLITS, loose
from distkgd.distributed.tables import plan_route
from distkgd.errors import ConfigError, DataError, ModelError, shorten
from distkgd.models.model import Model
from distkgd.models.model_folder import LoadedModel, data_since, same_vocabulary

SCORES_AT_ONCE = 1 << 22
NAMES_SHOWN = 5
WHOLE = re.compile(r"-?\d+")
ROW_NUMBERS = 'ids=True in Python, --ids with launch/predict.py, "ids": true in a question'


@dataclass(frozen=True)
class Match:
    """The row that a text means; `also`: other rows it could have meant, most frequent first; `asked`: the text."""

    id: int
    also: tuple[int, ...]
    asked: str


@dataclass(frozen=True)
class Answer:
    """One line of a prediction. known: the split that holds the triple, "" for none, None when there is no data."""

    rank: int
    score: float
    name: str
    label: str
    known: str | None


@dataclass(frozen=True)
class Prediction:
    """The question with its words resolved, the answers, and what the user should know about the choice of words."""

    question: str
    answers: list[Answer]
    notes: list[str]


@torch.no_grad()
def top_k(
    model: Model,
    queries: Queries,
    k: int,
    exclude: tuple[Tensor, Tensor] | None = None,
    scores_at_once: int = SCORES_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """([Q, k] scores, [Q, k] int64 entity ids): the best candidates of each query among all entities, best first.

    Equal scores are ordered by id. k is cut to the number of entities. With several ranks all of them pass the same
    queries and get the same answer.

    queries: `reduce_over_candidates` is not read.
    exclude: ([p] query position, [p] entity): pairs that come last, with score -inf.
    scores_at_once: about how many scores exist at a time.
    """
    table, ranks = model.entity, model.entity.ranks
    opened = table.open(plan_route(queries.anchor, None, table.total, ranks), grad=False)
    relation = F.embedding(model.relation_ids(queries), model.relations)
    projected = model.project(queries, opened.lookup([len(queries.anchor)])[0], relation)
    rows, k = opened.candidates(), min(k, table.total)
    scores = projected.new_empty(len(projected), 0)
    ids = queries.anchor.new_empty(len(projected), 0)
    width = max(k, scores_at_once // max(1, len(projected)))
    for start in range(0, len(rows), width):
        stop = min(start + width, len(rows))
        block = model.scorer.score_candidates(projected, rows[start:stop].to(projected.dtype))
        block_ids = torch.arange(table.lo + start, table.lo + stop, device=block.device).expand(len(block), -1)
        if exclude is not None:
            query, entity = exclude
            here = (entity >= table.lo + start) & (entity < table.lo + stop)
            block[query[here], entity[here] - table.lo - start] = -torch.inf
        scores, ids = best(torch.cat([scores, block], 1), torch.cat([ids, block_ids], 1), k)
    if ranks.world > 1:
        # A shard may hold fewer than k rows; the others must still know how many numbers it sends.
        kept = [min(k, hi - lo) for lo, hi in pairwise(ranks.bounds(table.total))]
        gathered = ranks.gather(scores.T, kept, "partials"), ranks.gather(ids.T, kept, "partials")
        scores, ids = best(gathered[0].T, gathered[1].T, k)
    return scores, ids


def best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([Q, k] scores, [Q, k] ids): the best of [Q, n] each, best first, equal scores by id; NaN counts as -inf."""
    # topk leaves the order of equal scores open, so all that equal the last one are taken along before the cut.
    k = min(k, scores.shape[1])
    if not k or not len(scores):
        return scores[:, :k], ids[:, :k]
    top = scores.topk(k).values
    if top[:, 0].isnan().any():  # topk takes a NaN for the best; here it is as bad as a score can be
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        top = scores.topk(k).values
    last = top[:, -1:]
    found, index = scores.topk(max(k, int((scores >= last).sum(1).max())))
    by_id, order = ids.gather(1, index).sort(1)
    by_score, order_again = found.gather(1, order).sort(dim=1, descending=True, stable=True)
    return by_score[:, :k], by_id.gather(1, order_again)[:, :k]


def data_of(loaded: LoadedModel, folder: str, given: str | None) -> tuple[Graph | None, str]:
    """The graph to look known triples up in, and a line about it, "" when there is nothing to say.

    given: name or folder the user gave, which must then fit; None tries the model's own source and does without it.
    """
    source = str(loaded.config.get("source", "")) if given is None else given
    try:
        graph = load_graph(source)
        same_vocabulary(loaded, graph, folder)
    except (DataError, ModelError) as error:
        if given is not None:
            raise
        return None, f"No triple is marked as known: the data set {source!r} is not at hand ({error})"
    since = data_since(loaded, graph)
    return graph, since and f"{since}; triples are marked as known that are in it now"


def predict(
    loaded: LoadedModel,
    graph: Graph | None,
    *,
    head: str | None,
    relation: str,
    tail: str | None,
    top: int = 10,
    exclude_known: bool = False,
    ids: bool = False,
) -> Prediction:
    """The `top` best answers to (head, relation, ?) or (?, relation, tail).

    graph: of the model's vocabulary; None when it is not at hand: no triple is then marked as known.
    ids: words that are whole numbers are row numbers; else they are names.

    Raises ConfigError for a question that cannot be asked, DataError for an unknown or ambiguous word.
    """
    text = tail if head is None else head
    if text is None or (head is not None and tail is not None):
        raise ConfigError("give exactly one of --head and --tail; the other one is what is asked for.")
    if exclude_known and graph is None:
        raise ConfigError("--exclude-known needs the data set, which is not at hand; give --data NAME_OR_FOLDER.")
    if ids and WHOLE.fullmatch(text):
        entity = Match(_row_number(loaded.entities, text), (), text)
    else:
        entity = find_entity(loaded.entities, text, None if graph is None else degrees(graph))
    by_number = ids and WHOLE.fullmatch(relation)
    r = _row_number(loaded.relations, relation) if by_number else find_relation(loaded.relations, relation)
    device = loaded.model.relation.device
    side: Literal[0, 1] = 0 if head is not None else 1
    column = torch.tensor([entity.id], device=device)
    query = Queries(column, torch.full_like(column, r), torch.full_like(column, side), column)
    known = {} if graph is None else known_answers(graph, entity.id, r, side)
    exclude = None
    if exclude_known:
        out = torch.tensor(sorted(known), device=device, dtype=torch.int64)
        exclude = (torch.zeros_like(out), out)
    scores, found = (x[0].tolist() for x in top_k(loaded.model, query, top, exclude))
    answers = [
        Answer(
            rank + 1,
            score,
            loaded.entities.name(i),
            loaded.entities.label(i),
            None if graph is None else known.get(i, ""),
        )
        for rank, (score, i) in enumerate(zip(scores, found, strict=True))
        if score > -torch.inf
    ]
    asked, about = describe(loaded.entities, entity.id), describe(loaded.relations, r)
    question = f"({asked}, {about}, ?)" if side == 0 else f"(?, {about}, {asked})"
    return Prediction(question, answers, _notes(loaded.entities, entity, graph is not None))


def predict_each(
    loaded: LoadedModel, graph: Graph | None, heads: Sequence[str] | None, tails: Sequence[str] | None, **asked: Any
) -> Iterator[Prediction | DataError]:
    """`predict` for each head or each tail; of several questions one with an unknown word is its DataError."""
    nobody: list[str | None] = [None]
    ends = [(head, tail) for head in heads or nobody for tail in tails or nobody]
    for head, tail in ends:
        try:
            yield predict(loaded, graph, head=head, tail=tail, **asked)
        except DataError as error:
            if len(ends) == 1:
                raise
            yield error


def table(prediction: Prediction) -> Table:
    """The answers for a terminal, without columns that would say nothing."""
    columns = ["name"]
    if any(answer.label != answer.name for answer in prediction.answers):
        columns.append("label")
    if any(answer.known is not None for answer in prediction.answers):
        columns.append("known")
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for title in ("rank", "score"):
        drawn.add_column(title, justify="right")
    for title in columns:
        drawn.add_column(title, overflow="fold")
    for a in prediction.answers:
        texts = [getattr(a, column) or "" for column in columns]
        drawn.add_row(*map(Text, [str(a.rank), f"{a.score:.4f}", *texts]))
    return drawn


def known_answers(graph: Graph, anchor: int, relation: int, side: int) -> dict[int, str]:
    """Entity id -> the first split that has it as an answer of (anchor, relation, side)."""
    known: dict[int, str] = {}
    for split in SPLITS:
        triples = getattr(graph, split)
        here = (triples[:, 2 * side] == anchor) & (triples[:, 1] == relation)
        for answer in triples[here, 2 - 2 * side].tolist():
            known.setdefault(answer, split)
    return known


def degrees(graph: Graph) -> Tensor:
    """[num_entities] int64: training triples of each entity."""
    return torch.bincount(graph.train[:, [0, 2]].reshape(-1), minlength=graph.num_entities)


def _row_number(vocabulary: Vocabulary, text: str) -> int:
    """The row that `text` is the number of; DataError where there is no such row."""
    row = int(text) if len(text) < 20 else len(vocabulary)  # Python reads no number of thousands of digits
    vocabulary.name(row)
    return row


def find_entity(
    vocabulary: Vocabulary, text: str, count: Tensor | None, exact: bool = False, hint: bool = True
) -> Match:
    """The entity that `text` means: an exact name, else an exact label, else (unless `exact`) a loose match.

    hint: whether the error of an unknown one names the nearest spellings, which takes longest.

    Of several with that label the one with the largest `count` is taken (the first without counts).
    """
    rows = _rows(vocabulary, text, exact)
    if not rows and not exact:
        rows = _suffix_rows(vocabulary, text)
        if len(rows) > 1:
            raise _ambiguous("entities", vocabulary, text, rows)
    if not rows:
        raise _unknown("entity", vocabulary, text, hint)
    if count is not None:
        rows.sort(key=lambda row: (-int(count[row]), row))
    return Match(rows[0], tuple(rows[1:]), text)


def find_relation(vocabulary: Vocabulary, text: str, exact: bool = False, hint: bool = True) -> int:
    """The relation that `text` means; a guess between several would change the question, so that is an error.

    hint: as for `find_entity`.
    """
    rows = _rows(vocabulary, text, exact) or ([] if exact else _suffix_rows(vocabulary, text))
    if not rows:
        raise _unknown("relation", vocabulary, text, hint)
    if len(rows) > 1:
        raise _ambiguous("relations", vocabulary, text, rows)
    return rows[0]


def describe(vocabulary: Vocabulary, row: int) -> str:
    """A name, with its label where that says more."""
    name, label = vocabulary.name(row), vocabulary.label(row)
    return name if _loose_text(label) == _loose_text(name) else f"{label} [{name}]"


def _rows(vocabulary: Vocabulary, text: str, exact: bool = False) -> list[int]:
    # Rows of the strictest reading that has any: name, label, loose name, loose label.
    columns = [column for column in (vocabulary.names, vocabulary.labels) if column is not None]
    for column in columns:
        if rows := (column == text).arg_true().to_list():
            return [int(row) for row in rows]
    loose = "" if exact else _loose_text(text)
    for column in vocabulary.loose if loose else ():
        if rows := (column == loose).arg_true().to_list():
            return [int(row) for row in rows]
    return []


def _suffix_rows(vocabulary: Vocabulary, text: str) -> list[int]:
    # "genre" for /film/film/genre, "OrderedDict" for class:collections.OrderedDict.
    wanted = _loose_text(text).lstrip("/.:")
    if not wanted:
        return []
    names = vocabulary.loose[0]
    ends = [names.str.ends_with(sign + wanted) for sign in "/.:"]
    return [int(row) for row in (ends[0] | ends[1] | ends[2]).arg_true().to_list()]


def _loose_text(text: str) -> str:
    return str(loose(pl.Series([text]))[0])


def _notes(entities: Vocabulary, found: Match, counted: bool) -> list[str]:
    notes = []
    if found.also:
        shown = ", ".join(describe(entities, row) for row in found.also[:NAMES_SHOWN])
        more = f" and {len(found.also) - NAMES_SHOWN} more" if len(found.also) > NAMES_SHOWN else ""
        why = "it has the most training triples" if counted else "it comes first; without the data nothing is counted"
        notes.append(
            f"{len(found.also) + 1} entities are called {found.asked!r}; took {describe(entities, found.id)} ({why}). "
            f"For another one give its name: {shown}{more}."
        )
    return notes


def _ambiguous(kind: str, vocabulary: Vocabulary, text: str, rows: list[int]) -> DataError:
    shown = ", ".join(repr(vocabulary.name(row)) for row in rows[:NAMES_SHOWN])
    more = f" and {len(rows) - NAMES_SHOWN} more" if len(rows) > NAMES_SHOWN else ""
    return DataError(f"{len(rows)} {kind} fit {shorten(text)!r}: {shown}{more}; give one of these names.")


def _unknown(kind: str, vocabulary: Vocabulary, text: str, hint: bool = True) -> DataError:
    told = f"no {kind} of the model ({len(vocabulary):,}) is called {shorten(text)!r}"
    if hint:
        nearest = vocabulary.nearest(text)
        told += f"; nearest: {', '.join(map(repr, nearest))}" if nearest else "; nothing is spelt like it"
    told += f". If a row number is meant, say so: {ROW_NUMBERS}" if WHOLE.fullmatch(text) else ""
    return DataError(f"{told}.")
