"""IterDE (Liu et al., "IterDE: An Iterative Knowledge Distillation Framework for Knowledge Graph Embeddings", 2023).

One step of its chain: a student learns the raw scores of the model before it, which is frozen. The chain is the plan's.
Its formulas reach us second-hand (a summary of the paper, and the released code).

Differs from the paper:
- IterDE[SWDA] lambda = k (epoch / M)^p is known from one summary; k, p and whether the hard loss keeps its full weight
  are not: all are options (k, p, `combination`).
- IterDE[soft], Huber of the scores of positives and of the same negatives: ours is the mean over positives plus, per
  positive, the mean over its negatives, the hard loss's own (`hard_loss`, softplus); the figure's is a sum, and its
  hard loss binary cross-entropy, which is one of the stage's losses here.
- soft: kl puts T^2 KL of the softmaxes in its place, our listwise form for softmax losses.
Differs from the authors' code:
- it takes the soft mean over all positives and negatives together, so that one of N negatives weighs as much as the
  positive; its hard losses are margin ranking (TransE) and softplus (ComplEx), with L2 regularisation.
- its schedule has two phases in place of SWDA (`schedule: two_phase` reproduces it, with what is odd about it); its
  rescaling of the weight never ends where a loss is 0, ours leaves the weight alone there.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import model_validator
from torch import Tensor

from distkgd.config.fields import Rate, Weight
from distkgd.config.stage import StageOptions
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.candidate_layout import valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce_over_candidates
from distkgd.distributed.reductions.partials import Partial, Sum
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.methods.base import Method, MethodSettings, Update
from distkgd.methods.losses.scores import batch_mean, batch_sum, candidate_count, huber, kl_divergence
from distkgd.models.view import View


class IterdeConfig(MethodSettings):
    """IterDE (AAAI 2023): hard loss + lambda * soft loss, or a convex combination of them.

    k, p, schedule: lambda is k (epoch / epochs)^p ("polynomial", IterDE[SWDA]), k ("constant"), or that of the released
        code ("two_phase"): k in the second half of the epochs, in the first k / c with c the product of both losses of
        the batch, multiplied by a power of ten that brings it into [1, 10). That c carries a gradient: k / c * soft is
        k / (power * hard), the soft loss cancels out, and the teacher teaches nothing in the first half. What is left
        only rescales the gradient of the hard loss, by 1 - k / (power * hard^2).
    combination: add is hard + lambda soft; convex is (1 - lambda) hard + lambda soft.
    soft: "huber" of raw scores per candidate, or "kl" of the softmaxes. delta: of the Huber distance. temperature: of
        the softmaxes.
    """

    k: Weight = 1.0
    p: Weight = 1.0
    schedule: Literal["polynomial", "constant", "two_phase"] = "polynomial"
    combination: Literal["add", "convex"] = "add"
    soft: Literal["huber", "kl"] = "huber"
    delta: Rate = 1.0
    temperature: Rate = 1.0

    @model_validator(mode="after")
    def _weights_are_shares(self) -> "IterdeConfig":
        if self.combination == "convex" and self.k > 1.0:
            raise ValueError(f"combination: convex needs a k of at most 1 (given: {self.k}); or use combination: add")
        if self.combination == "convex" and self.schedule == "two_phase":
            raise ValueError("schedule: two_phase adds, as the released code does; use combination: add")
        return self

    def check(self, stage: StageOptions) -> None:
        if self.soft == "huber" and stage.negatives.labels == "known":
            raise ValueError("iterde with soft: huber has no labels: known; use soft: kl, or labels: one")
        if self.schedule == "two_phase" and stage.patience:
            raise ValueError(
                "iterde with schedule: two_phase learns from its teacher in the second half alone, before which "
                f"patience {stage.patience} may end the stage; use patience: 0 or another schedule"
            )
        if self.schedule == "two_phase" and stage.accumulate > 1:
            raise ValueError(
                "iterde with schedule: two_phase weighs the soft loss by losses of the whole batch, which cannot be "
                f"cut into parts: use accumulate: 1 (given: {stage.accumulate}) or another schedule"
            )


class IterDE(Method[IterdeConfig]):
    """Scores of a frozen teacher, weighed by how far training has come."""

    name = "iterde"
    Settings = IterdeConfig

    def soft_weight(self, step: int) -> float:
        """lambda in the epoch of `step`; of two_phase, what it is in the second half."""
        how, setup = self.settings, self.setup
        if how.schedule == "polynomial":
            # IterDE[SWDA]
            return how.k * math.pow(step // setup.steps_per_epoch / setup.epochs, how.p)
        return how.k

    def logged(self, step: int) -> Mapping[str, float | Tensor]:
        return {} if self.rescales(max(0, step - 1)) else {"lambda": self.soft_weight(max(0, step - 1))}

    def rescales(self, step: int) -> bool:
        """Whether `step` is in the first half of two_phase."""
        return self.settings.schedule == "two_phase" and 2 * (step // self.setup.steps_per_epoch) < self.setup.epochs

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        student = self.task.view(self.student, inputs, grad=True)
        teacher = self.task.view(self.teachers[0], inputs, grad=False)
        asks = {"soft": self._soft(student, teacher), "hard": self.task.request(student)}
        step = inputs.batch.step
        if self.rescales(step):
            losses = {name: batch_mean(per_query, inputs) for name, per_query in reduce_over_candidates(asks).items()}
            terms = {"soft": self._cancelled(losses, inputs), "hard": losses["hard"]}
        else:
            weight = self.soft_weight(step)
            kept = 1.0 - weight if self.settings.combination == "convex" else 1.0
            weighted = {"soft": (weight, asks["soft"]), "hard": (kept, asks["hard"])}
            terms = answer_means(weighted, inputs.batch.num_queries)
        yield Update(frozenset({"student"}), terms | self.task.penalty(student))

    def _soft(self, student: View, teacher: View) -> LossRequest:
        if self.settings.soft == "kl":
            return kl_divergence(student, teacher, self.settings.temperature)
        return score_distance(student, teacher, self.settings.delta)

    def _cancelled(self, losses: dict[str, Tensor], inputs: StepInputs) -> Tensor:
        # This rank's share of k / c * soft, c = soft * hard * 10^n in [1, 10), all of the whole batch.
        soft, hard = batch_sum([losses["soft"], losses["hard"]], inputs)
        product = soft * hard
        found = float(product.detach())
        if not (math.isfinite(found) and found > 0.0):
            return self.settings.k * losses["soft"]
        power = 10.0 ** -math.floor(math.log10(found))
        return self.settings.k / (product * power) * soft / inputs.layout.ranks.world


def score_distance(student: View, teacher: View, delta: float) -> LossRequest:
    """Asks for [Q]: Huber's distance of the answer's scores, plus its mean over the other candidates (IterDE[soft])."""

    def partials(zs: Tensor, zt: Tensor) -> dict[str, Partial]:
        return {"sum": Sum(huber(zs - zt, delta)), "count": Sum(valid_mask(zs.detach()))}

    def finish(got: dict[str, Tensor], own_s: Tensor, own_t: Tensor) -> Tensor:
        return huber(own_s - own_t, delta) + got["sum"] / candidate_count(got)

    own = student.positive, teacher.positive
    return LossRequest(partials, [student.negatives, teacher.negatives], finish, local=own)
