"""DualDE, equation by equation, against formulas for one triple at a time."""

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distkgd.config.stage import LossConfig
from distkgd.data.step_inputs import StepInputBuilder
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, UnsupportedError
from distkgd.methods import TaskLoss, Update
from distkgd.methods.dualde import DualDE, DualdeConfig, StageTwoConfig
from distkgd.methods.losses.scores import hard_loss
from distkgd.methods.losses.teachers import AveragedTeachers
from distkgd.models.view import View
from distkgd.pipeline.config import parse_config
from distkgd.training import loop
from distkgd.training.job import Job, Progress, schedule_scale, step_name
from distkgd.training.loop import train_stage, train_step
from tests.covering import all_pairs
from tests.jobs import (
    Asked,
    NaiveModel,
    asked,
    assert_same_gradients,
    entity_gradient,
    spelled_out,
    toy_inputs,
    toy_model,
    toy_setup,
)
from tests.toys import toy_graph, toy_job

GRAPH = toy_graph(entities=15, relations=3, triples=130)
STEP = 1
ADVERSARIAL = 0.6
ALPHA, BETA = (0.9, -0.4, 1.3, 0.6), (0.2, -0.3, 0.5, 0.1)
LOSSES = ("softplus", "bce", "self_adversarial")
REGIMES: dict[str, dict[str, Any]] = {
    "triple": {"kind": "triple", "num": 9, "filtered": True, "sides": "uniform", "batch_size": 6},
    "all": {"kind": "all", "sides": "both", "batch_size": 4},
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
EVERY_REGIME = pytest.mark.parametrize("regime", REGIMES)


class Setting:
    """A method with a ComplEx teacher and a TransE student, the queries of one batch, and naive copies of both."""

    def __init__(
        self, regime: str = "triple", loss: str = "softplus", *, stage: int = 1, hard: Any = None, **options: Any
    ) -> None:
        self.student = toy_model(GRAPH, "transe", 5, reciprocal=False, margin=3.0)
        self.teacher = toy_model(GRAPH, "complex", 8, reciprocal=True, seed=4)
        settings = dict(loss=loss, temperature=ADVERSARIAL, margin=1.0, label_smoothing=0.0, regulariser="none")
        settings |= dict(weight=0.0, relation_weight=None, dropout=0.0, relation_dropout=0.0, bf16=False) | (hard or {})
        two = StageTwoConfig(start=3, epochs=4, lr_scale=0.5, teacher_lr_scale=0.25)
        chosen = DualdeConfig(**({"stage_two": two, "stage_one": stage == 1} | options))
        self.method = DualDE(self.student, TaskLoss(**settings), [self.teacher], chosen, toy_setup(GRAPH))
        with torch.no_grad():
            self.method.alpha.copy_(torch.tensor(ALPHA, dtype=torch.float64))
            self.method.beta.copy_(torch.tensor(BETA, dtype=torch.float64))
        for tensor in (self.method.alpha, self.method.beta):
            tensor.requires_grad_(True)
        self.loss = loss
        self.input_builder: StepInputBuilder = toy_inputs(GRAPH, **REGIMES[regime])
        self.asked = spelled_out(self.input_builder, STEP)
        self.naive_student, self.naive_teacher = NaiveModel(self.student), NaiveModel(self.teacher)
        self.alpha, self.beta = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (ALPHA, BETA))

    def update(self) -> Update:
        (part,) = self.input_builder.parts(STEP, 1)
        (update,) = self.method.updates(self.input_builder.inputs(part))
        return update

    def terms(self) -> dict[str, Tensor]:
        return self.update().terms

    def mean(self, of_query: Callable[[Asked], Tensor]) -> Tensor:
        """Over the global batch's queries."""
        return torch.stack([of_query(q) for q in self.asked]).mean()

    def over_negatives(self, own: NaiveModel, query: Asked, of_triple: Callable[[int], Tensor]) -> Tensor:
        """What stands for the sum over T^-: a mean, a sum, or the self-adversarial mean of the learning model."""
        values = [of_triple(e) for e in query.negatives]
        if self.loss == "bce":
            return sum(values, torch.zeros((), dtype=torch.float64))
        if self.loss == "softplus":
            return sum(values, torch.zeros((), dtype=torch.float64)) / max(1, len(values))
        odds = [torch.exp(ADVERSARIAL * own.scores(query, [e])[0].detach()) for e in query.negatives]
        return sum(w * x for w, x in zip(odds, values, strict=True)) / max(sum(odds), 1e-300)


