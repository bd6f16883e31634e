"""What scorers share that are a margin less the distance of query and candidate, L1 or L2."""

from abc import ABC
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.kernels.pairs import Kind
from distkgd.scorers.base import CandidateForm, Init, Scorer
from distkgd.scorers.sums.tiles import FEW_QUERIES, pair_sums


class Distance(Scorer, ABC):
    """f is `margin` less the sum of `absolute` over the coordinates; norm 2: less the root of the sum of squares."""

    options: ClassVar[frozenset[str]] = frozenset({"margin", "norm"})
    default_margin: ClassVar[float] = 9.0
    absolute: ClassVar[Kind]

    @property
    def candidate_form(self) -> CandidateForm:
        return "l2" if self.norm == 2 else "coordinates"

    @property
    def prefix_form(self) -> Literal["sum", "squares"]:
        return "squares" if self.norm == 2 else "sum"

    @property
    def term(self) -> Kind:
        return "square" if self.norm == 2 else self.absolute

    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        return self.margin - (euclidean(q, c) if self.norm == 2 else pair_sums(self.absolute, q, c))

    def entity_init(self) -> Init:
        """RotatE's code: half-width (margin + 2) / n of n coordinates, real or complex, which puts an L1 distance near
        the margin.

        An L2 distance grows with √n only, so there the divisor is √n: with the other one every distance would start
        near 0 and every triple, true or false, near the full margin.
        """
        coordinates = self.dim // self.dim_multiple
        return Init("uniform", (self.margin + 2.0) / (coordinates if self.norm == 1 else coordinates**0.5))


def euclidean(q: Tensor, c: Candidates) -> Tensor:
    """`[..., Q, N]` ‖q − c‖ from norms and one matrix product.

    |q|² + |c|² − 2q·c loses the difference of near points: in float32 a distance of 0 would come out near
    3e-4·|q|. So float32 is computed in float64 (error 1e-8·|q|, and TF32 cannot interfere) and rounded at the
    end, half precision in float32; float64 stays as it is. The gradient at distance 0 is 0. Few queries that meet
    listed candidates are subtracted coordinate by coordinate.
    """
    if isinstance(c, GatheredRows) and q.shape[-2] < FEW_QUERIES:
        return pair_sums("square", q, c).clamp_min(1e-30).sqrt()
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
