"""RKD (Park et al., "Relational Knowledge Distillation", 2019): how samples lie to each other, not where they are.

The samples are the queries of `group` consecutive triples of the global batch, and what is compared are their vectors
in the teacher and in the student. Groups are numbered over the whole batch and stay whole on one rank, so that the
result does not depend on the number of ranks. No score takes part, and the two dims and scorers may differ.
The paper's formulas are given from memory and carry no equation numbers.

Differs from the paper:
- it compares all samples of a mini-batch, ours those of a group: pairs and triples in a batch grow with its square and
  its cube.
- RKD[D] its mu is the mean distance of the mini-batch, ours that of the group; sums over pairs and triples are means
  here, over i < j and over the angles at each j of i < k.
- what a sample's embedding is in a knowledge graph is ours to say: `vectors`.
Differs from the authors' code: it counts pairs of a sample with itself in the means (they add zeros); its mean
distance leaves out pairs at distance 0.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from distkgd.config.fields import Rate, Weight, no_flag
from distkgd.config.stage import StageOptions
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.methods.base import Method, MethodSettings, Update
from distkgd.methods.losses.scores import huber
from distkgd.models.view import View

_SMALLEST_SQUARE = 1e-12  # of a distance: the root of less has no use and a steep gradient


class RkdConfig(MethodSettings):
    """Relational KD: hard_weight * hard loss + distance_weight * RKD[D] + angle_weight * RKD[A].

    group: consecutive triples whose queries are compared with each other. vectors: "entity", the row of each query's
        answer (with sides: both, all heads and tails of the group), or "query", what the scorer makes of its anchor and
        relation. delta: of the Huber distance.
    distance_weight: factor on RKD[D], 0 leaves it out. angle_weight: on RKD[A], 0 leaves it out. hard_weight: on the
        hard loss.
    """

    group: Annotated[int, BeforeValidator(no_flag), Field(ge=2, le=64)] = 8
    vectors: Literal["entity", "query"] = "entity"
    distance_weight: Weight = 1.0
    angle_weight: Weight = 2.0
    hard_weight: Rate = 1.0
    delta: Rate = 1.0

    @model_validator(mode="after")
    def _something_is_taught(self) -> "RkdConfig":
        if not self.distance_weight and not self.angle_weight:
            raise ValueError("distance_weight and angle_weight are both 0; set one, or use method: scratch")
        return self

    @property
    def triples_together(self) -> int:
        return self.group

    def check(self, stage: StageOptions) -> None:
        unit = math.lcm(self.group, stage.negatives.chunk if stage.negatives.kind == "chunk" else 1) * stage.accumulate
        if stage.batch_size % unit:
            raise ValueError(
                f"rkd: batch_size {stage.batch_size} must be a multiple of {unit} (accumulate x the least common "
                f"multiple of distill.group {self.group} and the chunk)"
            )
        if self.group == 2 and stage.negatives.sides != "both":
            raise ValueError(
                "rkd: a group of two triples with one query each has one distance, its own mean, and no angle; "
                "use group: 3 or more, or sides: both"
            )
        if stage.balanced:
            raise ValueError("rkd keeps groups of triples whole, which balanced batches do not; use balanced: false")


class Rkd(Method[RkdConfig]):
    """Distances and angles among the samples of a group, as the frozen teacher has them."""

    name = "rkd"
    Settings = RkdConfig

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        how = self.settings
        student = self.task.view(self.student, inputs, grad=True)
        teacher = self.task.view(self.teachers[0], inputs, grad=False)
        terms = answer_means({"hard": (how.hard_weight, self.task.request(student))}, inputs.batch.num_queries)
        samples = how.group * inputs.batch.sides
        inner_s, inner_t = (inner_products(self._samples(view, samples)) for view in (student, teacher))
        share = samples / inputs.batch.num_queries  # of a group in the mean over the global batch's groups
        if how.distance_weight:
            each = distance_loss(inner_s, inner_t, how.delta)
            terms["distance"] = how.distance_weight * share * each.sum()
        if how.angle_weight:
            terms["angle"] = how.angle_weight * share * angle_loss(inner_s, inner_t, how.delta).sum()
        yield Update(frozenset({"student"}), terms | self.task.penalty(student))

    def _samples(self, view: View, size: int) -> Tensor:
        # [groups, size, ·] of the groups of this rank, perhaps none.
        vectors = view.answer if self.settings.vectors == "entity" else view.negatives.queries
        if len(vectors) % size:
            raise AssertionError(
                f"{len(vectors)} queries are not whole groups of {size}: see RkdConfig.triples_together"
            )
        return vectors.reshape(len(vectors) // size, size, vectors.shape[1])


def inner_products(samples: Tensor) -> Tensor:
    """[groups, n, n, n]: <x_i - x_j, x_k - x_j> at [j, i, k] for the samples x of each group ([groups, n, dim])."""
    differences = samples.unsqueeze(1) - samples.unsqueeze(2)
    return differences @ differences.mT


def distance_loss(student: Tensor, teacher: Tensor, delta: float) -> Tensor:
    """[groups]: Huber's distance of |x_i - x_j| / mu, mu the mean of them over i < j, averaged over i < j  (RKD[D]).

    student, teacher: `inner_products` of the samples.
    """
    pairs = torch.triu_indices(student.shape[1], student.shape[1], 1, device=student.device)

    def shape(inner: Tensor) -> Tensor:
        lengths = _lengths(inner)[:, pairs[0], pairs[1]]
        return lengths / lengths.mean(1, keepdim=True)

    return huber(shape(student) - shape(teacher), delta).mean(1)


def angle_loss(student: Tensor, teacher: Tensor, delta: float) -> Tensor:
    """[groups]: Huber's distance of cos of the angle at x_j between x_i and x_k, averaged over all j, i < k  (RKD[A]).

    student, teacher: `inner_products` of the samples.
    """
    n = student.shape[1]
    at = torch.arange(n, device=student.device).unsqueeze(1)
    # [n, pairs]: i < k among the others of each j.
    first, second = (x + (x >= at) for x in torch.triu_indices(n - 1, n - 1, 1, device=student.device))

    def shape(inner: Tensor) -> Tensor:
        lengths = _lengths(inner)
        # Where two samples are the same there is no angle: 0, and no gradient.
        apart = (lengths.square() > 2.0 * _SMALLEST_SQUARE).to(inner.dtype)
        scale = apart / lengths
        return (inner * scale.unsqueeze(3) * scale.unsqueeze(2))[:, at, first, second].flatten(1)

    return huber(shape(student) - shape(teacher), delta).mean(1)


def _lengths(inner: Tensor) -> Tensor:
    # [groups, n, n]: |x_i - x_j| at [j, i], never quite 0.
    return inner.diagonal(dim1=2, dim2=3).clamp(min=_SMALLEST_SQUARE).sqrt()