# -- the paper's equations, for one triple --------------------------------------------------------------------------


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1.0 + torch.exp(-x))


def eq_2_positive(z: Tensor) -> Tensor:
    return -log_sigmoid(z)


def eq_2_negative(z: Tensor) -> Tensor:
    return -torch.log(1.0 - 1.0 / (1.0 + torch.exp(-z)))  # the paper prints 1 - log sigma


def eq_6(a: Tensor, b: Tensor, delta: float = 1.0) -> Tensor:
    gap = abs(a - b)
    return gap * gap / 2 if gap <= delta else delta * (gap - delta / 2)


def eq_4(own: Tensor, other: Tensor, delta: float = 1.0) -> Tensor:
    return eq_6(own, other, delta)


def angle(model: NaiveModel, query: Asked, entity: int) -> Tensor:
    h, t = (x.reshape(-1) for x in model.head_tail(query, [entity]))
    return (h / h.square().sum().sqrt() * (t / t.square().sum().sqrt())).sum()


def length_ratio(model: NaiveModel, query: Asked, entity: int) -> Tensor:
    h, t = (x.reshape(-1) for x in model.head_tail(query, [entity]))
    return h.square().sum().sqrt() / t.square().sum().sqrt()


def eq_5(
    own: NaiveModel, other: NaiveModel, query: Asked, entity: int, delta: float = 1.0, cut: bool = False
) -> Tensor:
    pairs = [(shape(own, query, entity), shape(other, query, entity)) for shape in (angle, length_ratio)]
    return sum(eq_6(a, b.detach() if cut else b, delta) for a, b in pairs)


def sigmoid(alpha: Tensor, beta: Tensor, score: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-alpha * (score.detach() + beta)))


def quality(setting: Setting, which: int, score: Tensor) -> Tensor:
    """Eq. 8, 9, 12, 13 for which = 0, 1, 2, 3."""
    p = sigmoid(setting.alpha[which], setting.beta[which], score)
    return p if which in (0, 2) else 1.0 - p


def objective(setting: Setting, *, structure: bool = True, evaluation: bool = True, cut: bool = False) -> dict:
    """Every term of Eq. 1 in the method's present stage, undistorted by options other than these."""
    sides = [("", 0, setting.naive_student, setting.naive_teacher)]
    if setting.method.stage == 2:
        sides.append(("teacher_", 2, setting.naive_teacher, setting.naive_student))
    out = {}
    for tag, which, own, other in sides:

        def soft(query: Asked, entity: int, which: int, own: NaiveModel = own, other: NaiveModel = other) -> Tensor:
            theirs = other.scores(query, [entity])[0]
            distance = eq_4(own.scores(query, [entity])[0], theirs.detach() if cut else theirs)
            if structure:
                distance = distance + eq_5(own, other, query, entity, cut=cut)
            return quality(setting, which, theirs) * distance if evaluation else distance

        def hard(query: Asked, entity: int, which: int, own: NaiveModel = own, other: NaiveModel = other) -> Tensor:
            p = quality(setting, which, other.scores(query, [entity])[0]) if evaluation else 0.0
            return (1.0 - p) * (eq_2_negative if which % 2 else eq_2_positive)(own.scores(query, [entity])[0])

        for name, of_triple in (("soft", soft), ("hard", hard)):

            def negative(query: Asked, of_triple: Any = of_triple, which: int = which, own: NaiveModel = own) -> Tensor:
                return setting.over_negatives(own, query, lambda e: of_triple(query, e, which + 1))

            out[f"{tag}{name}_positive"] = setting.mean(lambda q, f=of_triple, w=which: f(q, q.answer, w))
            out[f"{tag}{name}_negative"] = setting.mean(negative)
    return out


