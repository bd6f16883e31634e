"""TransE: a relation is a translation."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.scorers.base import Init, Scorer
from distkgd.scorers.sums.terms import Manhattan, Square, Term
from distkgd.scorers.sums.tiles import FEW_QUERIES, pair_sums


class TransE(Scorer):
    """Bordes et al. 2013, "Translating Embeddings for Modeling Multi-relational Data", §2 (d(h + ℓ, t)).

    Formula: f = margin − ‖h + r − t‖_p, p = `norm` in {1, 2}; the norm is not squared.
    Real numbers: dim per entity, dim per relation (any dim ≥ 1).
    Candidate form: query h + r (tails) or t − r (heads); distance to the candidate, coordinate-wise for
    p = 1, norms and one matrix product for p = 2.

    The paper's constraint ‖entity‖ = 1 is not part of the formula and is not applied here.
    """

    name: ClassVar[str] = "transe"
    options: ClassVar[frozenset[str]] = frozenset({"margin", "norm"})
    default_margin: ClassVar[float] = 9.0

    @property
    def relation_size(self) -> int:
        return self.dim

    @property
    def candidate_form(self) -> Literal["dot", "l2", "coordinates"]:
        return "l2" if self.norm == 2 else "coordinates"

    @property
    def prefix_form(self) -> Literal["sum", "squares"] | None:
        return "squares" if self.norm == 2 else "sum"

    @property
    def term(self) -> Term:
        return Square() if self.norm == 2 else Manhattan()

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        distance: Tensor = torch.linalg.vector_norm(h + r - t, ord=self.norm, dim=-1)
        return self.margin - distance

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return h + r

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        if self.norm == 2:
            return self.margin - euclidean(q, c)
        return self.margin - pair_sums(self.term, q, c)

    def entity_init(self) -> Init:
        """RotatE's code: half-width (margin + 2) / dim, which puts an L1 distance near the margin.

        An L2 distance grows with √dim only, so there the divisor is √dim: with the other one every distance
        would start near 0 and every triple, true or false, near the full margin.
        """
        divisor = self.dim if self.norm == 1 else self.dim**0.5
        return Init("uniform", (self.margin + 2.0) / divisor)

    def relation_init(self) -> Init:
        return self.entity_init()


def euclidean(q: Tensor, c: Candidates) -> Tensor:
    """`[..., Q, N]` ‖q − c‖ from norms and one matrix product.

    |q|² + |c|² − 2q·c loses the difference of near points: in float32 a distance of 0 would come out near
    3e-4·|q|. So float32 is computed in float64 (error 1e-8·|q|, and TF32 cannot interfere) and rounded at the
    end, half precision in float32; float64 stays as it is. The gradient at distance 0 is 0. Few queries that meet
    listed candidates are subtracted coordinate by coordinate.
    """
    if isinstance(c, GatheredRows) and q.shape[-2] < FEW_QUERIES:
        return pair_sums(Square(), q, c).clamp_min(1e-30).sqrt()
    c = plain(c)
    dtype = torch.promote_types(q.dtype, c.dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    working, floor = (torch.float32, 1e-12) if half else (torch.float64, 1e-30)
    with torch.autocast(q.device.type, enabled=False):
        q, c = q.to(working), c.to(working)
        q_norm, c_norm = (x.square().sum(-1, keepdim=True) for x in (q, c))
        # (q, |q|², 1) · (−2c, 1, |c|²): the sum above as one product, since passes over [Q, N] cost the most.
        q = torch.cat([q, q_norm, torch.ones_like(q_norm)], dim=-1)
        c = torch.cat([-2.0 * c, torch.ones_like(c_norm), c_norm], dim=-1)
        # Clamping stops the gradient at distance 0, where that of the root alone is infinite.
        return (q @ c.mT).clamp_min(floor).sqrt().to(dtype)
