"""RotatE: a relation turns every complex coordinate."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from distkgd.kernels.pairs import Kind
from distkgd.scorers.base import Init, sign_of
from distkgd.scorers.distance import Distance
from distkgd.scorers.interleaved import as_complex, complex_product, join_pairs


class RotatE(Distance):
    """Sun et al. 2019, "RotatE: Knowledge Graph Embedding by Relational Rotation in Complex Space", Eq. 3;
    the margin is the γ of its loss.

    Formula: f = margin − Σ_k |h_k e^{iθ_k} − t_k|, k = 1 … dim/2: the sum of moduli of the authors' code,
    neither squared nor under a root over k. `norm` 2: margin − (Σ_k |h_k e^{iθ_k} − t_k|²)^½, as in PyKEEN.
    Real numbers: dim per entity, stored (re, im, re, im, …); dim/2 per relation, the phases θ in radians;
    dim even. The papers' "d-dim" RotatE is dim = 2d here.
    Candidate form: query h·e^{iθ} (tails) or t·e^{−iθ} (heads: a rotation keeps distances); the sum of moduli
    to the candidate, coordinate-wise; norm 2: norms + matrix product.
    """

    name: ClassVar[str] = "rotate"
    absolute: ClassVar[Kind] = "modulus"
    dim_multiple: ClassVar[int] = 2
    complex_pairs = True

    @property
    def relation_size(self) -> int:
        return self.dim // 2

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        apart = self.tail_query(h, r) - t
        if self.norm == 2:
            distance: Tensor = torch.linalg.vector_norm(apart, dim=-1)
            return self.margin - distance
        # Complex numbers have no half precision.
        moduli = as_complex(apart.to(torch.promote_types(apart.dtype, torch.float32))).abs()
        return self.margin - moduli.sum(-1).to(apart.dtype)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return complex_product(h, join_pairs(r.cos(), r.sin()))

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return self.tail_query(t, -r)

    def turned(self, r: Tensor, side: Tensor) -> Tensor:
        return r * sign_of(side).unsqueeze(1)

    def relation_init(self) -> Init:
        return Init("uniform", math.pi)