def assert_terms(setting: Setting, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    found = setting.terms()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    return found


# -- equation by equation -------------------------------------------------------------------------------------------


@EVERY_LOSS
@EVERY_REGIME
def test_eq_2_without_evaluation_the_hard_loss_is_binary_cross_entropy(loss: str, regime: str) -> None:
    setting = Setting(regime, loss, evaluation=False)
    own = setting.naive_student
    expected = {
        "hard_positive": setting.mean(lambda q: eq_2_positive(own.own(q))),
        "hard_negative": setting.mean(
            lambda q: setting.over_negatives(own, q, lambda e: eq_2_negative(own.scores(q, [e])[0]))
        ),
    }
    assert_terms(setting, expected)


@pytest.mark.parametrize(("loss", "regime", "delta", "soft_weight"), all_pairs(LOSSES, REGIMES, [0.4, 1.0], [1.0, 0.3]))
def test_eq_4_and_6_the_score_distance_is_huber_of_raw_scores(
    loss: str, regime: str, delta: float, soft_weight: float
) -> None:
    setting = Setting(regime, loss, evaluation=False, structure=False, delta=delta, soft_weight=soft_weight)
    student, teacher = setting.naive_student, setting.naive_teacher

    def distance(query: Asked, entity: int) -> Tensor:
        return soft_weight * eq_4(student.scores(query, [entity])[0], teacher.scores(query, [entity])[0], delta)

    expected = {
        "soft_positive": setting.mean(lambda q: distance(q, q.answer)),
        "soft_negative": setting.mean(lambda q: setting.over_negatives(student, q, lambda e: distance(q, e))),
    }
    assert_terms(setting, expected)


def test_probabilities_compares_the_sigmoids_of_scores_as_the_authors_code_does() -> None:
    setting = Setting(evaluation=False, structure=False, probabilities=True)
    student, teacher = setting.naive_student, setting.naive_teacher

    def distance(query: Asked, entity: int) -> Tensor:
        a, b = (torch.exp(log_sigmoid(m.scores(query, [entity])[0])) for m in (student, teacher))
        return eq_6(a, b)

    expected = {
        "soft_positive": setting.mean(lambda q: distance(q, q.answer)),
        "soft_negative": setting.mean(lambda q: setting.over_negatives(student, q, lambda e: distance(q, e))),
    }
    assert_terms(setting, expected)


@pytest.mark.parametrize(("loss", "regime", "delta"), all_pairs(LOSSES, REGIMES, [0.4, 1.0]))
def test_eq_5_and_7_the_structure_distance_of_head_and_tail_is_added_to_the_score_distance(
    loss: str, regime: str, delta: float
) -> None:
    with_it = Setting(regime, loss, evaluation=False, delta=delta)
    without = Setting(regime, loss, evaluation=False, delta=delta, structure=False).terms()
    student, teacher = with_it.naive_student, with_it.naive_teacher
    expected = {
        "soft_positive": with_it.mean(lambda q: eq_5(student, teacher, q, q.answer, delta)),
        "soft_negative": with_it.mean(
            lambda q: with_it.over_negatives(student, q, lambda e: eq_5(student, teacher, q, e, delta))
        ),
    }
    assert {q.side for q in with_it.asked} == {0, 1}
    assert all(x > 0.01 for x in expected.values())
    assert_terms(with_it, {name: without[name] + value for name, value in expected.items()})


def test_the_length_ratio_of_eq_5_is_head_over_tail_in_both_directions() -> None:
    setting = Setting("all", evaluation=False)
    with torch.no_grad():
        for model, naive, factor in (
            (setting.student, setting.naive_student, 3.0),
            (setting.teacher, setting.naive_teacher, 0.5),
        ):
            # Long even entities: a swapped ratio is far from the right one.
            model.entity.weight[::2] *= factor
            naive.entity[::2] *= factor
    assert_terms(setting, objective(setting, evaluation=False))


@EVERY_LOSS
@EVERY_REGIME
def test_eq_8_to_11_the_students_soft_and_hard_labels_are_weighed_by_the_teachers_score(loss: str, regime: str) -> None:
    setting = Setting(regime, loss)
    student, teacher = setting.naive_student, setting.naive_teacher
    a1, a2, b1, b2 = ALPHA[0], ALPHA[1], BETA[0], BETA[1]

    def eq_8(query: Asked) -> Tensor:
        return 1.0 / (1.0 + torch.exp(-a1 * (teacher.own(query) + b1)))

    def eq_9(query: Asked, entity: int) -> Tensor:
        return 1.0 - 1.0 / (1.0 + torch.exp(-a2 * (teacher.scores(query, [entity])[0] + b2)))

    def d_soft(query: Asked, entity: int) -> Tensor:
        scores = (m.scores(query, [entity])[0] for m in (student, teacher))
        return eq_4(*scores) + eq_5(student, teacher, query, entity)

    def eq_10_negative(query: Asked) -> Tensor:
        return setting.over_negatives(student, query, lambda e: eq_9(query, e) * d_soft(query, e))

    def eq_11_negative(query: Asked) -> Tensor:
        return setting.over_negatives(
            student, query, lambda e: (1.0 - eq_9(query, e)) * eq_2_negative(student.scores(query, [e])[0])
        )

    expected = {
        "soft_positive": setting.mean(lambda q: eq_8(q) * d_soft(q, q.answer)),
        "soft_negative": setting.mean(eq_10_negative),
        "hard_positive": setting.mean(lambda q: (1.0 - eq_8(q)) * eq_2_positive(student.own(q))),
        "hard_negative": setting.mean(eq_11_negative),
    }
    assert set(assert_terms(setting, expected)) == set(expected)


@EVERY_LOSS
@EVERY_REGIME
def test_eq_12_to_15_the_teachers_soft_and_hard_labels_are_weighed_by_the_students_score(
    loss: str, regime: str
) -> None:
    setting = Setting(regime, loss, stage=2)
    student, teacher = setting.naive_student, setting.naive_teacher
    a3, a4, b3, b4 = ALPHA[2], ALPHA[3], BETA[2], BETA[3]

    def eq_12(query: Asked) -> Tensor:
        return 1.0 / (1.0 + torch.exp(-a3 * (student.own(query) + b3)))

    def eq_13(query: Asked, entity: int) -> Tensor:
        return 1.0 - 1.0 / (1.0 + torch.exp(-a4 * (student.scores(query, [entity])[0] + b4)))

    def d_soft(query: Asked, entity: int) -> Tensor:
        scores = (m.scores(query, [entity])[0] for m in (teacher, student))
        return eq_4(*scores) + eq_5(teacher, student, query, entity)

    def eq_14_negative(query: Asked) -> Tensor:
        return setting.over_negatives(teacher, query, lambda e: eq_13(query, e) * d_soft(query, e))

    def eq_15_negative(query: Asked) -> Tensor:
        return setting.over_negatives(
            teacher, query, lambda e: (1.0 - eq_13(query, e)) * eq_2_negative(teacher.scores(query, [e])[0])
        )

    expected = {
        "teacher_soft_positive": setting.mean(lambda q: eq_12(q) * d_soft(q, q.answer)),
        "teacher_soft_negative": setting.mean(eq_14_negative),
        "teacher_hard_positive": setting.mean(lambda q: (1.0 - eq_12(q)) * eq_2_positive(teacher.own(q))),
        "teacher_hard_negative": setting.mean(eq_15_negative),
    }
    assert_terms(setting, expected)


@EVERY_LOSS
@pytest.mark.parametrize(("structure", "evaluation"), [(True, True), (False, True), (True, False)])
def test_eq_1_the_loss_is_the_students_and_in_stage_two_the_teachers_beside_it(
    loss: str, structure: bool, evaluation: bool
) -> None:
    switches = {"structure": structure, "evaluation": evaluation}
    totals = []
    for stage in (1, 2):
        setting = Setting("triple", loss, stage=stage, **switches)
        expected = objective(setting, **switches)
        found = assert_terms(setting, expected)
        assert set(found) == set(expected) and len(found) == 4 * stage
        torch.testing.assert_close(sum(found.values()), sum(expected.values()))
        totals.append(float(sum(x.detach() for x in found.values())))
    assert totals[1] > totals[0] + 0.1


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "regime", "stage", "stop_opposite"), all_pairs(LOSSES, REGIMES, [1, 2], [False, True])
)
def test_the_gradient_is_that_of_the_formula_with_scores_inside_p_detached(
    loss: str, regime: str, stage: int, stop_opposite: bool
) -> None:
    setting = Setting(regime, loss, stage=stage, stop_opposite=stop_opposite)
    sum(setting.terms().values()).backward()
    sum(objective(setting, cut=stop_opposite).values()).backward()
    assert_same_gradients(setting.student, setting.naive_student)
    for found, naive in ((setting.method.alpha, setting.alpha), (setting.method.beta, setting.beta)):
        torch.testing.assert_close(found.grad, naive.grad, rtol=1e-9, atol=1e-11)
        assert (found.grad[: 2 * stage] != 0).all() and (found.grad[2 * stage :] == 0).all()
    if stage == 2:
        assert_same_gradients(setting.teacher, setting.naive_teacher)
    else:
        assert setting.teacher.relation.grad is None and setting.teacher.entity.opened == []


