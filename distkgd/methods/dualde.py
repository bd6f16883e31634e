"""DualDE (Zhu et al., "DualDE: Dually Distilling Knowledge Graph Embedding for Faster and Cheaper Reasoning", 2022).

Differs from the paper:
- Eq. 2, 11 and 15 lack the sign and print 1 - log sigma where log(1 - sigma) is meant; the sigma is logistic. Ours:
  -(1 - p) log sigma(f) for positives, -(1 - p) log(1 - sigma(f)) for negatives.
- Sums over T and T^- become a mean over positives and, per positive, the mean over its negatives (loss softplus), their
  sum (bce), or their self-adversarial mean (self_adversarial); with loss softmax the hard term of a query is its
  cross-entropy and takes the weight of its positive triple.
- Scores inside p are detached; alpha and beta learn from all losses of their stage. Stage two is one joint loss and one
  simultaneous step. d_soft reaches both models there unless stop_opposite is set.
- soft: kl replaces d_score of a query by T^2 KL over its candidates, weighted by the evaluator of its positive triple.
  In stage two each side then imitates the other: KL(teacher || student) for L_Stu, KL(student || teacher) for L_Tea.
  The structure distance is then taken on positive triples only.
- several teachers are the paper's M-DualDE, of which it says that the weighted average of their soft labels is the
  student's; how it weighs it does not say. Ours are constants (`weights`): scores, which `normalise` brings onto one
  scale, and structure numbers are averaged per candidate before they are compared and before the quality of the soft
  label is judged; with soft: kl the divergences are averaged, which teaches the student what the averaged softmax
  would. In stage two each teacher has a loss and evaluators of its own.
Differs from the authors' code (a later port):
- it computes the structure distance and leaves it out; it weighs the student's negatives with the *positive* sigmoid;
  it compares scores after a sigmoid (`probabilities: true` here); it multiplies aggregated means instead of
  per-negative products; teacher negatives are weighed self-adversarially.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from distkgd.config.fields import Frozen, Positive, Rate, Real, Weight
from distkgd.config.stage import StageOptions
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE, valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce_over_candidates
from distkgd.distributed.reductions.partials import Partial, SoftmaxMean, Sum, Summed
from distkgd.errors import UnsupportedError
from distkgd.kernels import dualde as kernels
from distkgd.methods.base import Method, MethodState, ParameterGroup, Phase, Update
from distkgd.methods.losses.scores import batch_mean, batch_means, candidate_count, kl_divergence
from distkgd.methods.losses.structure import Shape, ShapeFields, structure
from distkgd.methods.losses.teachers import AveragedTeachers, moments, one_scale
from distkgd.models.model import Model
from distkgd.models.view import View
from distkgd.scorers.base import sign_of

# [Q] each: terms by name; of each model that learns the qualities of its positive triples' soft labels, if judged.
Terms = tuple[dict[str, Tensor], list[Tensor]]


class StageTwoConfig(Frozen):
    """DualDE's second stage, in which the teacher learns too.

    start: epoch at which it begins, or "plateau": when validation MRR has stopped rising (the stage's `patience`).
    epochs: how many epochs it lasts at most; the stage's schedule starts anew and spans them.
    lr_scale, teacher_lr_scale: factors on the stage's learning rate for student and teacher.
    """

    start: Positive | Literal["plateau"] = "plateau"
    epochs: Positive = 10
    lr_scale: Rate = 0.1
    teacher_lr_scale: Rate = 0.1


class DualdeConfig(AveragedTeachers):
    """DualDE (Zhu et al., WSDM 2022).

    evaluation: weigh each soft label by its learned quality (Eq. 8-9, 12-13); off: soft and hard weights are 1.
    structure: add the embedding-structure distance to the score distance (Eq. 5-7).
    delta: of the Huber distance. probabilities: compare sigmoid(score) instead of scores, as the authors' code does.
    alpha, beta: initial slope and offset of the four soft-label evaluators; evaluator_lr: how fast they learn.
    soft: "huber" per candidate (Eq. 4), or "kl": the distance of a query is the KL divergence over its candidates and
        its weight is that of its positive triple - our listwise form, for softmax losses.
    temperature: of the softmaxes of "kl".
    soft_weight: factor on the soft losses (the paper's is 1). stop_opposite: each model's loss leaves the other alone.
    stage_one: off starts with both models learning. stage_two: null leaves the teacher frozen throughout.
    weights: of several teachers, in their order; only their ratios count. Default: all alike.
    normalise: zscore brings their scores of a query to one mean and standard deviation, over all candidates and the
        answer, before they are averaged: their own, averaged, without a gradient. none: as they are.
    """

    evaluation: bool = True
    structure: bool = True
    delta: Rate = 1.0
    probabilities: bool = False
    alpha: Real = 1.0
    beta: Real = 0.0
    evaluator_lr: Rate = 0.01
    soft: Literal["huber", "kl"] = "huber"
    soft_weight: Weight = 1.0
    temperature: Rate = 1.0
    stop_opposite: bool = False
    stage_one: bool = True
    stage_two: StageTwoConfig | None = StageTwoConfig()

    @model_validator(mode="after")
    def _one_stage_at_least(self) -> "DualdeConfig":
        if not self.stage_one and self.stage_two is None:
            raise ValueError("stage_one: false and stage_two: null leave nothing to train; switch one of them on")
        return self

    def check(self, stage: StageOptions) -> None:
        if stage.loss.name == "margin":
            raise UnsupportedError(
                "dualde weighs binary or softmax losses; loss margin has no positive and negative part to weigh."
            )
        if self.soft == "huber" and (stage.loss.label_smoothing or stage.negatives.labels == "known"):
            raise ValueError("dualde with soft: huber has no label_smoothing and no labels: known; use soft: kl")
        if self.soft == "kl" and self.normalise != "none":
            raise ValueError("normalise: dualde with soft: kl averages no scores; use soft: huber, or method mulde")


class DualDE(Method[DualdeConfig]):
    """Soft labels weighed by their quality; the teachers frozen in stage one, learning too in stage two.

    Their tables are trained in stage two, so they must be this stage's own copies.
    """

    name = "dualde"
    Settings = DualdeConfig
    num_teachers = range(1, 9)
    trains_teachers = True

    def prepare(self) -> None:
        self.stage = 1 if self.settings.stage_one else 2
        self.stage_two_since = 0
        # alpha_1..4 and beta_1..4 of Eq. 8, 9, 12, 13: student's positives and negatives, then each teacher's.
        self.alpha = self.student.entity.weight.new_full((2 + 2 * len(self.teachers),), self.settings.alpha)
        self.beta = torch.full_like(self.alpha, self.settings.beta)

    @property
    def teacher(self) -> Model:
        """The first teacher."""
        return self.teachers[0]

    @property
    def groups(self) -> Mapping[str, ParameterGroup]:
        how, found = self.settings, {"student": ParameterGroup(self.student)}
        if how.stage_two is not None:
            found |= {_group(i): ParameterGroup(model) for i, model in enumerate(self.teachers, 1)}
        if how.evaluation:
            tensors = {"alpha": self.alpha, "beta": self.beta}
            found["evaluators"] = ParameterGroup(tensors=tensors, optimizer={"lr": how.evaluator_lr})
        return found

    def phase(self, epochs: int) -> Phase:
        two = self.settings.stage_two
        if two is None:
            return Phase(0, epochs, epochs)
        teachers = [_group(i) for i in range(1, 1 + len(self.teachers))]
        if self.stage == 1:
            end = epochs if two.start == "plateau" else min(two.start, epochs)
            return Phase(0, end, end + two.epochs, frozen=frozenset(teachers))
        end = self.stage_two_since + two.epochs
        rates = dict.fromkeys(teachers, two.teacher_lr_scale) | dict.fromkeys(("student", "evaluators"), two.lr_scale)
        return Phase(self.stage_two_since, end, end, rates)

    def advance(self, epoch: int, epochs: int, plateau: bool) -> bool:
        two = self.settings.stage_two
        if self.stage == 2 or two is None:
            return False
        if epoch < self.phase(epochs).end and not (plateau and two.start == "plateau"):
            return False
        self.stage, self.stage_two_since = 2, epoch
        return True

    def state(self) -> MethodState:
        return MethodState({"stage": self.stage, "stage_two_since": self.stage_two_since})

    def restore(self, values: Mapping[str, int]) -> None:
        self.stage, self.stage_two_since = values["stage"], values["stage_two_since"]

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        how, both = self.settings, self.stage == 2
        views = [self.task.view(self.student, inputs, grad=True)]
        views += [self.task.view(model, inputs, grad=both) for model in self.teachers]
        num_learning = len(views) if both else 1  # the student first: L_Stu, and in stage two each L_Tea
        shapes: list[Shape] = []
        fields: list[ShapeFields] = []
        if how.structure:
            sign = sign_of(inputs.batch.queries.side).to(views[0].anchor.dtype)
            shapes, fields = map(list, zip(*(structure(view, sign) for view in views), strict=True))
        if how.soft == "kl":
            terms, qualities = self._listwise(views, shapes, num_learning)
        elif self._in_one_visit(views):
            terms, qualities = self._visited(views, shapes, fields, num_learning)
        else:
            terms, qualities = self._pointwise(views, shapes, fields, num_learning)
        terms = batch_means(terms, inputs)
        for i, view in enumerate(views[:num_learning]):
            terms |= {f"{_tag(i)}{name}": value for name, value in self.task.penalty(view).items()}
        watched = {f"soft_weight/{_group(i)}_positive": batch_mean(p, inputs) for i, p in enumerate(qualities)}
        groups = frozenset(map(_group, range(num_learning)))
        yield Update(groups | ({"evaluators"} if how.evaluation else set()), terms, watched)

    def logged(self, step: int) -> Mapping[str, float | Tensor]:
        return {**super().logged(step), "phase": float(self.stage)}

    def _quality(self, which: int, score: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        # p of Eq. 8, 9, 12, 13 for evaluator `which` (0, 2: positives; 1, 3: negatives), given the other side's score.
        sigma = torch.sigmoid(alpha[which] * (score.detach() + beta[which]))
        return 1.0 - sigma if which % 2 else sigma

    def _weights(self, which: int, score: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor | float, Tensor | float]:
        # (weight of the soft label, weight of the hard label); without evaluation both count in full.
        if not self.settings.evaluation:
            return 1.0, 1.0
        quality = self._quality(which, score, alpha, beta)
        return quality, 1.0 - quality

    def _pair(self, which: int, numbers: Sequence[Tensor], scale: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        # Of a number that every model has, the student first: model `which`'s own and what it is compared with, which
        # is the student's, or for the student the mean over teachers. scale: of scores, as `_scale` has it.
        own, other = numbers[which], numbers[0]
        if which == 0:
            *factors, offset = scale or (0.0,)
            theirs = [f * z for f, z in zip(factors, numbers[1:], strict=True)] if factors else numbers[1:]
            other = _mean_of(theirs, own, self.settings.weights_of(len(theirs)), offset)
        return own, other.detach() if self.settings.stop_opposite else other

    def _scale(self, views: Sequence[View]) -> list[Tensor]:
        # [Q] each: a factor for each teacher's scores and what is added to their average; nothing if they are as they
        # are.
        if self.settings.normalise == "none" or len(views) == 2:
            return []
        factors, offset = one_scale(*moments(views[1:]), self.settings.shares(len(views) - 1))
        return [*factors.unbind(1), offset]

    def _distance(self, own: Tensor, other: Tensor) -> Tensor:
        # Eq. 4
        if self.settings.probabilities:
            own, other = torch.sigmoid(own), torch.sigmoid(other)
        return F.huber_loss(own, other, reduction="none", delta=self.settings.delta)

    def _with_shapes(self, distance: Tensor, which: int, shapes: Sequence[Shape]) -> Tensor:
        # Eq. 5 on top: Eq. 7. Angle and length ratio of head and tail, of all models, or nothing.
        for numbers in zip(*((angle, torch.exp(ratio)) for angle, ratio in shapes), strict=True):
            own, other = self._pair(which, numbers)
            distance = distance + F.huber_loss(own, other, reduction="none", delta=self.settings.delta)
        return distance

    def _of_positives(
        self,
        kind: str,
        views: Sequence[View],
        shapes: Sequence[Shape],
        distances: Sequence[Tensor],
        hard: Sequence[Tensor],
        scale: Sequence[Tensor] = (),
    ) -> Terms:
        # Eq. 10-11 (and 14-15) of positive triples or whole queries; all terms together are Eq. 1.
        terms, qualities, scores = {}, [], [view.positive for view in views]
        for i, distance in enumerate(distances):
            soft_weight, hard_weight = self._weights(2 * i, self._pair(i, scores, scale)[1], self.alpha, self.beta)
            terms[f"{_tag(i)}soft{kind}"] = (
                self.settings.soft_weight * soft_weight * self._with_shapes(distance, i, shapes)
            )
            terms[f"{_tag(i)}hard{kind}"] = hard_weight * hard[i]
            if isinstance(soft_weight, Tensor):
                qualities.append(soft_weight.detach())
        return terms, qualities

    def _pointwise(
        self, views: Sequence[View], shapes: Sequence[Shape], fields: Sequence[ShapeFields], num_learning: int
    ) -> Terms:
        # With a distance for every candidate; the hard loss of positive triples is that of Eq. 2.
        scale = self._scale(views)
        asks = {"negatives": self._negatives(views, fields, num_learning, scale)}
        if self.task.loss == "softmax":
            asks |= {str(i): self.task.request(view) for i, view in enumerate(views[:num_learning])}
        got = reduce_over_candidates(asks)
        scores = [view.positive for view in views]
        distances = [self._distance(*self._pair(i, scores, scale)) for i in range(num_learning)]
        hard = [got[str(i)] if str(i) in got else F.softplus(-scores[i]) for i in range(num_learning)]
        terms, qualities = self._of_positives("_positive", views, shapes, distances, hard, scale)
        return terms | got["negatives"], qualities

    def _negatives(
        self, views: Sequence[View], shapes: Sequence[ShapeFields], num_learning: int, scale: Sequence[Tensor]
    ) -> LossRequest:
        # Eq. 10-11 (and 14-15) of the negatives of all models that learn.
        listed, n = self.task.loss == "softmax", len(views)

        def partials(*more: Tensor) -> dict[str, Partial]:
            *numbers, alpha, beta = more
            scores, rest, scale = numbers[:n], numbers[n : len(met)], numbers[len(met) :]
            each = [(rest[2 * i], rest[2 * i + 1]) for i in range(n)] if rest else []
            out: dict[str, Partial] = {"count": Sum(valid_mask(scores[0].detach()))}
            for i in range(num_learning):
                own, other = self._pair(i, scores, scale)
                soft_weight, hard_weight = self._weights(2 * i + 1, other, alpha, beta)
                distance = self._with_shapes(self._distance(own, other), i, each)
                soft = self.settings.soft_weight * soft_weight * distance
                out[f"{_tag(i)}soft_negative"] = self._over_negatives(own, soft)
                if not listed:
                    out[f"{_tag(i)}hard_negative"] = self._over_negatives(own, hard_weight * F.softplus(own))
            return out

        met = [view.negatives for view in views] + [field for pair in shapes for field in pair]
        return LossRequest(partials, met, self._over_count, scale, parameters=(self.alpha, self.beta))

    def _over_count(self, got: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Sums over negatives as this loss has them.
        names = [name for name in got if name.endswith("_negative")]
        if self.task.loss not in ("softplus", "softmax"):
            return {name: got[name] for name in names}
        means = torch.stack([got[name] for name in names]) / candidate_count(got)
        return dict(zip(names, means.unbind(), strict=True))

    def _in_one_visit(self, views: Sequence[View]) -> bool:
        # Whether `kernels` has all that is made of pairs.
        usual = len(views) == 2 and not self.settings.probabilities and self.task.loss in ("softplus", "bce")
        return usual and kernels.available([view.positive for view in views])

    def _visited(
        self, views: Sequence[View], shapes: Sequence[Shape], fields: Sequence[ShapeFields], num_learning: int
    ) -> Terms:
        # As `_pointwise`; what is made of a pair is made by one kernel.
        options = self.settings
        how = kernels.How(
            True, num_learning, options.soft_weight, options.delta, options.evaluation, options.stop_opposite
        )
        names = [f"{_tag(i)}{kind}" for i in range(num_learning) for kind in ("soft", "hard")]
        positives = [(view.positive, *more) for view, more in zip(views, shapes or ((), ()), strict=True)]
        pairs = [x.unsqueeze(-1) for numbers in zip(*positives, strict=True) for x in numbers]
        summed, (_, *qualities) = kernels.terms(how, self.alpha, self.beta, pairs)
        terms = {f"{name}_positive": value for name, value in zip(names, summed.unbind(), strict=True)}

        def partials(*numbers: Tensor) -> dict[str, Partial]:
            *pairs, alpha, beta = numbers
            summed, (count, *_) = kernels.terms(how._replace(positive=False), alpha, beta, pairs)
            found = {f"{name}_negative": Summed(value) for name, value in zip(names, summed.unbind(), strict=True)}
            return {"count": Summed(count), **found}

        negatives = [(view.negatives, *more) for view, more in zip(views, fields or ((), ()), strict=True)]
        met = [field for numbers in zip(*negatives, strict=True) for field in numbers]
        for field in met[1:]:
            field.masked = False
        ask = LossRequest(partials, met, self._over_count, parameters=(self.alpha, self.beta))
        return terms | reduce_over_candidates({"": ask})[""], qualities if options.evaluation else []

    def _over_negatives(self, own: Tensor, value: Tensor) -> Partial:
        if self.task.loss == "self_adversarial":
            return SoftmaxMean(self.task.temperature * own.detach(), value)
        return Sum(value)

    def _listwise(self, views: Sequence[View], shapes: Sequence[Shape], num_learning: int) -> Terms:
        # One weight per query, from its positive triple; the distance of a query is a KL divergence.
        how = self.settings
        asks = {str(i): self.task.request(view) for i, view in enumerate(views[:num_learning])}
        others = [views[1:], *([views[0]] for _ in views[1:num_learning])]  # whom each model imitates
        for i, theirs in enumerate(others):
            for j, other in enumerate(theirs):
                asks[f"{i} {j}"] = kl_divergence(views[i], other, how.temperature, stop_teacher=how.stop_opposite)
        got = reduce_over_candidates(asks)
        shares = [how.shares(len(views) - 1), *([1.0] for _ in views[1:num_learning])]
        distances = [
            got[f"{i} 0"] if len(each) == 1 else torch.stack([w * got[f"{i} {j}"] for j, w in enumerate(each)]).sum(0)
            for i, each in enumerate(shares)
        ]
        return self._of_positives("", views, shapes, distances, [got[str(i)] for i in range(num_learning)])


def _group(which: int) -> str:
    # "student", "teacher", "teacher_2", "teacher_3", …
    return ("student", "teacher")[which] if which < 2 else f"teacher_{which}"


def _tag(which: int) -> str:
    # Before the names of a model's terms; the student's have none.
    return f"{_group(which)}_" if which else ""


def _mean_of(teachers: Sequence[Tensor], own: Tensor, weights: Sequence[float], offset: Tensor | float = 0.0) -> Tensor:
    """[...]: weighted mean over teachers of a number of theirs, and what is added to it; where a pair does not count in
    `own`, the very number that says so, of which rounding would make another."""
    if len(teachers) == 1:
        return teachers[0]
    mean = torch.stack([w * z for w, z in zip(weights, teachers, strict=True)]).sum(0) / sum(weights) + offset
    return mean.masked_fill(own.detach() < MASKED_SCORE / 2, MASKED_SCORE)
