"""ComplEx: DistMult over complex numbers, asymmetric through the conjugate."""

from typing import ClassVar

import torch
from torch import Tensor

from distkgd.scorers.base import sign_of
from distkgd.scorers.bilinear import Bilinear
from distkgd.scorers.interleaved import complex_product, conjugate


class ComplEx(Bilinear):
    """Trouillon et al. 2016, "Complex Embeddings for Simple Link Prediction", Eq. 9–11.

    Formula: f = Re Σ_k h_k r_k conj(t_k), k = 1 … dim/2.
    Real numbers: dim per entity and dim per relation, stored (re, im, re, im, …); dim even. The papers'
    "d-dim" ComplEx has d complex numbers: it is dim = 2d here.
    Candidate form: query h·r (tails) or conj(r)·t (heads) as real numbers; one matrix product.
    """

    name: ClassVar[str] = "complex"
    dim_multiple: ClassVar[int] = 2
    complex_pairs = True

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return complex_product(h, r)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return complex_product(t, conjugate(r))

    def turned(self, r: Tensor, side: Tensor) -> Tensor:
        sign = sign_of(side)
        turned: Tensor = r.unflatten(-1, (-1, 2)) * torch.stack([sign.abs(), sign], -1).unsqueeze(1)
        return turned.flatten(-2)

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        return complex_product(conjugate(h), t)
