"""RotatE: a relation turns every complex coordinate."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates
from distkgd.scorers.base import Init, Scorer
from distkgd.scorers.interleaved import as_complex, complex_product, join_pairs, split_pairs
from distkgd.scorers.sums.terms import Modulus, Square, Term
from distkgd.scorers.sums.tiles import pair_sums
from distkgd.scorers.transe import euclidean


class RotatE(Scorer):
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
    options: ClassVar[frozenset[str]] = frozenset({"margin", "norm"})
    default_margin: ClassVar[float] = 9.0
    dim_multiple: ClassVar[int] = 2
    complex_pairs = True

    @property
    def relation_size(self) -> int:
        return self.dim // 2

    @property
    def candidate_form(self) -> Literal["dot", "l2", "coordinates"]:
        return "l2" if self.norm == 2 else "coordinates"

    @property
    def prefix_form(self) -> Literal["sum", "squares"]:
        return "squares" if self.norm == 2 else "sum"

    @property
    def term(self) -> Term:
        return Square() if self.norm == 2 else Modulus()

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        apart = self.tail_query(h, r) - t
        if self.norm == 2:
            distance: Tensor = torch.linalg.vector_norm(apart, dim=-1)
            return self.margin - distance
        if apart.dtype in (torch.float32, torch.float64):
            return self.margin - as_complex(apart).abs().sum(-1)
        # vector_norm, not hypot: its gradient at 0 is 0, where hypot gives NaN.
        moduli: Tensor = torch.linalg.vector_norm(torch.stack(split_pairs(apart), dim=-1), dim=-1)
        return self.margin - moduli.sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return complex_product(h, join_pairs(r.cos(), r.sin()))

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return self.tail_query(t, -r)

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        if self.norm == 2:
            return self.margin - euclidean(q, c)
        return self.margin - pair_sums(self.term, q, c)

    def entity_init(self) -> Init:
        """The authors' code: half-width (margin + 2) / number of complex coordinates; norm 2: its root, as TransE."""
        divisor = self.dim // 2 if self.norm == 1 else (self.dim // 2) ** 0.5
        return Init("uniform", (self.margin + 2.0) / divisor)

    def relation_init(self) -> Init:
        return Init("uniform", math.pi)