def test_structure_alone_sends_its_gradient_to_the_entities_of_both_models() -> None:
    whole, scores = (Setting(stage=2, evaluation=False, structure=x) for x in (True, False))
    for setting in (whole, scores):
        sum(setting.terms().values()).backward()
    for name in ("student", "teacher"):
        a, b = getattr(whole, name), getattr(scores, name)
        assert not torch.allclose(entity_gradient(a), entity_gradient(b))
        torch.testing.assert_close(a.relation.grad, b.relation.grad)


def test_the_opposite_model_learns_from_a_soft_label_unless_it_is_stopped() -> None:
    for stop_opposite in (False, True):
        setting = Setting(stage=2, stop_opposite=stop_opposite)
        terms = setting.terms()
        (terms["teacher_soft_positive"] + terms["teacher_soft_negative"]).backward()
        assert (entity_gradient(setting.student).abs().max() == 0) == stop_opposite
        assert entity_gradient(setting.teacher).abs().max() > 0


# -- listwise -------------------------------------------------------------------------------------------------------


def naive_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (torch.softmax(z / temperature, 0) for z in (teacher, student))
    return temperature**2 * (p * torch.log(p / q)).sum()


def listwise(setting: Setting, temperature: float, structure: bool, evaluation: bool, cut: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    sides = [("", 0, setting.naive_student, setting.naive_teacher)]
    if setting.method.stage == 2:
        sides.append(("teacher_", 2, setting.naive_teacher, setting.naive_student))
    for tag, which, own, other in sides:
        soft, hard = [], []
        for query in setting.asked:
            mine, theirs = (m.scores(query, [query.answer, *query.negatives]) for m in (own, other))
            distance = naive_kl(mine, theirs.detach() if cut else theirs, temperature)
            if structure:
                distance = distance + eq_5(own, other, query, query.answer, cut=cut)
            p = quality(setting, which, other.own(query)) if evaluation else None
            soft.append(distance if p is None else p * distance)
            loss = torch.log(torch.exp(mine).sum()) - mine[0]
            hard.append(loss if p is None else (1.0 - p) * loss)
        out |= {f"{tag}soft": torch.stack(soft).mean(), f"{tag}hard": torch.stack(hard).mean()}
    return out


@pytest.mark.parametrize(
    ("regime", "stage", "how"),
    all_pairs(REGIMES, [1, 2], [(True, True, False, 1.0), (True, True, True, 3.0), (False, False, False, 3.0)]),
)
def test_soft_kl_weighs_the_divergence_and_the_cross_entropy_of_a_query_by_its_positive_triple(
    regime: str, stage: int, how: tuple[bool, bool, bool, float]
) -> None:
    structure, evaluation, cut, temperature = how
    options = {"structure": structure, "evaluation": evaluation, "stop_opposite": cut, "temperature": temperature}
    setting = Setting(regime, "softmax", stage=stage, soft="kl", **options)
    expected = listwise(setting, temperature, structure, evaluation, cut)
    found = assert_terms(setting, expected)
    assert set(found) == set(expected)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    assert_same_gradients(setting.student, setting.naive_student)
    if stage == 2:
        assert_same_gradients(setting.teacher, setting.naive_teacher)
    if evaluation:
        torch.testing.assert_close(setting.method.alpha.grad, setting.alpha.grad)
        torch.testing.assert_close(setting.method.beta.grad, setting.beta.grad)


def test_with_softmax_and_huber_the_cross_entropy_of_a_query_takes_the_weight_of_its_positive_triple() -> None:
    setting = Setting("all", "softmax")
    expected = listwise(setting, 1.0, False, True, False)["hard"]
    found = setting.terms()
    torch.testing.assert_close(found["hard_positive"], expected)
    assert set(found) == {"hard_positive", "soft_positive", "soft_negative"}
    setting.loss = "softplus"  # soft labels of negatives are averaged
    torch.testing.assert_close(found["soft_negative"], objective(setting)["soft_negative"])


# -- options of the stage that the hard loss has everywhere -----------------------------------------------------------


@pytest.mark.parametrize("loss", ["softplus", "bce", "self_adversarial", "softmax"])
def test_without_evaluation_the_hard_terms_add_up_to_the_loss_of_plain_training(loss: str) -> None:
    setting = Setting("triple", loss, evaluation=False)
    found = setting.terms()
    view = View(setting.student, setting.input_builder.inputs(*setting.input_builder.parts(STEP, 1)), grad=False)
    plain = asked(hard_loss(loss, view, temperature=ADVERSARIAL)).mean()
    torch.testing.assert_close(found["hard_positive"] + found.get("hard_negative", 0.0), plain)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
@pytest.mark.parametrize("soft", ["huber", "kl"])
def test_label_smoothing_works_as_in_plain_training_or_is_refused(loss: str, soft: str) -> None:
    try:
        config = dualde_config({"soft": soft}, loss={"name": loss, "label_smoothing": 0.2})
        parse_config(config, "test")
        setting = Setting("triple", loss, evaluation=False, soft=soft, hard={"label_smoothing": 0.2})
    except (ConfigError, UnsupportedError):
        return
    found = sum(value for name, value in setting.terms().items() if name.startswith("hard"))
    view = View(setting.student, setting.input_builder.inputs(*setting.input_builder.parts(STEP, 1)), grad=False)
    torch.testing.assert_close(found, asked(hard_loss(loss, view, label_smoothing=0.2)).mean())


@pytest.mark.parametrize("loss", ["bce", "softplus", "self_adversarial", "softmax"])
@pytest.mark.parametrize("soft", ["huber", "kl"])
def test_k_vs_all_labels_work_as_in_plain_training_or_are_refused(loss: str, soft: str) -> None:
    negatives = {"kind": "all", "labels": "known"}
    try:
        parse_config(dualde_config({"soft": soft}, loss={"name": loss}, negatives=negatives), "test")
        setting = Setting("all", loss, evaluation=False, soft=soft)
    except (ConfigError, UnsupportedError):
        return
    setting.input_builder = toy_inputs(GRAPH, kind="all", filtered=loss != "softmax", labels=True, batch_size=6)
    found = sum(value for name, value in setting.terms().items() if name.startswith("hard"))
    view = View(setting.student, setting.input_builder.inputs(*setting.input_builder.parts(STEP, 1)), grad=False)
    torch.testing.assert_close(found, asked(hard_loss(loss, view, temperature=ADVERSARIAL)).mean())


def test_the_regulariser_is_on_the_student_and_in_stage_two_on_the_teacher_too() -> None:
    hard = {"regulariser": "n2", "weight": 0.2}
    for stage in (1, 2):
        setting = Setting(stage=stage, hard=hard)
        found = setting.terms()
        for name, naive in (("n2", setting.naive_student), ("teacher_n2", setting.naive_teacher)):

            def penalty(query: Asked, naive: NaiveModel = naive) -> Tensor:
                h, t = naive.head_tail(query, [query.answer])
                return 0.2 * sum(x.square().sum() for x in (h, t, naive.relation_row(query)))

            assert (name in found) == (name == "n2" or stage == 2)
            if name in found:
                torch.testing.assert_close(found[name], setting.mean(penalty))


def test_a_margin_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss margin has no positive and negative part"):
        parse_config({"teacher": "somewhere", "student": {"method": "dualde", "loss": {"name": "margin"}}}, "test")


# -- every option changes something ---------------------------------------------------------------------------------

OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "evaluation": {"evaluation": False},
    "structure": {"structure": False},
    "delta": {"delta": 0.1},
    "probabilities": {"probabilities": True},
    "alpha": {"alpha": 0.5},
    "beta": {"beta": 0.5},
    "evaluator_lr": {"evaluator_lr": 0.5},
    "soft": {"soft": "kl"},
    "soft_weight": {"soft_weight": 0.5},
    "temperature": {"soft": "kl", "temperature": 2.0},
    "stop_opposite": {"stop_opposite": True},
    "stage_one": {"stage_one": False},
    "stage_two": {"stage_two": {"start": 9}},
}


