"""Link prediction for people: the best heads or tails of one question, asked in words.

`top_k` answers any number of queries in bounded memory and on any number of ranks; `predict` turns words into one
query and its answers into rows that can be printed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from distkgd.data import Graph, Vocabulary, load_graph
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.data.triples import SPLITS
from distkgd.distributed.tables import plan_route
from distkgd.errors import ConfigError, DataError, ModelError
from distkgd.evaluation.entity_lookup import describe, find_rows, only_row, shown_names
from distkgd.kernels.packed import PackedRows
from distkgd.models.model import Model
from distkgd.models.model_folder import LoadedModel, data_since, same_vocabulary

SCORES_AT_ONCE = 1 << 22
UNPACKED_AT_ONCE = 1 << 20  # numbers of packed rows


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
    if isinstance(rows, PackedRows) and model.scorer.candidate_form != "dot":  # which unpacks a whole block
        width = max(k, min(width, UNPACKED_AT_ONCE // rows.shape[1]))
    for start in range(0, len(rows), width):
        stop = min(start + width, len(rows))
        block = model.scorer.score_candidates(projected, rows[start:stop].to(projected.dtype))
        block_ids = torch.arange(table.lo + start, table.lo + stop, device=block.device).expand(len(block), -1)
        if exclude is not None:
            query, entity = exclude
            here = (entity >= table.lo + start) & (entity < table.lo + stop)
            block[query[here], entity[here] - table.lo - start] = -torch.inf
        block, block_ids = best(block, block_ids, k)
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
    found, index = scores.topk(k)
    if found[:, 0].isnan().any():  # topk takes a NaN for the best; here it is as bad as a score can be
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        found, index = scores.topk(k)
    num = int((scores >= found[:, -1:]).sum(1).max())
    if num > k:
        found, index = scores.topk(num)
    by_id, order = ids.gather(1, index).sort(1)
    by_score, order_again = found.gather(1, order).sort(dim=1, descending=True, stable=True)
    return by_score[:, :k], by_id.gather(1, order_again)[:, :k]


def asking(head: Tensor, relation: Tensor, tail: Tensor, ask: Literal["tail", "head"]) -> Queries:
    """Triples ([n] ids each) as the answers of queries for their tails or heads."""
    side = torch.full_like(head, int(ask == "head"))
    return Queries(tail, relation, side, head) if ask == "head" else Queries(head, relation, side, tail)


@torch.no_grad()
def scores_of(model: Model, queries: Queries) -> Tensor:
    """[Q]: the score of each query's own answer; of a model in one process."""
    anchor, answer = (model.entity.rows(ids).to(model.relation.dtype) for ids in (queries.anchor, queries.answer))
    return model.answer_scores(queries, anchor, model.relation[model.relation_ids(queries)], answer)


def mean_scores(model: Model, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """[n] of n triples ([n] ids each): the mean of the scores as answers of either question, where these differ."""
    scores = scores_of(model, asking(head, relation, tail, "tail"))
    if model.reciprocal:
        scores = (scores + scores_of(model, asking(head, relation, tail, "head"))) / 2
    return scores


def best_relations(
    model: Model, head: Tensor, tail: Tensor, k: int, known: KnownAnswers | None = None
) -> tuple[Tensor, Tensor]:
    """([Q, k] scores, [Q, k] relation ids) of Q pairs ([Q] ids each), best first, by `mean_scores`.

    known: triples that come last, with score -inf.
    """
    every = torch.arange(model.num_relations, device=head.device)
    some = max(1, SCORES_AT_ONCE // max(1, len(every) * model.entity.dim))
    found = []
    for h, t in zip(head.split(some), tail.split(some), strict=True):
        columns = h.repeat_interleave(len(every)), every.repeat(len(h)), t.repeat_interleave(len(every))
        scores = mean_scores(model, *columns)
        if known is not None:
            query, answer = known.pairs(asking(*columns, "tail"))
            scores[query[answer == columns[2][query]]] = -torch.inf
        found.append(best(scores.reshape(len(h), len(every)), every.expand(len(h), -1), k))
    return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])


@torch.no_grad()
def nearest(model: Model, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([n, k] closeness, [n, k] entity ids) of the entities most like each of n others ([n] ids), itself left out.

    By angle or distance, as `TrainedModel.nearest` says.
    """
    scorer, table = model.scorer, model.entity
    by_angle = scorer.candidate_form == "dot" or scorer.name == "pairre"

    def rows(which: Tensor | slice) -> Tensor:
        found = scorer.coordinates(table.rows(which)).double()
        return found / found.norm(dim=1, keepdim=True).clamp_min(1e-12) if by_angle else found

    own, k = rows(ids), min(k, table.total - 1)
    scores, found = own.new_empty(len(ids), 0), ids.new_empty(len(ids), 0)
    width = max(k + 1, SCORES_AT_ONCE // max(1, len(ids)))
    for lo in range(0, table.total, width):
        block = rows(slice(lo, lo + width))
        near = own @ block.T if by_angle else -torch.cdist(own, block, compute_mode="donot_use_mm_for_euclid_dist")
        here = torch.arange(lo, lo + len(block), device=ids.device).expand(len(ids), -1)
        near[here == ids.unsqueeze(1)] = -torch.inf
        scores, found = best(torch.cat([scores, near], 1), torch.cat([found, here], 1), k)
    return scores, found


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
    entity, *also = find_rows(loaded.entities, "entity", text, ids)
    if also and graph is not None:
        count = degrees(graph)
        entity, *also = sorted([entity, *also], key=lambda row: (-int(count[row]), row))
    r = only_row(loaded.relations, "relation", relation, ids)
    device = loaded.model.relation.device
    side: Literal[0, 1] = 0 if head is not None else 1
    column = torch.tensor([entity], device=device)
    query = Queries(column, torch.full_like(column, r), torch.full_like(column, side), column)
    known = {} if graph is None else known_answers(graph, entity, r, side)
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
    asked, about = describe(loaded.entities, entity), describe(loaded.relations, r)
    question = f"({asked}, {about}, ?)" if side == 0 else f"(?, {about}, {asked})"
    notes = [_note(loaded.entities, text, entity, also, graph is not None)] if also else []
    return Prediction(question, answers, notes)


def predict_each(
    loaded: LoadedModel,
    graph: Graph | None,
    heads: Sequence[str] | None,
    tails: Sequence[str] | None,
    query_bits: int = 32,
    **asked: Any,
) -> Iterator[Prediction | DataError]:
    """`predict` for each head or each tail; of several questions one with an unknown word is its DataError.

    query_bits: 8 rounds queries to it, of packed models only; else ConfigError.
    """
    loaded = replace(loaded, model=loaded.model.in_query_bits(query_bits))
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


def _note(entities: Vocabulary, text: str, row: int, also: Sequence[int], counted: bool) -> str:
    why = "it has the most training triples" if counted else "it comes first; without the data nothing is counted"
    return (
        f"{len(also) + 1} entities are called {text!r}; took {describe(entities, row)} ({why}). "
        f"For another one give its name: {shown_names((describe(entities, row) for row in also), len(also))}."
    )
