"""DistMult: a diagonal bilinear form."""

from typing import ClassVar, Literal

from torch import Tensor

from distkgd.kernels.candidates import Candidates
from distkgd.scorers.base import Init, Scorer
from distkgd.scorers.sums.tiles import inner


class DistMult(Scorer):
    """Yang et al. 2015, "Embedding Entities and Relations for Learning and Inference in Knowledge Bases",
    Eq. 2 with a diagonal matrix.

    Formula: f = Σ_k h_k r_k t_k.
    Real numbers: dim per entity, dim per relation (any dim ≥ 1).
    Candidate form: query h∘r or t∘r; one matrix product.
    """

    name: ClassVar[str] = "distmult"

    @property
    def relation_size(self) -> int:
        return self.dim

    @property
    def candidate_form(self) -> Literal["dot", "l2", "coordinates"]:
        return "dot"

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (h * r * t).sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return h * r

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return t * r

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        return h * t

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        return inner(q, c)

    def entity_init(self) -> Init:
        return Init("normal", 0.1)

    def relation_init(self) -> Init:
        return Init("normal", 0.1)
