"""What scorers share that are linear in head and in tail: a query meets candidates by an inner product."""

from abc import ABC
from typing import ClassVar

from torch import Tensor

from distkgd.kernels.candidates import Candidates
from distkgd.scorers.base import CandidateForm, Init, Scorer
from distkgd.scorers.sums.tiles import inner


class Bilinear(Scorer, ABC):
    """f is the inner product of (h, r)'s query and t, and of (r, t)'s query and h; one matrix product."""

    candidate_form: ClassVar[CandidateForm] = "dot"

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (self.tail_query(h, r) * t).sum(-1)

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        return inner(q, c)

    def entity_init(self) -> Init:
        return Init("normal", 0.1)

    def relation_init(self) -> Init:
        return Init("normal", 0.1)