def dualde_config(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    student = {"scorer": "complex", "dim": 6, "batch_size": 16, "epochs": 9, "reciprocal": False}
    student |= {"negatives": {"kind": "triple", "num": 5}, "loss": {"name": "softplus"}} | more
    student |= {"method": "dualde", "distill": {"stage_two": {"start": 1, "epochs": 3}} | options}
    return {"dtype": "float64", "teacher": "somewhere", "student": student}


def job(options: dict[str, Any], tmp_path: Any, **more: Any) -> Job:
    config = dualde_config(options, **more)
    return toy_job({key: value for key, value in config.items() if key != "teacher"}, Ranks(), tmp_path, GRAPH)


def trained(options: dict[str, Any], tmp_path: Any) -> list[Tensor]:
    """What two steps in stage one and two in stage two leave behind."""
    made = job(options, tmp_path)
    assert isinstance(made.method, DualDE)
    for step in range(4):
        if step == 2:
            made.method.advance(1, 9, False)
        train_step(made, Progress(step=step), 0)
    return [made.method.student.entity.weight, made.method.teacher.entity.weight, made.method.alpha.detach()]


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_every_option_changes_what_is_trained(option: str, tmp_path: Any) -> None:
    base = {"soft": "kl"} if option == "temperature" else {}
    pairs = zip(trained(base, tmp_path), trained(OTHER_OPTIONS[option], tmp_path), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("option", ["lr_scale", "teacher_lr_scale"])
def test_stage_two_has_learning_rates_of_its_own(option: str, tmp_path: Any) -> None:
    plan = {"start": 1, "epochs": 3, "lr_scale": 0.2, "teacher_lr_scale": 0.3}
    one = trained({"stage_two": plan}, tmp_path)
    other = trained({"stage_two": plan | {option: 0.9}}, tmp_path)
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_option_is_in_this_test() -> None:
    # How several teachers are averaged is in test_dualde_several.py.
    assert OTHER_OPTIONS.keys() | AveragedTeachers.model_fields.keys() == DualdeConfig.model_fields.keys()
    assert set(LOSSES) | {"softmax", "margin"} == set(LossConfig.model_fields["name"].annotation.__args__)


# -- stages and training --------------------------------------------------------------------------------------------


def test_the_teacher_rests_bit_for_bit_in_stage_one_and_learns_in_stage_two(tmp_path: Any) -> None:
    made = job({}, tmp_path)
    method = made.method
    assert isinstance(method, DualDE)

    def copies() -> list[Tensor]:
        small = (method.student.relation, method.teacher.relation, method.alpha, method.beta)
        return [x.detach().clone() for x in (method.student.entity.weight, method.teacher.entity.weight, *small)]

    start = copies()
    for step in range(3):
        train_step(made, Progress(step=step), 0)
    one = copies()
    assert torch.equal(start[1], one[1]) and torch.equal(start[3], one[3])
    assert not torch.equal(start[0], one[0]) and not torch.equal(start[2], one[2])
    # Evaluators 1 and 2 have learned, the teacher's two have not.
    for k in (4, 5):
        assert (start[k][:2] != one[k][:2]).all() and torch.equal(start[k][2:], one[k][2:])
    assert method.advance(1, 9, False)
    train_step(made, Progress(step=3), 0)
    two = copies()
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert (one[4] != two[4]).all() and (one[5] != two[5]).all()


def test_the_groups_of_an_update_are_those_that_learn() -> None:
    assert Setting().update().groups == {"student", "evaluators"}
    assert Setting(stage=2).update().groups == {"student", "evaluators", "teacher"}
    assert Setting(evaluation=False).update().groups == {"student"}
    assert set(Setting(evaluation=False).method.groups) == {"student", "teacher"}
    assert set(Setting().method.groups) == {"student", "teacher", "evaluators"}
    assert set(Setting(stage_two=None).method.groups) == {"student", "evaluators"}


def switched_at(start: int | str | None, plateau_at: int | None = None) -> list[int]:
    """Epochs at whose end a method of six epochs says that it entered its next phase."""
    two = None if start is None else StageTwoConfig(start=start, epochs=4)
    method = Setting(stage_two=two).method
    return [epoch for epoch in range(1, 10) if method.advance(epoch, 6, plateau_at is not None and epoch >= plateau_at)]


def test_the_second_stage_begins_when_told_and_once() -> None:
    assert switched_at(3) == [3]
    assert switched_at(3, plateau_at=2) == [3]
    assert switched_at(9) == [6]
    assert switched_at("plateau", plateau_at=2) == [2]
    assert switched_at("plateau") == [6]
    assert switched_at(None, plateau_at=2) == []


def test_a_second_stage_that_starts_at_epoch_0_starts_there_or_is_refused(tmp_path: Any) -> None:
    try:
        made = job({"stage_two": {"start": 0, "epochs": 3}}, tmp_path)
    except ConfigError:
        return
    assert isinstance(made.method, DualDE) and made.method.stage == 2


def test_the_second_stage_lasts_its_epochs_from_where_it_began() -> None:
    method = Setting().method
    assert (method.stage, method.phase(6).last) == (1, 7)
    assert (method.phase(6).lr_scale, method.phase(6).frozen) == ({}, {"teacher"})
    assert not method.advance(2, 6, False) and method.stage == 1
    assert method.advance(3, 6, False)
    assert (method.stage, method.phase(6).last) == (2, 7)
    assert method.phase(6).lr_scale == {"student": 0.5, "teacher": 0.25, "evaluators": 0.5}
    assert method.phase(6).frozen == frozenset()
    assert Setting(stage_two=None).method.phase(6).last == 6
    assert Setting(stage=2).method.phase(6).last == 4


def through_both_stages(folder: Any, curve: list[float], **more: Any) -> tuple[list[int], list[dict[str, Any]]]:
    """(epochs that were validated, what was logged) of four epochs of stage one, then two; `curve`: what is found."""
    made = job({"stage_two": more.pop("stage_two", {"epochs": 2})}, folder, **{"epochs": 4, "validate_every": 3} | more)
    left = iter(curve)
    made.validate = lambda: {"mrr": next(left)}
    train_stage(made)
    lines = (made.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["epoch"] for row in rows if "valid/mrr" in row], rows


def test_stage_one_is_validated_at_its_end_and_stage_two_goes_on_from_there(tmp_path: Any) -> None:
    with mock.patch.object(loop, "load_group", wraps=loop.load_group) as reloaded:
        assert through_both_stages(tmp_path, [0.1, 0.2, 0.3])[0] == [3, 4, 6]
    assert [call.args[2].name for call in reloaded.call_args_list] == [step_name(6 * per_epoch())]


def test_stage_two_begins_from_the_student_of_a_better_validation_where_there_was_one(tmp_path: Any) -> None:
    with mock.patch.object(loop, "load_group", wraps=loop.load_group) as reloaded:
        through_both_stages(tmp_path, [0.2, 0.1, 0.3])
    assert [call.args[2].name for call in reloaded.call_args_list] == [
        step_name(epoch * per_epoch()) for epoch in (3, 6)
    ]


def per_epoch() -> int:
    return -(-len(GRAPH.train) // 16)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_schedule_starts_anew_in_stage_two_and_is_never_at_zero(name: str, tmp_path: Any) -> None:
    made = job({"stage_two": {"epochs": 2}}, tmp_path, epochs=4, schedule={"name": name})
    steps = made.input_builder.sampler.steps_per_epoch
    one = [schedule_scale(made, Progress(step=step)) for step in range(4 * steps)]
    assert made.method.advance(4, 4, False)
    two = [schedule_scale(made, Progress(step=step)) for step in range(4 * steps, 6 * steps)]
    assert one[0] == two[0] == 1.0 and min(one + two) > 0.0
    assert two[steps] == pytest.approx(0.5) == pytest.approx(one[2 * steps])


def test_the_plateau_schedule_starts_anew_in_stage_two(tmp_path: Any) -> None:
    schedule = {"name": "plateau", "patience": 1, "factor": 0.25}
    rows = through_both_stages(tmp_path, [0.4, 0.3, 0.2, 0.1, 0.1, 0.1], schedule=schedule, validate_every=1)[1]
    at_epoch = {row["epoch"]: row["lr_scale"] for row in rows if "lr_scale" in row}
    assert [at_epoch[epoch] for epoch in range(6)] == [1.0, 1.0, 0.25, 0.0625, 1.0, 0.25]


def test_patience_that_runs_out_before_stage_two_does_not_end_the_training(tmp_path: Any) -> None:
    falling = [0.5, 0.4, 0.3, 0.2, 0.1]
    at = {"validate_every": 1, "patience": 1}
    assert through_both_stages(tmp_path / "told", falling, stage_two={"start": 3, "epochs": 2}, **at)[0] == [1, 2, 3, 4]
    assert through_both_stages(tmp_path / "plateau", falling, stage_two={"epochs": 2}, **at)[0] == [1, 2, 3]


def test_a_restored_method_is_in_the_stage_it_was_saved_in() -> None:
    saved, fresh = Setting().method, Setting().method
    saved.advance(3, 6, False)
    fresh.restore(saved.state().values)
    assert (fresh.stage, fresh.phase(6).last) == (saved.stage, saved.phase(6).last) == (2, 7)


def test_evaluators_start_at_the_alpha_and_beta_of_the_config(tmp_path: Any) -> None:
    method = job({"alpha": 0.7, "beta": -0.2}, tmp_path).method
    assert isinstance(method, DualDE)
    assert method.alpha.tolist() == pytest.approx([0.7] * 4) and method.beta.tolist() == pytest.approx([-0.2] * 4)
