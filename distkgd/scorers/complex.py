"""ComplEx: DistMult over complex numbers, asymmetric through the conjugate."""

from typing import ClassVar, Literal

from torch import Tensor

from distkgd.kernels.candidates import Candidates
from distkgd.scorers.base import Init, Scorer
from distkgd.scorers.interleaved import complex_product, conjugate
from distkgd.scorers.sums.tiles import inner


class ComplEx(Scorer):
    """Trouillon et al. 2016, "Complex Embeddings for Simple Link Prediction", Eq. 9–11.

    Formula: f = Re Σ_k h_k r_k conj(t_k), k = 1 … dim/2.
    Real numbers: dim per entity and dim per relation, stored (re, im, re, im, …); dim even. The papers'
    "d-dim" ComplEx has d complex numbers: it is dim = 2d here.
    Candidate form: query h·r (tails) or conj(r)·t (heads) as real numbers; one matrix product.
    """

    name: ClassVar[str] = "complex"
    dim_multiple: ClassVar[int] = 2
    complex_pairs = True

    @property
    def relation_size(self) -> int:
        return self.dim

    @property
    def candidate_form(self) -> Literal["dot", "l2", "coordinates"]:
        return "dot"

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (self.tail_query(h, r) * t).sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return complex_product(h, r)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return complex_product(t, conjugate(r))

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        return complex_product(conjugate(h), t)

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        return inner(q, c)

    def entity_init(self) -> Init:
        return Init("normal", 0.1)

    def relation_init(self) -> Init:
        return Init("normal", 0.1)
