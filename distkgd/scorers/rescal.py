"""RESCAL: a full bilinear form per relation."""

from typing import ClassVar

import torch
from torch import Tensor

from distkgd.kernels.candidates import GatheredRows
from distkgd.scorers.bilinear import Bilinear


class Rescal(Bilinear):
    """Nickel et al. 2011, "A Three-Way Model for Collective Learning on Multi-Relational Data", Eq. 1.

    Formula: f = hᵀ R t.
    Real numbers: dim per entity; dim² per relation, R row by row (any dim ≥ 1).
    Candidate form: query Rᵀh or Rt; one matrix product.
    Crop: the top-left dim × dim corner of R, so the columns of a relation row are not a prefix.
    """

    name: ClassVar[str] = "rescal"
    prefix_form: ClassVar[None] = None  # each coordinate of a query depends on every column of the anchor
    lists_relations: ClassVar[bool] = True  # a matrix per query would be most of a step's memory

    @property
    def relation_size(self) -> int:
        return self.dim**2

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        return (h.unsqueeze(-2) @ self._matrix(r)).squeeze(-2)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        return (self._matrix(r) @ t.unsqueeze(-1)).squeeze(-1)

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        return (h.unsqueeze(-1) * t.unsqueeze(-2)).flatten(-2)

    def relation_columns(self, kept: Tensor) -> Tensor:
        return (kept.unsqueeze(1) & kept).flatten()

    def crop_columns(self, dim: int) -> Tensor:
        corner = torch.arange(self.crop(dim).dim)
        return (corner.unsqueeze(1) * self.dim + corner).flatten()

    def _matrix(self, r: Tensor) -> Tensor:
        return r.reshape(*r.shape[:-1], self.dim, self.dim)

    def listed_query(self, rows: Tensor, relation: GatheredRows, *, of_heads: bool = False) -> Tensor:
        order = torch.sort(relation.index, stable=True).indices
        parts = rows[order].split(torch.bincount(relation.index, minlength=len(relation.table)).tolist())
        matrices = self._matrix(relation.table)
        each = (matrices.mT if of_heads else matrices).unbind(0)
        met = [part @ matrix for part, matrix in zip(parts, each, strict=True) if len(part)]
        return torch.cat(met)[torch.sort(order).indices] if met else rows[:0]
