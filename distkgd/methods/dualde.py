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
Differs from the authors' code (a later port):
- it computes the structure distance and leaves it out; it weighs the student's negatives with the *positive* sigmoid;
  it compares scores after a sigmoid (`probabilities: true` here); it multiplies aggregated means instead of
  per-negative products; teacher negatives are weighed self-adversarially.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from distkgd.distributed.rows import Ask, Field, Partial, SoftmaxMean, Sum, answer, present
from distkgd.errors import UnsupportedError
from distkgd.losses import KL_TRAVEL, Travel, batch_mean, huber, kl_divergence
from distkgd.methods.base import HardSettings, Method, Setup, Update
from distkgd.model import Model, View
from distkgd.scenes import Scene
from distkgd.scorers.base import Candidates, Scorer, plain
from distkgd.settings import Frozen, Positive, Rate, Real, Weight

if TYPE_CHECKING:
    from distkgd.config import StageConfig

_SMALLEST_NORM = 1e-6  # of an entity row, in the length ratio of Eq. 5


class StageTwoConfig(Frozen):
    """DualDE's second stage, in which the teacher learns too.

    start: epoch at which it begins, or "plateau": when validation MRR has stopped rising (the stage's `patience`).
    epochs: how many epochs it lasts at most.
    lr_scale, teacher_lr_scale: factors on the stage's learning rate for student and teacher.
    """

    start: Positive | Literal["plateau"] = "plateau"
    epochs: Positive = 10
    lr_scale: Rate = 0.1
    teacher_lr_scale: Rate = 0.1


