"""DistMult: a diagonal bilinear form."""

from typing import ClassVar

from torch import Tensor

from distkgd.scorers.bilinear import Bilinear


class DistMult(Bilinear):
    """Yang et al. 2015, "Embedding Entities and Relations for Learning and Inference in Knowledge Bases",
    Eq. 2 with a diagonal matrix.

    Formula: f = Σ_k h_k r_k t_k.
    Real numbers: dim per entity, dim per relation (any dim ≥ 1).
    Candidate form: query h∘r or t∘r; one matrix product.
    """

    name: ClassVar[str] = "distmult"

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return h * r

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return t * r

    def turned(self, r: Tensor, side: Tensor) -> Tensor:
        return r

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        return h * t
