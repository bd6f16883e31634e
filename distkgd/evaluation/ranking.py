"""Filtered ranking against all entities, sharded: each rank counts better and equal candidates among its own rows.

Protocol (design 6): both directions, ties by the realistic rank (mean of best and worst) within a small tolerance,
triples with entities unseen in training kept. `raw` keeps known answers among the candidates.

Nothing profits from scores that are no numbers: an answer whose own score is NaN or infinite ranks last, and a
candidate whose score is NaN counts as better.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.common.metrics import Metrics
from distkgd.data.filters import KnownAnswers, Queries, both_sides
from distkgd.data.sampling import excluded_from_shared
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.candidate_layout import DEVICE_NUMBERS, MASKED_SCORE, CandidateLayout, PairScores
from distkgd.distributed.reductions.loss_requests import reduce
from distkgd.distributed.reductions.partials import Count, Partial, Sum
from distkgd.distributed.tables import plan_route
from distkgd.kernels import scores as kernels
from distkgd.models.model import Model
from distkgd.models.nested_scores import NestedScores

Ties = Literal["realistic", "optimistic", "pessimistic"]
Filter = Literal["filtered", "raw"]

# Scores are equal that are nearer than this share of the spread (largest less smallest) of the query's scores of
# FIXED_ENTITIES entities, evenly spaced by id; and never further apart than LEAST_ULPS units in the last place of the
# answer's own: far above rounding, far below real differences, and the same ranks for scores times any power of two.
TIE_TOLERANCE = 1e-5
FIXED_ENTITIES = 1024
LEAST_ULPS = 16
TRIPLES_AT_ONCE = 512
SCORES_AT_ONCE = 1 << 20  # on a CPU: what stays in the cache
HITS = (1, 3, 10)


def protocol(ties: Ties = "realistic", filter_: Filter = "filtered") -> dict[str, Any]:
    """What a printed MRR means, in words."""
    return {
        "filter": filter_,
        "candidates": "all",
        "ties": ties,
        "tie_tolerance": TIE_TOLERANCE,
        "tie_scale": f"spread of a query's scores of {FIXED_ENTITIES} fixed entities, at least {LEAST_ULPS} ulp",
        "directions": "both",
        "unseen": "kept",
    }


@torch.no_grad()
def ranks_of(
    model: Model,
    triples: Tensor,
    known: KnownAnswers,
    ranks: Ranks,
    *,
    ties: Ties = "realistic",
    filter_: Filter = "filtered",
) -> Tensor:
    """[n, 2] float64: rank of the true tail and of the true head of each triple, the same on every rank.

    triples: [n, 3] int64.
    """
    return ranks_and_ties_of(model, triples, known, ranks, ties=ties, filter_=filter_)[0]


@torch.no_grad()
def ranks_and_ties_of(
    model: Model,
    triples: Tensor,
    known: KnownAnswers,
    ranks: Ranks,
    *,
    ties: Ties = "realistic",
    filter_: Filter = "filtered",
) -> tuple[Tensor, Tensor]:
    """`ranks_of`, and [n, 2] bool: whether at least one other candidate is as good as the answer."""
    rank, tied = _ranks_of(model, None, triples, known, ranks, ties, filter_)[:, 0]
    return rank, tied > 0


@torch.no_grad()
def ranks_of_crops(
    model: Model,
    dims: Sequence[int],
    triples: Tensor,
    known: KnownAnswers,
    ranks: Ranks,
    *,
    ties: Ties = "realistic",
    filter_: Filter = "filtered",
) -> dict[int, Tensor]:
    """dim -> `ranks_of` the crop of `model` to it, for ascending `dims`, in one pass over the candidates."""
    found, _ = _ranks_of(model, NestedScores(model.scorer, dims), triples, known, ranks, ties, filter_)
    return dict(zip(dims, found, strict=True))


def _ranks_of(
    model: Model,
    crops: NestedScores | None,
    triples: Tensor,
    known: KnownAnswers,
    ranks: Ranks,
    ties: Ties,
    filter_: Filter,
) -> Tensor:
    # [2, P, n, 2], of P crops or of the one model: ranks, and how many other candidates are as good.
    model = model.rounded()
    others = known if filter_ == "filtered" else None
    ids = fixed_entities(model.entity.total, triples.device)
    route = plan_route(ids, None, model.entity.total, ranks)
    (fixed,) = model.entity.open(route, grad=False).lookup([len(ids)])
    pieces = [
        _ranks_at_once(model, crops, triples[start : start + TRIPLES_AT_ONCE], fixed, others, ranks, ties)
        for start in range(0, len(triples), TRIPLES_AT_ONCE)
    ]
    if not pieces:
        planes = 1 if crops is None else len(crops.dims)
        return torch.zeros(2, planes, 0, 2, dtype=torch.float64, device=ranks.device)
    return torch.cat(pieces, 2)


def _ranks_at_once(
    model: Model,
    crops: NestedScores | None,
    triples: Tensor,
    fixed: Tensor,
    known: KnownAnswers | None,
    ranks: Ranks,
    ties: Ties,
) -> Tensor:
    # fixed: [k, entity_size] rows of the fixed entities, on every rank.
    bounds, total = ranks.bounds(len(triples)), model.entity.total
    lo, hi = ranks.share(total)
    excluded = excluded_from_shared(both_sides(triples), None, lo, hi, known)
    counts = [2 * (stop - start) for start, stop in pairwise(bounds)]
    at_once = SCORES_AT_ONCE if ranks.device.type == "cpu" else DEVICE_NUMBERS
    layout = CandidateLayout(ranks, counts=counts, num_candidates=hi - lo, excluded=excluded, block_numbers=at_once)
    mine = both_sides(triples[bounds[ranks.rank] : bounds[ranks.rank + 1]])
    n = len(mine.anchor)
    opened = model.entity.open(plan_route(torch.cat([mine.anchor, mine.answer]), None, total, ranks), grad=False)
    anchor, answer = opened.lookup([n, n])
    relation = F.embedding(model.relation_ids(mine), model.relations)
    if crops is None:
        asked = model.project(mine, anchor, relation)
        own = model.answer_scores(mine, anchor, relation, answer).unsqueeze(0)
        spread = spread_of(model.scorer.score_candidates(asked, fixed)).unsqueeze(0)
        field = PairScores(layout, model.scorer.score_candidates, asked, opened.candidates())
    else:
        asked = crops.queries(mine, model.reciprocal, anchor, relation)
        own = crops.scores(crops.score_own_answers(asked, answer))
        spread = spread_of(crops.scores(crops.score_candidates(asked, fixed)))
        field = PairScores(layout, crops.score_candidates, asked, opened.candidates(), len(crops.dims))

    def partials(z: Tensor, *limits: Tensor) -> dict[str, Partial]:
        z = z.unsqueeze(0) if crops is None else crops.scores(z)
        high, low = torch.stack(limits).chunk(2)
        if kernels.available(z):
            numbers = kernels.count(z, high.squeeze(-1), low.squeeze(-1))
            return {name: Sum(n.double().unsqueeze(-1)) for name, n in zip(("at_most", "below"), numbers, strict=True)}
        return {"at_most": Count(z <= high), "below": Count(z < low)}

    high, low = thresholds(own, spread)
    got = reduce(partials, field, per_query=(*high, *low))
    # Pairs that do not count are below all; a NaN is neither at most nor below anything.
    rank = rank_of_counts(total - got["at_most"], total - got["below"], ties)
    rank = unsound_last(rank, own, mine, total, known)
    both = torch.stack([rank, got["at_most"] - got["below"]])
    by_triple = both.permute(2, 0, 1).reshape(n // 2, 4 * len(own))
    told = ranks.gather(by_triple, [count // 2 for count in counts], "partials")
    return told.reshape(len(triples), 2, 2, len(own)).permute(2, 3, 0, 1)


def fixed_entities(total: int, device: torch.device | None = None) -> Tensor:
    """[k] int64: the entities, of `total`, whose scores say how wide a query's scores are spread."""
    few = min(FIXED_ENTITIES, total)
    return torch.arange(few, device=device) * total // few