class DualdeConfig(Frozen):
    """DualDE (Zhu et al., WSDM 2022).

    evaluation: weigh each soft label by its learned quality (Eq. 8-9, 12-13); off: soft and hard weights are 1.
    structure: add the embedding-structure distance to the score distance (Eq. 5-7).
    delta: of the Huber distance. probabilities: compare sigmoid(score) instead of scores, as the authors' code does.
    alpha, beta: initial slope and offset of the four soft-label evaluators; evaluator_lr: how fast they learn.
    soft: "huber" per candidate (Eq. 4), or "kl": the distance of a query is the KL divergence over its candidates and
        its weight is that of its positive triple - our listwise form, for softmax losses.
    soft_weight: factor on the soft losses (the paper's is 1). stop_opposite: each model's loss leaves the other alone.
    stage_one: off starts with both models learning. stage_two: null leaves the teacher frozen throughout.
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


class DualDE(Method[DualdeConfig]):
    """Soft labels weighed by their quality; the teacher frozen in stage one, learning too in stage two.

    The teacher's tables are trained in stage two, so it must be this stage's own copy.
    """

    name = "dualde"
    Settings = DualdeConfig

    def __init__(
        self,
        student: Model,
        hard: HardSettings,
        teachers: Sequence[Model],
        settings: DualdeConfig,
        setup: Setup | None = None,
    ) -> None:
        super().__init__(student, hard, teachers, settings, setup)
        (self.teacher,) = teachers
        self.evaluator_lr = settings.evaluator_lr
        self.stage = 1 if settings.stage_one else 2
        self.stage_two_since = 0
        # alpha_1..4 and beta_1..4 of Eq. 8, 9, 12, 13: student's positives and negatives, then the teacher's.
        table = student.entity.weight
        self.alpha = torch.full((4,), settings.alpha, device=table.device, dtype=table.dtype)
        self.beta = torch.full((4,), settings.beta, device=table.device, dtype=table.dtype)

    @classmethod
    def check(cls, stage: "StageConfig") -> None:
        if stage.loss.name == "margin":
            raise UnsupportedError(
                "dualde weighs binary or softmax losses; loss margin has no positive and negative part to weigh."
            )
        if stage.distill.soft == "huber" and (stage.loss.label_smoothing or stage.negatives.labels == "known"):
            raise ValueError("dualde with soft: huber has no label_smoothing and no labels: known; use soft: kl")

    @property
    def trained(self) -> Mapping[str, Model]:
        models = {"student": self.student}
        return models | {"teacher": self.teacher} if self.settings.stage_two is not None else models

    @property
    def evaluators(self) -> Mapping[str, Tensor]:
        return {"alpha": self.alpha, "beta": self.beta} if self.settings.evaluation else {}

    def last_epoch(self, epochs: int) -> int:
        if self.settings.stage_two is None:
            return epochs
        return (epochs if self.stage == 1 else self.stage_two_since) + self.settings.stage_two.epochs

    def advance(self, epoch: int, epochs: int, plateau: bool) -> bool:
        two = self.settings.stage_two
        if self.stage == 2 or two is None:
            return False
        start = epochs if two.start == "plateau" else min(two.start, epochs)
        if epoch < start and not (plateau and two.start == "plateau"):
            return False
        self.stage, self.stage_two_since = 2, epoch
        return True

    def lr_scale(self, group: str) -> float:
        two = self.settings.stage_two
        if self.stage == 1 or two is None:
            return 1.0
        return two.teacher_lr_scale if group == "teacher" else two.lr_scale

    def state(self) -> dict[str, int]:
        return {"stage": self.stage, "stage_two_since": self.stage_two_since}

    def restore(self, state: Mapping[str, int]) -> None:
        self.stage, self.stage_two_since = state["stage"], state["stage_two_since"]

    def updates(self, scene: Scene) -> Iterator[Update]:
        both = self.stage == 2
        student = self.view(self.student, scene, grad=True)
        teacher = self.view(self.teacher, scene, grad=both)
        if self.settings.soft == "kl":
            terms = self._listwise(student, teacher, both)
        else:
            terms = self._pointwise(student, teacher, both)
        terms = {name: batch_mean(value, scene) for name, value in terms.items()} | self.penalty(student)
        groups = {"student"} | ({"evaluators"} if self.settings.evaluation else set())
        if both:
            groups.add("teacher")
            terms |= {f"teacher_{name}": value for name, value in self.penalty(teacher).items()}
        yield Update(frozenset(groups), terms)

    def travel(self) -> Travel:
        sides = 2 if self.stage == 2 else 1
        each = self.hard_travel()
        if self.settings.soft == "kl":
            return sum([KL_TRAVEL + each] * sides, Travel())
        listed = self.hard.loss == "softmax"
        # Per side a soft and, unless it is listwise, a hard sum; self-adversarial means carry their weights' sum.
        columns = sides * (1 if listed else 2) * (2 if self.hard.loss == "self_adversarial" else 1)
        found = Travel(1 + columns) + (sum([each] * sides, Travel()) if listed else Travel())
        if self.settings.structure:
            found += Travel(widths=tuple((model.scorer.dim + 2, learns) for model, learns in self.speakers()))
        return found

    def speakers(self) -> list[tuple[Model, bool]]:
        return [(self.student, True), (self.teacher, self.stage == 2)]

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

    def _score_distance(self, own: Tensor, other: Tensor) -> Tensor:
        # DualDE Eq. 4
        if self.settings.probabilities:
            return huber(torch.sigmoid(own) - torch.sigmoid(other), self.settings.delta)
        return huber(own - other, self.settings.delta)

    def _pointwise(self, student: View, teacher: View, both: bool) -> dict[str, Tensor]:
        # Eq. 10-11 (and 14-15) with a distance for every candidate.
        shape_s, shape_t = self._shapes(student), self._shapes(teacher)
        sides = self._sides(student, teacher, both)
        cut = _detached if self.settings.stop_opposite else _same
        asks = {"negatives": self._negatives(sides, student, teacher, shape_s, shape_t)}
        if self.hard.loss == "softmax":
            asks |= {tag: self.hard_ask(student if own_is_student else teacher) for tag, _, own_is_student in sides}
        got = answer(asks)
        terms: dict[str, Tensor] = {}
        for tag, first, own_is_student in sides:
            own, other = (student, teacher) if own_is_student else (teacher, student)
            distance = self._score_distance(own.positive, cut(other.positive))
            if self.settings.structure:
                own_shape, other_shape = (shape_s, shape_t) if own_is_student else (shape_t, shape_s)
                distance = distance + self._shape_distance(own_shape.positive, [cut(x) for x in other_shape.positive])
            soft_weight, hard_weight = self._weights(first, other.positive, self.alpha, self.beta)
            terms[f"{tag}soft_positive"] = self.settings.soft_weight * soft_weight * distance
            terms[f"{tag}hard_positive"] = hard_weight * (got[tag] if tag in got else F.softplus(-own.positive))
        terms |= got["negatives"]
        return terms

    def _negatives(
        self, sides: list[tuple[str, int, bool]], student: View, teacher: View, shape_s: "_Shapes", shape_t: "_Shapes"
    ) -> Ask:
        # All negative terms of both sides.
        cut = _detached if self.settings.stop_opposite else _same
        listed = self.hard.loss == "softmax"

        def partials(zs: Tensor, zt: Tensor, *more: Tensor) -> dict[str, Partial]:
            *shapes, alpha, beta = more
            out: dict[str, Partial] = {"count": Sum(present(zs.detach()))}
            for tag, first, own_is_student in sides:
                own, other = (zs, zt) if own_is_student else (zt, zs)
                distance = self._score_distance(own, cut(other))
                if shapes:
                    mine, theirs = (shapes[:2], shapes[2:]) if own_is_student else (shapes[2:], shapes[:2])
                    distance = distance + self._shape_distance(mine, [cut(x) for x in theirs])
                soft_weight, hard_weight = self._weights(first + 1, other, alpha, beta)
                soft = self.settings.soft_weight * soft_weight * distance
                out[f"{tag}soft_negative"] = self._over_negatives(own, soft)
                if not listed:
                    out[f"{tag}hard_negative"] = self._over_negatives(own, hard_weight * F.softplus(own))
            return out

        def finish(got: dict[str, Tensor]) -> dict[str, Tensor]:
            count = got["count"].clamp(min=1.0)
            averaged = self.hard.loss in ("softplus", "softmax")
            names = [name for name in got if name.endswith("_negative")]
            return {name: got[name] / count if averaged else got[name] for name in names}

        fields = [student.negatives, teacher.negatives, *shape_s.fields, *shape_t.fields]
        return Ask(partials, fields, finish, parameters=(self.alpha, self.beta))

    def _over_negatives(self, own: Tensor, value: Tensor) -> Partial:
        if self.hard.loss == "self_adversarial":
            return SoftmaxMean(self.hard.temperature * own.detach(), value)
        return Sum(value)

    def _listwise(self, student: View, teacher: View, both: bool) -> dict[str, Tensor]:
        # One weight per query, from its positive triple; the distance of a query is a KL divergence.
        terms: dict[str, Tensor] = {}
        shape_s, shape_t = self._shapes(student, fields=False), self._shapes(teacher, fields=False)
        sides = self._sides(student, teacher, both)
        asks: dict[str, Ask] = {}
        how = self.settings
        for tag, _, own_is_student in sides:
            own, other = (student, teacher) if own_is_student else (teacher, student)
            asks[f"{tag}soft"] = kl_divergence(own, other, how.temperature, stop_teacher=how.stop_opposite)
            asks[f"{tag}hard"] = self.hard_ask(own)
        got = answer(asks)
        for tag, first, own_is_student in sides:
            own, other = (student, teacher) if own_is_student else (teacher, student)
            distance = got[f"{tag}soft"]
            if self.settings.structure:
                own_shape, other_shape = (shape_s, shape_t) if own_is_student else (shape_t, shape_s)
                cut = _detached if self.settings.stop_opposite else _same
                distance = distance + self._shape_distance(own_shape.positive, [cut(x) for x in other_shape.positive])
            soft_weight, hard_weight = self._weights(first, other.positive, self.alpha, self.beta)
            terms[f"{tag}soft"] = self.settings.soft_weight * soft_weight * distance
            terms[f"{tag}hard"] = hard_weight * got[f"{tag}hard"]
        return terms

    @staticmethod
    def _sides(student: View, teacher: View, both: bool) -> list[tuple[str, int, bool]]:
        # (prefix of its terms, its first evaluator, whether it is the student's): L_Stu, and in stage two L_Tea.
        return [("", 0, True)] + ([("teacher_", 2, False)] if both else [])

    def _shape_distance(self, own: "list[Tensor] | tuple[Tensor, ...]", other: list[Tensor]) -> Tensor:
        # DualDE Eq. 5: angle and length ratio of head and tail.
        return huber(own[0] - other[0], self.settings.delta) + huber(own[1] - other[1], self.settings.delta)

    def _shapes(self, view: View, fields: bool = True) -> "_Shapes":
        return _Shapes(view, fields) if self.settings.structure else _NO_SHAPES


class _Shapes:
    """Cosine and length ratio |h| / |t| of a view's head and tail rows (Eq. 5): of its positives ([Q] each), and of its
    queries' anchors with every candidate (fields)."""

    positive: list[Tensor]
    fields: list[Field]

    def __init__(self, view: View | None, fields: bool) -> None:
        self.positive, self.fields = [], []
        if view is None:
            return
        asks_head = view.scene.batch.queries.side == 1
        sign = torch.where(asks_head, -1.0, 1.0).to(view.anchor.dtype)
        scorer = view.model.scorer
        anchor, answer = scorer.coordinates(view.anchor), scorer.coordinates(view.answer)
        log_anchor = _log_norm(anchor)
        self.positive = [
            F.cosine_similarity(anchor, answer, dim=-1, eps=_SMALLEST_NORM),
            torch.exp(sign * (log_anchor - _log_norm(answer))),
        ]
        if fields:
            ratio = torch.stack([sign, sign * log_anchor], 1)
            self.fields = [
                view.field(F.normalize(anchor, dim=-1, eps=_SMALLEST_NORM), partial(_meet_cosine, scorer)),
                view.field(ratio, partial(_meet_ratio, scorer)),
            ]


_NO_SHAPES = _Shapes(None, False)


def _log_norm(rows: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(rows, dim=-1).clamp(min=_SMALLEST_NORM))


def _meet_cosine(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    return queries @ F.normalize(scorer.coordinates(plain(rows)), dim=-1, eps=_SMALLEST_NORM).transpose(-1, -2)


def _meet_ratio(scorer: Scorer, queries: Tensor, rows: Candidates) -> Tensor:
    # exp(sign * (log |anchor| - log |candidate|)), sign = -1 where the candidate is the head.
    # The product gives autograd a result of its own: fields are written over where a pair does not count.
    return 1.0 * torch.exp(
        queries[..., 1:] - queries[..., :1] * _log_norm(scorer.coordinates(plain(rows))).unsqueeze(-2)
    )


def _same(x: Tensor) -> Tensor:
    return x


def _detached(x: Tensor) -> Tensor:
    return x.detach()
