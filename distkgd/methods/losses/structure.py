"""The embedding structure of triples, as DualDE compares it: angle and length ratio of head and tail."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import PairScores
from distkgd.kernels.candidates import Candidates, plain
from distkgd.models.model import View
from distkgd.scorers.base import Scorer

_SMALLEST_NORM = 1e-6  # of an entity row, in the length ratio of DualDE Eq. 5


class Shapes:
    """Cosine and length ratio |h| / |t| of a view's head and tail rows (DualDE Eq. 5).

    positive: of its positives, [Q] each. fields: of its queries' anchors with every candidate.
    """

    positive: list[Tensor]
    fields: list[PairScores]

    def __init__(self, view: View | None, fields: bool) -> None:
        self.positive, self.fields = [], []
        if view is None:
            return
        asks_head = view.inputs.batch.queries.side == 1
        sign = torch.where(asks_head, -1.0, 1.0).to(view.anchor.dtype)
        scorer = view.model.scorer
        anchor, answer = scorer.coordinates(view.anchor), scorer.coordinates(view.answer)
        log_anchor = _log_norm(anchor)
        self.positive = [
            F.cosine_similarity(anchor, answer, dim=-1, eps=_SMALLEST_NORM),
            torch.exp(sign * (log_anchor - _log_norm(answer))),
        ]
        if fields:
            ratio = torch.stack([sign, sign * log_anchor], 1)
            self.fields = [
                view.field(F.normalize(anchor, dim=-1, eps=_SMALLEST_NORM), partial(_meet_cosine, scorer)),
                view.field(ratio, partial(_meet_ratio, scorer)),
            ]


def _log_norm(rows: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(rows, dim=-1).clamp(min=_SMALLEST_NORM))


def _meet_cosine(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    return queries @ F.normalize(scorer.coordinates(plain(rows)), dim=-1, eps=_SMALLEST_NORM).transpose(-1, -2)


def _meet_ratio(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    # exp(sign * (log |anchor| - log |candidate|)), sign = -1 where the candidate is the head.
    # The product gives autograd a result of its own: fields are written over where a pair does not count.
    lengths = _log_norm(scorer.coordinates(plain(rows))).unsqueeze(-2)
    return 1.0 * torch.exp(queries[..., 1:] - queries[..., :1] * lengths)
