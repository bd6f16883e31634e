"""MulDE (Wang et al., "MulDE: Multi-teacher Knowledge Distillation for Low-dimensional KG Embeddings", WWW 2021).

Several frozen teachers, of any scorers and dims, speak through a Senior that weighs and scales them; the student, the
paper's Junior, learns the Senior's distribution beside the labels. The Senior learns from the labels only.
The paper's formulas are given from memory and carry no equation numbers.

Differs from the paper:
- the Junior there sends its top-K candidates to the teachers, anew each round, and labels are softened over these K;
  here they are softened over all candidates of the batch, drawn or 1-vs-all, and the answer.
- MulDE[scaling], a factor per relation and teacher: ours is exp of a learned number that starts at 0, and each
  direction has its own.
- MulDE[attention], a weight per query and teacher: the paper contrasts a teacher's scores with the Junior's. Ours is
  the softmax over teachers of a * contrast, the contrast of a teacher being how many standard deviations of its
  scores of all candidates and the answer its score of the answer lies above their mean; one learned slope a for all.
- `weights` are odds that each teacher has beforehand; with both of the Senior's ways switched off they are the weights
  of the average. `normalise` puts the teachers on one scale before the Senior's factors.
- the hard loss of the Junior is the stage's; that of the Senior, MulDE[senior], is cross-entropy.
- teachers are of all kinds; the paper's are four hyperbolic models of 64 numbers.
Differs from the authors' code: none of it was read. IterDE's repository calls the plain mean of four teachers' scores
`kd_mulde`: here relation_scaling: false with contrast_attention: false, and KL in place of its Huber distance.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distkgd.config.fields import Rate, Real, Weight
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce_over_candidates
from distkgd.distributed.reductions.partials import LogSumExp, Partial, SoftmaxGap
from distkgd.methods.base import Method, ParameterGroup, Update
from distkgd.methods.losses.scores import batch_mean, kl_of
from distkgd.methods.losses.teachers import AveragedTeachers, moments, one_scale
from distkgd.models.view import View


class MuldeConfig(AveragedTeachers):
    """Several teachers through a Senior: hard_weight * hard loss + weight * T^2 KL(Senior || student) + Senior's loss.

    weight: factor on what the student learns from the Senior. hard_weight: on its hard loss. temperature: T.
    relation_scaling: the Senior learns a factor for each relation, direction and teacher; off: 1.
    contrast_attention: it learns how much to prefer the teacher that tells the answer of a query from the other
        candidates most clearly; off: the mean. attention: the slope that it starts with, 0: the mean.
    evaluator_lr: how fast the Senior learns; with both switched off there is nothing to learn.
    weights: of the teachers in that mean, in their order; only their ratios count. Default: all alike.
    normalise: zscore brings all teachers' scores of a query to one mean and standard deviation, over all candidates and
        the answer: their own, averaged. none: as they are.
    """

    weight: Weight = 1.0
    hard_weight: Weight = 1.0
    temperature: Rate = 1.0
    relation_scaling: bool = True
    contrast_attention: bool = True
    attention: Real = 1.0
    evaluator_lr: Rate = 0.01


class MulDE(Method[MuldeConfig]):
    """Soft labels of several teachers, combined by a Senior that learns how."""

    name = "mulde"
    Settings = MuldeConfig
    num_teachers = range(1, 9)

    def prepare(self) -> None:
        table = self.student.relation
        # Rows: relations as asked for tails, then as asked for heads.
        self.scale = table.new_zeros(2 * self.student.num_relations, len(self.teachers))
        self.attention = table.new_full((1,), self.settings.attention)

    @property
    def groups(self) -> Mapping[str, ParameterGroup]:
        how, found = self.settings, {"student": ParameterGroup(self.student)}
        tensors = {"scale": self.scale} if how.relation_scaling else {}
        tensors |= {"attention": self.attention} if how.contrast_attention else {}
        if tensors:
            found["evaluators"] = ParameterGroup(tensors=tensors, optimizer={"lr": how.evaluator_lr})
        return found

    @property
    def senior_learns(self) -> bool:
        """Whether there is anything for the Senior to learn."""
        return self.settings.relation_scaling or self.settings.contrast_attention

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        how = self.settings
        student = self.task.view(self.student, inputs, grad=True)
        teachers = [self.task.view(model, inputs, grad=False) for model in self.teachers]
        asks = {"senior": self._senior(student, teachers)}
        if how.hard_weight:
            asks["hard"] = self.task.request(student)
        got = reduce_over_candidates(asks)
        terms = {"soft": how.weight * batch_mean(got["senior"]["soft"], inputs)}
        if how.hard_weight:
            terms["hard"] = how.hard_weight * batch_mean(got["hard"], inputs)
        if self.senior_learns:
            terms["senior"] = batch_mean(got["senior"]["senior"], inputs)
        yield Update(frozenset(self.groups), terms | self.task.penalty(student))

    def _senior(self, student: View, teachers: Sequence[View]) -> LossRequest:
        # Asks for {"soft": [Q] T^2 KL(Senior || student), "senior": [Q] the Senior's cross-entropy, if it learns}.
        learns, temperature, shares = self.senior_learns, self.settings.temperature, self._shares
        factors = list(self._factors(teachers).unbind(1)) if learns or self.settings.normalise != "none" else []

        def combined(scores: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
            each: Sequence[Tensor | float] = factors or shares
            return torch.stack([f * z for f, z in zip(each, scores, strict=True)]).sum(0)

        def partials(zs: Tensor, *more: Tensor) -> dict[str, Partial]:
            scores, factors = more[: len(teachers)], more[len(teachers) :]
            # Scaled, a score that does not count must still not count.
            senior = combined(scores, factors).masked_fill(zs.detach() < MASKED_SCORE / 2, MASKED_SCORE)
            out: dict[str, Partial] = {"gap": SoftmaxGap(zs / temperature, senior.detach() / temperature)}
            return out | {"lse": LogSumExp(senior)} if learns else out

        def finish(got: dict[str, Tensor], own_s: Tensor, *more: Tensor) -> dict[str, Tensor]:
            n = len(teachers)
            own = combined(more[:n], more[n : n + len(factors)])
            (share,) = more[n + len(factors) :] or (own.new_ones(()),)
            divergence = kl_of(got, own_s / temperature, own.detach() / temperature)
            found = {"soft": share * temperature**2 * divergence}
            if learns:
                # MulDE[senior]
                found["senior"] = share * (torch.logaddexp(own, got["lse"]) - own)
            return found

        own = [student.positive, *(view.positive for view in teachers), *factors]
        share = student.inputs.label_share
        own += [] if share is None else [share.to(student.positive.dtype)]
        return LossRequest(partials, [student.negatives, *(view.negatives for view in teachers)], finish, factors, own)

    @property
    def _shares(self) -> list[float]:
        return self.settings.shares(len(self.teachers))

    def _factors(self, teachers: Sequence[View]) -> Tensor:
        # [Q, teachers]: what the Senior multiplies each teacher's scores of a query with. What `one_scale` would add to
        # all scores of a query alike no softmax sees.
        how, queries = self.settings, teachers[0].inputs.batch.queries
        factors = self.attention.new_tensor(self._shares).expand(len(queries.relation), -1)
        if how.contrast_attention or how.normalise == "zscore":
            mean, deviation = moments(teachers)
        if how.contrast_attention:
            # MulDE[attention]
            contrasts = (torch.stack([view.positive for view in teachers], 1) - mean) / deviation
            odds = self.attention.new_tensor(how.weights_of(len(teachers))).log()
            factors = torch.softmax(self.attention * contrasts + odds, 1)
        if how.relation_scaling:
            # MulDE[scaling]
            factors = factors * torch.exp(self.scale[queries.relation + self.student.num_relations * queries.side])
        return factors * one_scale(mean, deviation, self._shares)[0] if how.normalise == "zscore" else factors
