"""RotE and RefE: a relation turns or mirrors every pair of coordinates, then translates."""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.scorers.base import CandidateForm, Init, Scorer
from distkgd.scorers.interleaved import conjugate, join_pairs, split_pairs
from distkgd.scorers.sums.tiles import FEW_QUERIES, pair_sums


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """`[..., 2k]` pairs of x `[..., 2k]` turned by `[..., k]` radians: Givens rotations (Chami et al. 2020, §4)."""
    # Not by torch's complex numbers: behind a bias the gradient starts at an odd number, where they cannot.
    (a, b), cos, sin = split_pairs(x), angle.cos(), angle.sin()
    return join_pairs(a * cos - b * sin, a * sin + b * cos)


def mirrored(x: Tensor, angle: Tensor) -> Tensor:
    """`[..., 2k]` pairs (a, b) of x become (a cos + b sin, a sin - b cos): Givens reflections (the same §4).

    The axis stands at half of the angle `[..., k]`, in radians. A reflection is its own inverse.
    """
    return turned(conjugate(x), angle)


class Isometry(Scorer, ABC):
    """Chami et al. 2020, "Low-Dimensional Hyperbolic Knowledge Graph Embeddings", §4 and §5, the Euclidean models.

    Formula: f = -|G h + r - t|^2 + b_h + b_t, with G = diag(G_1, G_2, ...) of 2 x 2 blocks.
    Real numbers: dim + 1 per entity, the bias first; 3/2 dim per relation, stored (angle of G_k, r_2k, r_2k+1, ...);
    dim even.
    Candidate form: query (b, G h + r) or, for heads, (b, G^-1 (t - r)), as G keeps distances; one matrix product.

    Differs from the authors' code: an entity has one bias, as in the paper, not one as head and another as tail; a
    block has an angle, as in the paper, not a vector of two numbers that is normalised.
    """

    dim_multiple: ClassVar[int] = 2
    biases: ClassVar[int] = 1
    candidate_form: ClassVar[CandidateForm] = "squared"

    @property
    def relation_size(self) -> int:
        return 3 * self.dim // 2

    @property
    def query_size(self) -> int:
        return 1 + self.dim

    @abstractmethod
    def moved(self, x: Tensor, angle: Tensor) -> Tensor:
        """`[..., dim]` G x of x `[..., dim]`, `[..., dim / 2]` radians."""

    @abstractmethod
    def moved_back(self, x: Tensor, angle: Tensor) -> Tensor:
        """The same of G^-1."""

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        q, dtype = self.tail_query(h, r), torch.promote_types(h.dtype, torch.float32)
        apart = (q[..., 1:].to(dtype) - t[..., 1:].to(dtype)).square().sum(-1)
        return (q[..., 0] + t[..., 0] - apart).to(h.dtype)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        angle, shift = pair_by_pair(r, 1, 2)
        return with_bias(h[..., :1], self.moved(h[..., 1:], angle) + shift)

    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        angle, shift = pair_by_pair(r, 1, 2)
        return with_bias(t[..., :1], self.moved_back(t[..., 1:] - shift, angle))

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        if isinstance(c, GatheredRows) and q.shape[-2] < FEW_QUERIES:
            bias, points = split_bias(c)
            return q[..., :1] + bias - pair_sums("square", q[..., 1:], points)
        return less_squares(q, plain(c))

    def entity_init(self) -> Init:
        return Init("normal", 0.1, columns=(0.0,) + (1.0,) * self.dim)

    def relation_init(self) -> Init:
        return Init("uniform", 0.1, columns=(10.0 * math.pi, 1.0, 1.0) * (self.dim // 2))


@final
class RotE(Isometry):
    """G_k turns by the angle. See `Isometry`."""

    name: ClassVar[str] = "rote"

    def moved(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(x, angle)

    def moved_back(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(x, -angle)


@final
class RefE(Isometry):
    """G_k mirrors at an axis at half of the angle. See `Isometry`."""

    name: ClassVar[str] = "refe"

    def moved(self, x: Tensor, angle: Tensor) -> Tensor:
        return mirrored(x, angle)

    def moved_back(self, x: Tensor, angle: Tensor) -> Tensor:
        return mirrored(x, angle)


def pair_by_pair(parts: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """`[..., width * pairs]` each, of numbers `[..., sum(widths) * pairs]` stored pair by pair of coordinates."""
    by_pair = parts.unflatten(-1, (-1, sum(widths)))
    return tuple(part.flatten(-2) for part in by_pair.split(widths, dim=-1))


def with_bias(bias: Tensor, *parts: Tensor) -> Tensor:
    """`[..., 1 + all widths]`: a bias `[..., 1]` before other parts, which may have more leading dimensions."""
    lead = torch.broadcast_shapes(bias.shape[:-1], *(part.shape[:-1] for part in parts))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in (bias, *parts)], dim=-1)


def split_bias(c: GatheredRows) -> tuple[Tensor, GatheredRows]:
    """`[..., 1, N]` biases of listed candidates, and these without them."""
    bias, points = c.table.split([1, c.table.shape[1] - 1], dim=1)
    return of_listed(bias, c.index), replace(c, table=points)


def of_listed(numbers: Tensor, index: Tensor) -> Tensor:
    """`[..., 1, N]` of a table's `[m, 1]` numbers those that `[..., N]` list; quicker than an embedding's backward."""
    return numbers.flatten().index_select(0, index.flatten()).view(index.shape).unsqueeze(-2)


def less_squares(q: Tensor, c: Tensor) -> Tensor:
    """`[..., Q, N]` b_q + b_c - |x - y|^2 of queries (b_q, x) and candidates (b_c, y), as one matrix product.

    In float64, whatever came in: |x|^2 + |y|^2 - 2 x·y loses the difference of near points.
    """
    dtype = torch.promote_types(q.dtype, c.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, c = q.double(), c.double()
        x, y = q[..., 1:], c[..., 1:]
        own, theirs = (z[..., :1] - z[..., 1:].square().sum(-1, keepdim=True) for z in (q, c))
        left = torch.cat([2.0 * x, own, torch.ones_like(own)], dim=-1)
        right = torch.cat([y, torch.ones_like(theirs), theirs], dim=-1)
        return (left @ right.mT).to(dtype)
