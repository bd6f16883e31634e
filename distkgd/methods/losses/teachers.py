"""Several teachers as one: whose scores weigh how much in their average, and on what scale they meet."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from distkgd.config.fields import Weight
from distkgd.distributed.reductions.candidate_layout import valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce_over_candidates
from distkgd.distributed.reductions.partials import Partial, Sum
from distkgd.methods.base import MethodSettings
from distkgd.models.view import View

_SMALLEST_VARIANCE = 1e-10  # of a teacher's scores of a query


class AveragedTeachers(MethodSettings):
    """How a method averages its teachers.

    weights: of the teachers, in their order; only their ratios count. Default: all alike.
    normalise: zscore brings all scores of a query onto one scale before they are averaged: each teacher's less their
        mean over all candidates and the answer, over their standard deviation, which then all have the teachers'
        average mean and deviation, so that they stay scores.
    """

    weights: tuple[Weight, ...] | None = None
    normalise: Literal["none", "zscore"] = "none"

    @model_validator(mode="after")
    def _some_weight(self) -> "AveragedTeachers":
        if self.weights is not None and not sum(self.weights):
            raise ValueError("weights of teachers must not all be 0")
        return self

    def check_teachers(self, given: int) -> None:
        if self.weights is not None and len(self.weights) != given:
            raise ValueError(
                f"weights must be one number for each teacher, in their order: {len(self.weights)}, not {given}"
            )

    def weights_of(self, teachers: int) -> tuple[float, ...]:
        """The weight of each teacher, as configured."""
        return (1.0,) * teachers if self.weights is None else self.weights

    def shares(self, teachers: int) -> list[float]:
        """The weights, which together are 1."""
        weights = self.weights_of(teachers)
        return [w / sum(weights) for w in weights]


def moments(teachers: Sequence[View]) -> tuple[Tensor, Tensor]:
    """[Q, teachers] each: mean and standard deviation of each teacher's scores of all candidates, the answer included.

    Neither takes a gradient; all ranks call it.
    """

    def partials(*scores: Tensor) -> dict[str, Partial]:
        scores = tuple(z.detach() for z in scores)
        counts = [valid_mask(z) for z in scores]
        out: dict[str, Partial] = {"count": Sum(counts[0])}
        for i, (z, count) in enumerate(zip(scores, counts, strict=True)):
            kept = z * count
            out |= {f"sum_{i}": Sum(kept), f"squares_{i}": Sum(kept.square())}
        return out

    def finish(got: dict[str, Tensor], *own: Tensor) -> tuple[Tensor, Tensor]:
        z, count = torch.stack(own, 1), got["count"].unsqueeze(1) + 1.0
        sums, squares = (torch.stack([got[f"{of}_{i}"] for i in range(len(own))], 1) for of in ("sum", "squares"))
        mean = (sums + z) / count
        variance = ((squares + z.square()) / count - mean.square()).clamp(min=_SMALLEST_VARIANCE)
        return mean.detach(), variance.sqrt().detach()

    ask = LossRequest(partials, [view.negatives for view in teachers], finish, local=[v.positive for v in teachers])
    found: tuple[Tensor, Tensor] = reduce_over_candidates({"": ask})[""]
    return found


def one_scale(mean: Tensor, deviation: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What puts teachers' scores on one scale (`normalise: zscore`): [Q, teachers] factors, and [Q] what is added to
    the average that has these `shares`.

    mean, deviation: `moments` of each teacher's scores, whose averages the scores then have.
    """
    each = mean.new_tensor(shares)
    factors = (deviation @ each).unsqueeze(1) / deviation
    return factors, mean @ each - (factors * mean) @ each
