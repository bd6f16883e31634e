"""CP: the canonical polyadic decomposition, an entity having one vector as head and another as tail."""

from typing import ClassVar

import torch
from torch import Tensor

from distkgd.scorers.bilinear import Bilinear
from distkgd.scorers.interleaved import join_pairs, split_pairs


class CP(Bilinear):
    """Hitchcock 1927; as a KGE model in Lacroix et al. 2018, "Canonical Tensor Decomposition for Knowledge
    Base Completion", §2 (the CP score).

    Formula: f = Σ_k h_H,k r_k t_T,k, k = 1 … dim/2.
    Real numbers: dim per entity, stored (H, T, H, T, …) where H serves as head and T as tail; dim/2 per
    relation; dim even.
    Candidate form: query (0, h_H∘r) for tails, (r∘t_T, 0) for heads, interleaved; one matrix product. The
    zeros double the work of the product and buy one `score_candidates` for mixed directions, so that they share a
    single pass over the candidates.
    """

    name: ClassVar[str] = "cp"
    dim_multiple: ClassVar[int] = 2

    @property
    def relation_size(self) -> int:
        return self.dim // 2

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (h[..., 0::2] * r * t[..., 1::2]).sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        wanted = split_pairs(h)[0] * r
        return join_pairs(torch.zeros_like(wanted), wanted)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        wanted = split_pairs(t)[1] * r
        return join_pairs(wanted, torch.zeros_like(wanted))

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        return split_pairs(h)[0] * split_pairs(t)[1]
