"""Filtered ranking against all entities, sharded: each rank counts better and equal candidates among its own rows.

Protocol (design 6): both directions, ties by the realistic rank (mean of best and worst) within a small tolerance,
triples with entities unseen in training kept. `raw` keeps known answers among the candidates.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.crops import Crops
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rows import DEVICE_NUMBERS, Count, Field, Layout, Partial, Sum, reduce
from distkgd.distributed.tables import plan_route
from distkgd.graph.filters import KnownAnswers, both_sides
from distkgd.graph.sampling import excluded_from_shared
from distkgd.kernels import scores as kernels
from distkgd.model import Model

Ties = Literal["realistic", "optimistic", "pessimistic"]
Filter = Literal["filtered", "raw"]

# Scores nearer than this times max(1, |score|) are equal: far above fp32 rounding, far below real differences.
TIE_TOLERANCE = 1e-5
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
    return _ranks_of(model, None, triples, known, ranks, ties, filter_)[0]


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
    found = _ranks_of(model, Crops(model.scorer, dims), triples, known, ranks, ties, filter_)
    return dict(zip(dims, found, strict=True))


def _ranks_of(
    model: Model,
    crops: Crops | None,
    triples: Tensor,
    known: KnownAnswers,
    ranks: Ranks,
    ties: Ties,
    filter_: Filter,
) -> Tensor:
    # [P, n, 2], of P crops or of the one model.
    pieces = [
        _ranks_at_once(model, crops, triples[start : start + TRIPLES_AT_ONCE], known, ranks, ties, filter_)
        for start in range(0, len(triples), TRIPLES_AT_ONCE)
    ]
    if not pieces:
        planes = 1 if crops is None else len(crops.dims)
        return torch.zeros(planes, 0, 2, dtype=torch.float64, device=ranks.device)
    return torch.cat(pieces, 1)


def _ranks_at_once(
    model: Model,
    crops: Crops | None,
    triples: Tensor,
    known: KnownAnswers,
    ranks: Ranks,
    ties: Ties,
    filter_: Filter,
) -> Tensor:
    bounds = ranks.bounds(len(triples))
    lo, hi = ranks.share(model.entity.total)
    queries = both_sides(triples)
    excluded = excluded_from_shared(queries, None, lo, hi, known if filter_ == "filtered" else None)
    counts = [2 * (stop - start) for start, stop in pairwise(bounds)]
    at_once = SCORES_AT_ONCE if ranks.device.type == "cpu" else DEVICE_NUMBERS
    layout = Layout(ranks, counts=counts, num_candidates=hi - lo, excluded=excluded, block_numbers=at_once)
    mine = both_sides(triples[bounds[ranks.rank] : bounds[ranks.rank + 1]])
    n = len(mine.anchor)
    route = plan_route(torch.cat([mine.anchor, mine.answer]), None, model.entity.total, ranks)
    opened = model.entity.open(route, grad=False)
    anchor, answer = opened.lookup([n, n])
    relation = F.embedding(model.relation_ids(mine), model.relation)
    if crops is None:
        own = model.answer_scores(mine, anchor, relation, answer).unsqueeze(0)
        field = Field(layout, model.scorer.meet, model.project(mine, anchor, relation), opened.candidates())
    else:
        asked = crops.queries(mine, model.reciprocal, anchor, relation)
        own = crops.scores(crops.meet_own(asked, answer))
        field = Field(layout, crops.meet, asked, opened.candidates(), len(crops.dims))
    high, low = thresholds(own)

    def partials(z: Tensor, *limits: Tensor) -> dict[str, Partial]:
        z = z.unsqueeze(0) if crops is None else crops.scores(z)
        high, low = torch.stack(limits).chunk(2)
        if kernels.available(z):
            numbers = kernels.count(z, high.squeeze(-1), low.squeeze(-1))
            return {
                name: Sum(n.double().unsqueeze(-1)) for name, n in zip(("better", "no_worse"), numbers, strict=True)
            }
        return {"better": Count(z > high), "no_worse": Count(z >= low)}

    got = reduce(partials, field, per_query=(*high, *low))
    rank = rank_of_counts(got["better"], got["no_worse"], ties)
    by_triple = rank.T.reshape(n // 2, 2 * len(own))
    told = ranks.gather(by_triple, [count // 2 for count in counts], "partials")
    return told.reshape(len(triples), 2, len(own)).permute(2, 0, 1)


def thresholds(own: Tensor) -> tuple[Tensor, Tensor]:
    """Of answers' own scores: above which a candidate is better, and from which it is no worse."""
    tolerance = TIE_TOLERANCE * own.abs().clamp(min=1.0)
    return own + tolerance, own - tolerance


def rank_of_counts(better: Tensor, no_worse: Tensor, ties: Ties) -> Tensor:
    """The rank of an answer of which so many other candidates are better, and so many no worse."""
    return 1.0 + better + (no_worse - better) * {"realistic": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties]


def metrics(rank: Tensor) -> dict[str, float]:
    """MRR, Hits@k and mean rank of ranks of any shape; NaN-free: an empty tensor gives zeros."""
    rank = rank.reshape(-1).double()
    if not len(rank):
        return {"mrr": 0.0, **{f"hits_at_{k}": 0.0 for k in HITS}, "mean_rank": 0.0}
    hits = {f"hits_at_{k}": float((rank <= k).double().mean()) for k in HITS}
    return {"mrr": float((1.0 / rank).mean()), **hits, "mean_rank": float(rank.mean())}


def breakdown(
    rank: Tensor, triples: Tensor, categories: list[str], names: Mapping[int, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by direction, by relation category (1-1, 1-N, N-1, N-N) and by relation.

    rank: [n, 2] as from `ranks_of`. categories: category of each relation. names: relation id -> name.
    """
    relation = triples[:, 1].to(rank.device)
    out: dict[str, dict[str, dict[str, float]]] = {
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
