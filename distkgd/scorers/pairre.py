"""PairRE: a relation scales head and tail, each with its own vector."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.scorers.base import CandidateForm, Init, Scorer
from distkgd.scorers.interleaved import split_pairs
from distkgd.scorers.sums.tiles import pair_sums


class PairRE(Scorer):
    """Chao et al. 2021, "PairRE: Knowledge Graph Embeddings via Paired Relation Vectors", the score function
    of the section "PairRE"; the margin is the γ of its loss.

    Formula: f = margin − ‖ĥ∘r_H − t̂∘r_T‖₁ with ĥ = h/‖h‖₂ and t̂ = t/‖t‖₂.
    Real numbers: dim per entity; 2·dim per relation, stored (r_H, r_T, r_H, r_T, …) (any dim ≥ 1).
    Candidate form: query (a, b) side by side, a = ĥ∘r_H, b = r_T (tails) or a = t̂∘r_T, b = r_H (heads);
    Σ |a − b∘ĉ|, coordinate-wise. A crop normalises what is left of the entity.
    """

    name: ClassVar[str] = "pairre"
    options: ClassVar[frozenset[str]] = frozenset({"margin"})
    default_margin: ClassVar[float] = 6.0
    candidate_form: ClassVar[CandidateForm] = "coordinates"
    prefix_form: ClassVar[None] = None  # a crop normalises what is left of the entity

    @property
    def relation_size(self) -> int:
        return 2 * self.dim

    @property
    def query_size(self) -> int:
        return 2 * self.dim

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        for_head, for_tail = split_pairs(r)
        return self.margin - (unit(h) * for_head - unit(t) * for_tail).abs().sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        for_head, for_tail = split_pairs(r)
        return _side_by_side(unit(h) * for_head, for_tail)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        for_head, for_tail = split_pairs(r)
        return _side_by_side(unit(t) * for_tail, for_head)

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        rows = replace(c, table=unit(c.table)) if isinstance(c, GatheredRows) else unit(plain(c))
        return self.margin - pair_sums("scaled_manhattan", q, rows)

    def entity_init(self) -> Init:
        return Init("uniform", (self.margin + 2.0) / self.dim)

    def relation_init(self) -> Init:
        return self.entity_init()


def _side_by_side(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat((a, b.expand_as(a)), dim=-1)


def unit(x: Tensor) -> Tensor:
    """`[..., k]` x / ‖x‖₂ along the last dimension.

    A row of (nearly) zeros, as pruning makes them, stays as it is and has gradient 1, where `normalize` would
    divide by its ε and send a gradient of 1e12 into the table.
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 1e-12, length, 1.0)
