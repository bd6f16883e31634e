"""HyboNet: points of the Lorentz model, moved by a linear map of each relation that keeps them there."""

import math
from dataclasses import replace
from typing import ClassVar, NoReturn, final

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.scorers.base import CandidateForm, Init, Scorer, check_reciprocal
from distkgd.scorers.hyperbolic.isometries import with_bias
from distkgd.scorers.sums.tiles import inner

FARTHEST, NEAREST = 3.5, 1.1  # a moved point's time lies between NEAREST and the sum of both, as in the authors' code


@final
class HyboNet(Scorer):
    """Chen et al. 2022, "Fully Hyperbolic Neural Networks", as its released code has it for knowledge graphs.

    Formula: f = margin + 2 <L(h), t> + b_h + b_t = margin - 2 - d(L(h), t)^2 + b_h + b_t for the Lorentz distance d,
    with <x, y> = x_1 y_1 + ... - x_0 y_0 and x_0 = sqrt(1 + |x|^2) of an entity. L: y = W (h_0, h) + w; y_0 makes the
    time 3.5 sigmoid(y_0) + 1.1, the rest of y, made so long that it is a point with that time, the place.
    Real numbers: dim + 1 per entity, the bias first; (dim + 1) (dim + 2) per relation, W row by row, then w. Any dim.
    Candidate form: query (b_h, time, place); one matrix product.
    Reciprocal relations are needed: L has no inverse.

    Differs from the authors' code: an entity has one bias, not one as head and another as tail; dim counts the
    numbers that are free, without x_0; rows are plain numbers of any size, by any optimiser, not points at most 1.5
    long by a Riemannian one; negatives are as everywhere, and the query's own head stays among the answers.
    """

    name: ClassVar[str] = "hybonet"
    options: ClassVar[frozenset[str]] = frozenset({"margin"})
    default_margin: ClassVar[float] = 8.0
    biases: ClassVar[int] = 1
    tails_only: ClassVar[bool] = True
    candidate_form: ClassVar[CandidateForm] = "lorentz"

    @property
    def relation_size(self) -> int:
        return (self.dim + 1) * (self.dim + 2)

    @property
    def query_size(self) -> int:
        return self.dim + 2

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (self._left(self.tail_query(h, r)) * _right(t)).sum(-1)

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        size = self.dim + 1
        matrix, shift = r[..., : size * size].unflatten(-1, (size, size)), r[..., size * size :]
        y = (matrix @ _point(h).unsqueeze(-1)).squeeze(-1) + shift
        time = FARTHEST * y[..., :1].sigmoid() + NEAREST
        # Its length does not count, so that it may be made about 1: squares of large numbers would overflow.
        place = y[..., 1:] / y[..., 1:].detach().abs().amax(-1, keepdim=True).clamp_min(1e-6)
        length = place.square().sum(-1, keepdim=True).clamp_min(0.5)
        return with_bias(h[..., :1], time, place * ((time.square() - 1) / length).sqrt())

    def head_query(self, t: Tensor, r: Tensor) -> NoReturn:
        check_reciprocal(self, False)
        raise AssertionError

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        dtype = torch.promote_types(q.dtype, c.dtype)
        with torch.autocast(q.device.type, enabled=False):
            c = c.to(dtype)
            listed = replace(c, table=_right(c.table)) if isinstance(c, GatheredRows) else _right(plain(c))
            return inner(self._left(q.to(dtype)), listed)

    def entity_init(self) -> Init:
        return Init("normal", 1 / math.sqrt(self.dim), columns=(0.0,) + (1.0,) * self.dim)

    def relation_init(self) -> Init:
        size = self.dim + 1
        return Init("uniform", math.sqrt(6) / size, columns=(1.0,) * size * size + (0.0,) * size)

    def crop_columns(self, dim: int) -> Tensor:
        kept, size = torch.arange(self.crop(dim).dim + 1), self.dim + 1
        return torch.cat([(kept.unsqueeze(1) * size + kept).flatten(), size * size + kept])

    def _left(self, q: Tensor) -> Tensor:
        # What meets `_right` by an inner product.
        return torch.cat([q[..., :1] + self.margin, q[..., 1:], torch.ones_like(q[..., :1])], -1)


def _point(rows: Tensor) -> Tensor:
    """`[..., 1 + dim]`: the time sqrt(1 + |x|^2) and the place x of entities `[..., 1 + dim]`, without their bias."""
    place = rows[..., 1:]
    return torch.cat([(1 + place.square().sum(-1, keepdim=True)).sqrt(), place], -1)


def _right(rows: Tensor) -> Tensor:
    """`[..., 3 + dim]` of entities what a query (bias, time, place), a 1 behind it, meets by an inner product."""
    time, place = _point(rows).split([1, rows.shape[-1] - 1], -1)
    return torch.cat([torch.ones_like(time), -2 * time, 2 * place, rows[..., :1]], -1)
