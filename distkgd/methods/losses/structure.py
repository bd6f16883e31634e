"""The embedding structure of triples, as DualDE compares it: angle and length ratio of head and tail."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import PairScores
from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.kernels.rows import directions
from distkgd.models.model import View
from distkgd.scorers.base import Scorer
from distkgd.scorers.sums.tiles import inner

_SMALLEST_NORM = 1e-6  # of an entity row, in the length ratio of DualDE Eq. 5


def shape(view: View) -> list[Tensor]:
    """[Q] each: cosine and length ratio |h| / |t| of the head and tail rows of a view's positives (DualDE Eq. 5)."""
    anchor, answer = view.model.scorer.coordinates(view.anchor), view.model.scorer.coordinates(view.answer)
    if anchor.device.type != "cpu":  # the same in fewer kernels
        (one, first), (other, second) = (directions(rows, _SMALLEST_NORM) for rows in (anchor, answer))
        return [(one * other).sum(-1), torch.exp(_sign(view) * (first - second))]
    angle = F.cosine_similarity(anchor, answer, dim=-1, eps=_SMALLEST_NORM)
    return [angle, torch.exp(_sign(view) * (_log_norm(anchor) - _log_norm(answer)))]


def shape_fields(view: View) -> list[PairScores]:
    """The same two of the anchor of every query with every candidate."""
    scorer, sign = view.model.scorer, _sign(view)
    anchor, rows = scorer.coordinates(view.anchor), view.negatives.rows
    if isinstance(rows, GatheredRows) and anchor.device.type != "cpu":
        # A listed row is measured once, however often it is listed.
        (unit, length), (of_rows, lengths) = (
            directions(x, _SMALLEST_NORM) for x in (anchor, scorer.coordinates(rows.table))
        )
        asked = torch.stack([sign, sign * length], 1)
        return [
            PairScores(view.inputs.layout, inner, unit, replace(rows, table=of_rows)),
            PairScores(view.inputs.layout, _meet_lengths, asked, replace(rows, table=lengths.unsqueeze(1))),
        ]
    return [
        view.field(F.normalize(anchor, dim=-1, eps=_SMALLEST_NORM), partial(_meet_cosine, scorer)),
        view.field(torch.stack([sign, sign * _log_norm(anchor)], 1), partial(_meet_ratio, scorer)),
    ]


def _sign(view: View) -> Tensor:
    # [Q] -1 where the anchor is the tail.
    return torch.rsub(view.inputs.batch.queries.side.to(view.anchor.dtype), 1.0, alpha=2)


def _log_norm(rows: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(rows, dim=-1).clamp(min=_SMALLEST_NORM))


def _meet_cosine(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    return queries @ F.normalize(scorer.coordinates(plain(rows)), dim=-1, eps=_SMALLEST_NORM).transpose(-1, -2)


def _meet_ratio(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    return _meet_lengths(queries, _log_norm(scorer.coordinates(plain(rows))).unsqueeze(-1))


def _meet_lengths(queries: Tensor, rows: Candidates) -> Tensor:
    # exp(sign * (log |anchor| - log |candidate|)), sign = -1 where the candidate is the head.
    # The product gives autograd a result of its own: fields are written over where a pair does not count.
    return 1.0 * torch.exp(queries[..., 1:] - queries[..., :1] * plain(rows).mT)
