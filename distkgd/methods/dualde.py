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

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.distributed.rows import Ask, Field, Partial, SoftmaxMean, Sum, answer, present
from distkgd.errors import UnsupportedError
from distkgd.losses import KL_TRAVEL, Travel, batch_mean, huber, kl_divergence
from distkgd.methods.base import HardSettings, Method, Update
from distkgd.model import Model, View
from distkgd.scenes import Scene
from distkgd.scorers.base import Candidates, plain

_SMALLEST_NORM = 1e-6  # of an entity row, in the length ratio of Eq. 5


class DualDE(Method):
    """Soft labels weighed by their quality; the teacher frozen in stage one, learning too in stage two.

    teacher: its tables are trained in stage two, so it must be this stage's own copy.
    stage_two: (start epoch or None for the plateau, epochs, lr scale, teacher lr scale), or None.
    """

    name = "dualde"

    def __init__(
        self,
        student: Model,
        hard: HardSettings,
        teacher: Model,
        *,
        evaluation: bool,
        structure: bool,
        delta: float,
        probabilities: bool,
        alpha: float,
        beta: float,
        evaluator_lr: float,
        soft: str,
        soft_weight: float,
        temperature: float,
        stop_opposite: bool,
        stage_one: bool,
        stage_two: tuple[int | None, int, float, float] | None,
    ) -> None:
        super().__init__(student, hard)
        if hard.loss == "margin":
            raise UnsupportedError(
                "dualde weighs binary or softmax losses; loss margin has no positive and negative part."
            )
        self.teacher = teacher
        self.evaluation = evaluation
        self.structure = structure
        self.delta = delta
        self.probabilities = probabilities
        self.soft = soft
        self.soft_weight = soft_weight
        self.temperature = temperature
        self.stop_opposite = stop_opposite
        self.evaluator_lr = evaluator_lr
        self.stage_two = stage_two
        self.stage = 1 if stage_one else 2
        self.stage_two_since = 0
        # alpha_1..4 and beta_1..4 of Eq. 8, 9, 12, 13: student's positives and negatives, then the teacher's.
        table = student.entity.weight
        self.alpha = torch.full((4,), alpha, device=table.device, dtype=table.dtype)
        self.beta = torch.full((4,), beta, device=table.device, dtype=table.dtype)

    @property
    def trained(self) -> Mapping[str, Model]:
        models = {"student": self.student}
        return models | {"teacher": self.teacher} if self.stage_two is not None else models

    @property
    def evaluators(self) -> Mapping[str, Tensor]:
        return {"alpha": self.alpha, "beta": self.beta} if self.evaluation else {}

    def last_epoch(self, epochs: int) -> int:
        if self.stage_two is None:
            return epochs
        return (epochs if self.stage == 1 else self.stage_two_since) + self.stage_two[1]

    def advance(self, epoch: int, epochs: int, plateau: bool) -> bool:
        if self.stage == 2 or self.stage_two is None:
            return False
        start = epochs if self.stage_two[0] is None else min(self.stage_two[0], epochs)
        if epoch < start and not (plateau and self.stage_two[0] is None):
            return False
        self.stage, self.stage_two_since = 2, epoch
        return True

    def lr_scale(self, group: str) -> float:
        if self.stage == 1 or self.stage_two is None:
            return 1.0
        return self.stage_two[3] if group == "teacher" else self.stage_two[2]

    def state(self) -> dict[str, int]:
        return {"stage": self.stage, "stage_two_since": self.stage_two_since}

    def restore(self, state: Mapping[str, int]) -> None:
        self.stage, self.stage_two_since = state["stage"], state["stage_two_since"]

    def updates(self, scene: Scene) -> Iterator[Update]:
        both = self.stage == 2
        student = self.view(self.student, scene, grad=True)
        teacher = self.view(self.teacher, scene, grad=both)
        if self.soft == "kl":
            terms = self._listwise(student, teacher, both)
        else:
            terms = self._pointwise(student, teacher, both)
        terms = {name: batch_mean(value, scene) for name, value in terms.items()} | self.penalty(student)
        groups = {"student"} | ({"evaluators"} if self.evaluation else set())
        if both:
            groups.add("teacher")
            terms |= {f"teacher_{name}": value for name, value in self.penalty(teacher).items()}
        yield Update(frozenset(groups), terms)

    def travel(self) -> Travel:
        sides = 2 if self.stage == 2 else 1
        each = self.hard_travel()
        if self.soft == "kl":
            return sum([KL_TRAVEL + each] * sides, Travel())
        listed = self.hard.loss == "softmax"
        # Per side a soft and, unless it is listwise, a hard sum; self-adversarial means carry their weights' sum.
        columns = sides * (1 if listed else 2) * (2 if self.hard.loss == "self_adversarial" else 1)
        found = Travel(1 + columns) + (sum([each] * sides, Travel()) if listed else Travel())
        if self.structure:
            found += Travel(widths=tuple((model.entity.dim + 2, learns) for model, learns in self.speakers()))
        return found

    def speakers(self) -> list[tuple[Model, bool]]:
        return [(self.student, True), (self.teacher, self.stage == 2)]

    def _quality(self, which: int, score: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        # p of Eq. 8, 9, 12, 13 for evaluator `which` (0, 2: positives; 1, 3: negatives), given the other side's score.
        sigma = torch.sigmoid(alpha[which] * (score.detach() + beta[which]))
        return 1.0 - sigma if which % 2 else sigma

    def _weights(self, which: int, score: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor | float, Tensor | float]:
        # (weight of the soft label, weight of the hard label); without evaluation both count in full.
        if not self.evaluation:
            return 1.0, 1.0
        quality = self._quality(which, score, alpha, beta)
        return quality, 1.0 - quality

    def _score_distance(self, own: Tensor, other: Tensor) -> Tensor:
        # DualDE Eq. 4
        if self.probabilities:
            return huber(torch.sigmoid(own) - torch.sigmoid(other), self.delta)
        return huber(own - other, self.delta)

    def _pointwise(self, student: View, teacher: View, both: bool) -> dict[str, Tensor]:
        # Eq. 10-11 (and 14-15) with a distance for every candidate.
        shape_s, shape_t = self._shapes(student), self._shapes(teacher)
        sides = self._sides(student, teacher, both)
        cut = _detached if self.stop_opposite else _same
        asks = {"negatives": self._negatives(sides, student, teacher, shape_s, shape_t)}
        if self.hard.loss == "softmax":
            asks |= {tag: self.hard_ask(student if own_is_student else teacher) for tag, _, own_is_student in sides}
        got = answer(asks)
        terms: dict[str, Tensor] = {}
        for tag, first, own_is_student in sides:
            own, other = (student, teacher) if own_is_student else (teacher, student)
            distance = self._score_distance(own.positive, cut(other.positive))
            if self.structure:
                own_shape, other_shape = (shape_s, shape_t) if own_is_student else (shape_t, shape_s)
                distance = distance + self._shape_distance(own_shape.positive, [cut(x) for x in other_shape.positive])
            soft_weight, hard_weight = self._weights(first, other.positive, self.alpha, self.beta)
            terms[f"{tag}soft_positive"] = self.soft_weight * soft_weight * distance
            terms[f"{tag}hard_positive"] = hard_weight * (got[tag] if tag in got else F.softplus(-own.positive))
        terms |= got["negatives"]
        return terms

    def _negatives(
        self, sides: list[tuple[str, int, bool]], student: View, teacher: View, shape_s: "_Shapes", shape_t: "_Shapes"
    ) -> Ask:
        # All negative terms of both sides.
        cut = _detached if self.stop_opposite else _same
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
                out[f"{tag}soft_negative"] = self._over_negatives(own, self.soft_weight * soft_weight * distance)
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
        for tag, _, own_is_student in sides:
            own, other = (student, teacher) if own_is_student else (teacher, student)
            asks[f"{tag}soft"] = kl_divergence(own, other, self.temperature, stop_teacher=self.stop_opposite)
            asks[f"{tag}hard"] = self.hard_ask(own)
        got = answer(asks)
        for tag, first, own_is_student in sides:
            own, other = (student, teacher) if own_is_student else (teacher, student)
            distance = got[f"{tag}soft"]
            if self.structure:
                own_shape, other_shape = (shape_s, shape_t) if own_is_student else (shape_t, shape_s)
                cut = _detached if self.stop_opposite else _same
                distance = distance + self._shape_distance(own_shape.positive, [cut(x) for x in other_shape.positive])
            soft_weight, hard_weight = self._weights(first, other.positive, self.alpha, self.beta)
            terms[f"{tag}soft"] = self.soft_weight * soft_weight * distance
            terms[f"{tag}hard"] = hard_weight * got[f"{tag}hard"]
        return terms

    @staticmethod
    def _sides(student: View, teacher: View, both: bool) -> list[tuple[str, int, bool]]:
        # (prefix of its terms, its first evaluator, whether it is the student's): L_Stu, and in stage two L_Tea.
        return [("", 0, True)] + ([("teacher_", 2, False)] if both else [])

    def _shape_distance(self, own: "list[Tensor] | tuple[Tensor, ...]", other: list[Tensor]) -> Tensor:
        # DualDE Eq. 5: angle and length ratio of head and tail.
        return huber(own[0] - other[0], self.delta) + huber(own[1] - other[1], self.delta)

    def _shapes(self, view: View, fields: bool = True) -> "_Shapes":
        return _Shapes(view, fields) if self.structure else _NO_SHAPES


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
        log_anchor = _log_norm(view.anchor)
        self.positive = [
            F.cosine_similarity(view.anchor, view.answer, dim=-1, eps=_SMALLEST_NORM),
            torch.exp(sign * (log_anchor - _log_norm(view.answer))),
        ]
        if fields:
            ratio = torch.stack([sign, sign * log_anchor], 1)
            self.fields = [
                view.field(F.normalize(view.anchor, dim=-1, eps=_SMALLEST_NORM), _meet_cosine),
                view.field(ratio, _meet_ratio),
            ]


_NO_SHAPES = _Shapes(None, False)


def _log_norm(rows: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(rows, dim=-1).clamp(min=_SMALLEST_NORM))


def _meet_cosine(queries: Tensor, rows: Candidates) -> Tensor:
    return queries @ F.normalize(plain(rows), dim=-1, eps=_SMALLEST_NORM).transpose(-1, -2)


def _meet_ratio(queries: Tensor, rows: Candidates) -> Tensor:
    # exp(sign * (log |anchor| - log |candidate|)), sign = -1 where the candidate is the head.
    # The product gives autograd a result of its own: fields are written over where a pair does not count.
    return 1.0 * torch.exp(queries[..., 1:] - queries[..., :1] * _log_norm(plain(rows)).unsqueeze(-2))


def _same(x: Tensor) -> Tensor:
    return x


def _detached(x: Tensor) -> Tensor:
    return x.detach()
