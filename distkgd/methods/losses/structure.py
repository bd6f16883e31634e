"""The embedding structure of triples, as DualDE compares it: angle and length ratio of head and tail."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import PairScores
from distkgd.kernels import dualde as kernels
from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.kernels.rows import directions
from distkgd.models.view import View
from distkgd.scorers.base import Scorer
from distkgd.scorers.sums.tiles import inner

_SMALLEST_NORM = 1e-6  # of an entity row

# The cosine of head and tail, and the logarithm of their length ratio |h| / |t| (DualDE Eq. 5).
Shape = tuple[Tensor, Tensor]
ShapeFields = tuple[PairScores, PairScores]


def structure(view: View, sign: Tensor) -> tuple[Shape, ShapeFields]:
    """The shape [Q] each of a view's positives, and that of the anchor of every query with every candidate.

    sign: [Q] 1 where the anchor is the head, -1 where it is the tail.
    """
    scorer, rows = view.model.scorer, view.negatives.rows
    anchor, answer = scorer.coordinates(view.anchor), scorer.coordinates(view.answer)
    if kernels.available([anchor]):
        unit, asked, angle, ratio = kernels.shapes(anchor, answer, sign, _SMALLEST_NORM)
    else:
        unit, length = F.normalize(anchor, dim=-1, eps=_SMALLEST_NORM), _log_norm(anchor)
        angle = F.cosine_similarity(anchor, answer, dim=-1, eps=_SMALLEST_NORM)
        asked, ratio = torch.stack([sign * length, -sign], 1), sign * (length - _log_norm(answer))
    if isinstance(rows, GatheredRows) and anchor.device.type != "cpu":
        # A listed row is measured once, however often it is listed.
        of_rows, lengths = directions(scorer.coordinates(rows.table), _SMALLEST_NORM)
        fields = (
            PairScores(view.inputs.layout, inner, unit, replace(rows, table=of_rows)),
            PairScores(view.inputs.layout, inner, asked, replace(rows, table=_with_one(lengths))),
        )
    else:
        fields = view.field(unit, partial(_meet_cosine, scorer)), view.field(asked, partial(_meet_lengths, scorer))
    return (angle, ratio), fields


def _log_norm(rows: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(rows, dim=-1).clamp(min=_SMALLEST_NORM))


def _with_one(lengths: Tensor) -> Tensor:
    return F.pad(lengths.unsqueeze(-1), (1, 0), value=1.0)


def _meet_cosine(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    return queries @ F.normalize(scorer.coordinates(plain(rows)), dim=-1, eps=_SMALLEST_NORM).transpose(-1, -2)


def _meet_lengths(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    # sign * (log |anchor| - log |candidate|), sign = -1 where the candidate is the head.
    return queries[..., :1] + queries[..., 1:] * _log_norm(scorer.coordinates(plain(rows))).unsqueeze(-2)
