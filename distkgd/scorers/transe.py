"""TransE: a relation is a translation."""

from typing import ClassVar

import torch
from torch import Tensor

from distkgd.kernels.pairs import Kind
from distkgd.scorers.base import Init, sign_of
from distkgd.scorers.distance import Distance


class TransE(Distance):
    """Bordes et al. 2013, "Translating Embeddings for Modeling Multi-relational Data", §2 (d(h + ℓ, t)).

    Formula: f = margin − ‖h + r − t‖_p, p = `norm` in {1, 2}; the norm is not squared.
    Real numbers: dim per entity, dim per relation (any dim ≥ 1).
    Candidate form: query h + r (tails) or t − r (heads); distance to the candidate, coordinate-wise for
    p = 1, norms and one matrix product for p = 2.

    The paper's constraint ‖entity‖ = 1 is not part of the formula and is not applied here.
    """

    name: ClassVar[str] = "transe"
    absolute: ClassVar[Kind] = "manhattan"

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        distance: Tensor = torch.linalg.vector_norm(h + r - t, ord=self.norm, dim=-1)
        return self.margin - distance

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return h + r

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r

    def turned(self, r: Tensor, side: Tensor) -> Tensor:
        return r * sign_of(side).unsqueeze(1)

    def relation_init(self) -> Init:
        return self.entity_init()
