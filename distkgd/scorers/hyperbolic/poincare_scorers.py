"""Models in hyperbolic space: TransH, DistH, RotH, RefH and AttH, each relation with a curvature of its own."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NoReturn, final

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.scorers.base import CandidateForm, Init, Scorer, check_reciprocal
from distkgd.scorers.hyperbolic.isometries import mirrored, pair_by_pair, split_bias, turned, with_bias
from distkgd.scorers.hyperbolic.poincare import curvature, squared_distances, translated
from distkgd.scorers.sums.tiles import FEW_QUERIES


class Hyperbolic(Scorer, ABC):
    """Chami et al. 2020, "Low-Dimensional Hyperbolic Knowledge Graph Embeddings", §4.

    Formula: f = -d_c(exp_0(M(h)) (+) exp_0(r), exp_0(t))^2 + b_h + b_t. The map M of the tangent space at 0 is what
    the models differ in; c = softplus(first number of the relation); the edge of the ball is cut off (`poincare.EDGE`).
    Real numbers: dim + 1 per entity, the bias first, then a tangent vector at 0; per relation the curvature, then pair
    by pair of coordinates what the model says, the translation r last.
    Candidate form: query (b_h, c before the softplus, tangent vector of the translated point); one matrix product and
    elementwise work, as the distance needs only inner products and lengths. In float64, whatever comes in.
    Reciprocal relations are needed: Mobius addition on the right does not keep distances, so that no point stands for
    (r, t) among all heads.

    Differs from the authors' code: an entity has one bias, as in the paper, not one as head and another as tail; a
    rotation has angles, as in the paper, not vectors that are normalised; RotH translates once, after the rotation, as
    in the paper, not also before it; the edge is at 1 - 1e-5, not at 1 - 4e-3 (float32); c starts at softplus(0).
    """

    biases: ClassVar[int] = 1
    tails_only: ClassVar[bool] = True
    candidate_form: ClassVar[CandidateForm] = "hyperbolic"
    # What a relation holds of two coordinates, in the order in which it is stored: each number starts within [-x, x].
    ranges: ClassVar[tuple[float, ...]]

    @property
    def relation_size(self) -> int:
        return 1 + len(self.ranges) * self.dim // 2

    @property
    def query_size(self) -> int:
        return 2 + self.dim

    @abstractmethod
    def mapped(self, h: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """M(h) and r, `[..., dim]` both, of h `[..., dim]` and the relation but its curvature."""

    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return self.score_candidates(self.tail_query(h, r).unsqueeze(-2), t.unsqueeze(-2))[..., 0, 0]

    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        tangent, shift = self.mapped(h[..., 1:].double(), r[..., 1:].double())
        end = translated(tangent, shift, curvature(r[..., :1].double()))
        return with_bias(h[..., :1], r[..., :1], end.to(h.dtype))

    def head_query(self, t: Tensor, r: Tensor) -> NoReturn:
        check_reciprocal(self, False)
        raise AssertionError

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        dtype = torch.promote_types(q.dtype, c.dtype)
        with torch.autocast(q.device.type, enabled=False):
            q = q.double()
            if isinstance(c, GatheredRows) and q.shape[-2] < FEW_QUERIES:
                bias, points = split_bias(c)
                squares = squared_distances(q[..., 2:], points.to(torch.float64), curvature(q[..., 1:2]))
            else:
                rows = plain(c).double()
                bias = rows[..., :1].mT
                squares = squared_distances(q[..., 2:], rows[..., 1:], curvature(q[..., 1:2]))
            return (q[..., :1] + bias - squares).to(dtype)

    def entity_init(self) -> Init:
        return Init("normal", 0.1, columns=(0.0,) + (1.0,) * self.dim)

    def relation_init(self) -> Init:
        # An odd dim has half of the last pair.
        return Init("uniform", 1.0, columns=((0.0,) + self.ranges * self.dim)[: self.relation_size])


@final
class TransH(Hyperbolic):
    """The hyperbolic TransE of Wang et al. 2021, "MulDE: Multi-teacher Knowledge Distillation for Low-dimensional
    Knowledge Graph Embeddings". NOT the TransH of Wang et al. 2014, which projects on hyperplanes.

    M(h) = h. A relation holds (r_k, ...). Inferred: MulDE's text names the model; its formula is read as `Hyperbolic`
    with nothing but the translation. Any dim >= 1.
    """

    name: ClassVar[str] = "transh"
    ranges: ClassVar[tuple[float, ...]] = (0.1, 0.1)

    def mapped(self, h: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        return h, parts


@final
class DistH(Hyperbolic):
    """The hyperbolic form of DistMult's diagonal relation in Wang et al. 2021 (MulDE).

    M(h) = s * h: Mobius multiplication by diag(s) is a product in the tangent space. A relation holds (s_k, r_k, ...).
    Inferred: MulDE's text names the model and gives no formula that we have read; translation and biases are those of
    the family it is built on, whose Euclidean member with a diagonal (MurE) has both. Any dim >= 1.
    """

    name: ClassVar[str] = "disth"
    ranges: ClassVar[tuple[float, ...]] = (1.0, 0.1, 1.0, 0.1)

    def mapped(self, h: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        return h * parts[..., 0::2], parts[..., 1::2]


@final
class RotH(Hyperbolic):
    """M(h) turns pair k of coordinates by an angle. A relation holds (angle_k, r_2k, r_2k+1, ...); dim even."""

    name: ClassVar[str] = "roth"
    dim_multiple: ClassVar[int] = 2
    ranges: ClassVar[tuple[float, ...]] = (math.pi, 0.1, 0.1)

    def mapped(self, h: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        angle, shift = pair_by_pair(parts, 1, 2)
        return turned(h, angle), shift


@final
class RefH(Hyperbolic):
    """M(h) mirrors pair k at an axis at half of an angle. A relation holds (angle_k, r_2k, r_2k+1, ...); dim even."""

    name: ClassVar[str] = "refh"
    dim_multiple: ClassVar[int] = 2
    ranges: ClassVar[tuple[float, ...]] = (math.pi, 0.1, 0.1)

    def mapped(self, h: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        angle, shift = pair_by_pair(parts, 1, 2)
        return mirrored(h, angle), shift


@final
class AttH(Hyperbolic):
    """M(h) = w x + (1 - w) y, x = h turned, y = h mirrored, (w, 1 - w) = softmax(a·x, a·y): attention in the tangent
    space. A relation holds (angle_k of x, angle_k of y, a_2k, a_2k+1, r_2k, r_2k+1, ...); dim even.

    Differs from the authors' code: a·x and a·y are not divided by sqrt(dim).
    """

    name: ClassVar[str] = "atth"
    dim_multiple: ClassVar[int] = 2
    ranges: ClassVar[tuple[float, ...]] = (math.pi, math.pi, 0.1, 0.1, 0.1, 0.1)

    def mapped(self, h: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        turn, mirror, attention, shift = pair_by_pair(parts, 1, 1, 2, 2)
        x, y = turned(h, turn), mirrored(h, mirror)
        weight = (attention * (x - y)).sum(-1, keepdim=True).sigmoid()
        return weight * x + (1.0 - weight) * y, shift