def spread_of(scores: Tensor) -> Tensor:
    """[...]: largest less smallest of [..., k] scores of the fixed entities; 0 where one is no number, or as far away
    as what does not count."""
    smallest, largest = torch.aminmax(scores, dim=-1)
    spread = largest - smallest
    return torch.where(spread < -MASKED_SCORE / 2, spread, 0.0)


def thresholds(own: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Of answers' own scores: above which a candidate is better, and from which it is no worse.

    spread: of each query's scores, as `spread_of` has it.
    """
    ulp = torch.nextafter(own.abs(), own.new_tensor(torch.inf)) - own.abs()
    tolerance = torch.maximum(TIE_TOLERANCE * spread, LEAST_ULPS * ulp)
    return own + tolerance, own - tolerance


def unsound_last(rank: Tensor, own: Tensor, queries: Queries, total: int, known: KnownAnswers | None) -> Tensor:
    """[..., Q] ranks; answers whose `own` score is NaN, infinite or beyond MASKED_SCORE / 2 come last, by any rule.

    known: answers that are no candidates.
    """
    unsound = ~(own.abs() < -MASKED_SCORE / 2)
    if not unsound.any():
        return rank
    query, entity = excluded_from_shared(queries, None, 0, total, known)
    left_out = torch.bincount(torch.unique(query * total + entity) // total, minlength=len(queries.answer))
    return torch.where(unsound, (1 + total - left_out).double(), rank)


def rank_of_counts(better: Tensor, no_worse: Tensor, ties: Ties) -> Tensor:
    """The rank of an answer of which so many other candidates are better, and so many no worse."""
    return 1.0 + better + (no_worse - better) * {"realistic": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties]


def metrics(rank: Tensor, tied: Tensor | None = None) -> Metrics:
    """MRR, Hits@k and mean rank of ranks of any shape; all None of no ranks, which no comparison takes for a number.

    tied: of `ranks_and_ties_of`; then also the share of the answers that are tied with another candidate.
    """
    rank = rank.reshape(-1).double()
    if not len(rank):
        names = ("mrr", *(f"hits_at_{k}" for k in HITS), "mean_rank")
        return dict.fromkeys(names if tied is None else (*names, "tied"))
    hits = {f"hits_at_{k}": float((rank <= k).double().mean()) for k in HITS}
    ties = {} if tied is None else {"tied": float(tied.double().mean())}
    return {"mrr": float((1.0 / rank).mean()), **hits, "mean_rank": float(rank.mean()), **ties}


def breakdown(
    rank: Tensor, triples: Tensor, categories: list[str], names: Mapping[int, str]
) -> dict[str, dict[str, Metrics]]:
    """Metrics by direction, by relation category (1-1, 1-N, N-1, N-N) and by relation.

    rank: [n, 2] as from `ranks_of`. categories: category of each relation. names: relation id -> name.
    """
    relation = triples[:, 1].to(rank.device)
    out: dict[str, dict[str, Metrics]] = {
        "direction": {"tail": metrics(rank[:, 0]), "head": metrics(rank[:, 1])},
        "category": {},
        "relation": {},
    }
    for category in ("1-1", "1-N", "N-1", "N-N"):
        members = torch.tensor([i for i, c in enumerate(categories) if c == category], device=rank.device)
        here = torch.isin(relation, members)
        if here.any():
            out["category"][category] = metrics(rank[here]) | {"num_triples": float(here.sum())}
    for r in relation.unique().tolist():
        here = relation == r
        out["relation"][names[r]] = metrics(rank[here]) | {"num_triples": float(here.sum())}
    return out
