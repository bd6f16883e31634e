"""SimplE: CP whose two halves are tied through inverse relations."""

from typing import ClassVar

from torch import Tensor

from distkgd.scorers.bilinear import Bilinear
from distkgd.scorers.interleaved import join_pairs, split_pairs


class SimplE(Bilinear):
    """Kazemi & Poole 2018, "SimplE Embedding for Link Prediction in Knowledge Graphs", the averaged form.

    Formula: f = ½ (⟨h_H, r, t_T⟩ + ⟨t_H, r⁻¹, h_T⟩), sums over dim/2 coordinates.
    Real numbers: dim per entity, stored (H, T, H, T, …) where H serves as head and T as tail; dim per
    relation, stored (r, r⁻¹, r, r⁻¹, …); dim even.
    Candidate form: query ½ (r⁻¹∘h_T, r∘h_H) for tails, ½ (r∘t_T, r⁻¹∘t_H) for heads, interleaved to meet
    the candidate's (H, T); one matrix product.
    """

    name: ClassVar[str] = "simple"
    dim_multiple: ClassVar[int] = 2

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        (h_head, h_tail), (t_head, t_tail) = split_pairs(h), split_pairs(t)
        forth, back = split_pairs(r)
        return 0.5 * (h_head * forth * t_tail + t_head * back * h_tail).sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        (h_head, h_tail), (forth, back) = split_pairs(h), split_pairs(r)
        return 0.5 * join_pairs(back * h_tail, forth * h_head)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        (t_head, t_tail), (forth, back) = split_pairs(t), split_pairs(r)
        return 0.5 * join_pairs(forth * t_tail, back * t_head)

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        (h_head, h_tail), (t_head, t_tail) = split_pairs(h), split_pairs(t)
        return 0.5 * join_pairs(h_head * t_tail, t_head * h_tail)
