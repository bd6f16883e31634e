"""Every loss against its formula, written with explicit candidate lists and one query at a time."""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.data.step_inputs import StepInputBuilder
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import candidate_layout
from distkgd.distributed.reductions.candidate_layout import CandidateLayout, PairScores
from distkgd.errors import UnsupportedError
from distkgd.kernels.quantiser import Rounding
from distkgd.methods.bkd import BkdConfig
from distkgd.methods.losses.scores import (
    DIVERGENCES,
    batch_mean,
    hard_loss,
    huber,
    js_divergence,
    kl_divergence,
    regulariser,
)
from distkgd.models.nested_scores import NestedScores
from distkgd.models.view import View
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
)
from tests.toys import toy_graph

GRAPH = toy_graph(entities=17, relations=3, triples=150)
STEP = 2
TEMPERATURE, MARGIN, SMOOTHING = 0.7, 1.5, 0.2
KINDS = ("all", "batch", "chunk", "triple")


def in_regimes(names: str, *values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by `names` and its `regime`, any two values of any two of what they are made of together."""
    rows = all_pairs(*values, KINDS, [False, True], ["both", "uniform"])
    named = [(*row[:-3], dict(zip(("kind", "filtered", "sides"), row[-3:], strict=True))) for row in rows]
    return pytest.mark.parametrize([*names.split(), "regime"], named)


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1.0 / (1.0 + torch.exp(-x)))


def softmax(positive: Tensor, negatives: Tensor) -> Tensor:
    return -torch.log(torch.exp(positive) / (torch.exp(positive) + torch.exp(negatives).sum()))


def bce(positive: Tensor, negatives: Tensor) -> Tensor:
    return -log_sigmoid(positive) - sum(log_sigmoid(-z) for z in negatives)


def softplus(positive: Tensor, negatives: Tensor) -> Tensor:
    return -log_sigmoid(positive) - sum(log_sigmoid(-z) for z in negatives) / max(1, len(negatives))


def self_adversarial(positive: Tensor, negatives: Tensor) -> Tensor:
    weights = torch.exp(TEMPERATURE * negatives.detach())
    total = weights.sum()
    return -log_sigmoid(positive) - sum(w / total * log_sigmoid(-z) for w, z in zip(weights, negatives, strict=True))


def margin(positive: Tensor, negatives: Tensor) -> Tensor:
    hinges = [torch.clamp(MARGIN - positive + z, min=0.0) for z in negatives]
    return sum(hinges, 0.0 * positive) / max(1, len(negatives))


def smoothed_labels(negatives: Tensor) -> Tensor:
    number = 1 + len(negatives)
    labels = torch.full((number,), SMOOTHING / number, dtype=torch.float64)
    labels[0] += 1.0 - SMOOTHING
    return labels


def smoothed_softmax(positive: Tensor, negatives: Tensor) -> Tensor:
    scores = torch.cat([positive.reshape(1), negatives])
    shares = torch.exp(scores) / torch.exp(scores).sum()
    return -(smoothed_labels(negatives) * torch.log(shares)).sum()


def smoothed_bce(positive: Tensor, negatives: Tensor) -> Tensor:
    scores = torch.cat([positive.reshape(1), negatives])
    labels = smoothed_labels(negatives)
    return -(labels * log_sigmoid(scores) + (1.0 - labels) * log_sigmoid(-scores)).sum()


NAIVE_LOSSES = {
    f.__name__: f for f in (softmax, bce, softplus, self_adversarial, margin, smoothed_softmax, smoothed_bce)
}
EVERY_LOSS = pytest.mark.parametrize("name", NAIVE_LOSSES)


def real_loss(name: str, view: View) -> Tensor:
    smoothing = SMOOTHING if name.startswith("smoothed_") else 0.0
    return asked(
        hard_loss(
            name.removeprefix("smoothed_"), view, temperature=TEMPERATURE, margin=MARGIN, label_smoothing=smoothing
        )
    )


def weights_for(per_query: Tensor) -> Tensor:
    """Different for each query, so that neither values nor gradients of two queries can be mistaken."""
    return torch.linspace(0.5, 1.7, len(per_query), dtype=per_query.dtype)


def whole_inputs(input_builder: StepInputBuilder, step: int = STEP) -> Any:
    (part,) = input_builder.parts(step, 1)
    return input_builder.inputs(part)


def naive_rows(model: NaiveModel, queries: list[Asked], name: str) -> Tensor:
    return torch.stack([NAIVE_LOSSES[name](model.own(q), model.others(q)) for q in queries])


@in_regimes("name kind", NAIVE_LOSSES, [("complex", True), ("transe", False)])
def test_a_hard_loss_and_its_gradient_are_those_of_the_formula(
    name: str, kind: tuple[str, bool], regime: dict[str, Any]
) -> None:
    (scorer, reciprocal), input_builder = kind, toy_inputs(GRAPH, **regime)
    model = toy_model(GRAPH, scorer, reciprocal=reciprocal, margin=2.0 if scorer == "transe" else None)
    naive = NaiveModel(model)
    found = real_loss(name, View(model, whole_inputs(input_builder), grad=True))
    expected = naive_rows(naive, spelled_out(input_builder, STEP), name)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    (found * weights_for(found)).sum().backward()
    (expected * weights_for(expected)).sum().backward()
    assert_same_gradients(model, naive)


def test_the_regimes_of_these_tests_repeat_candidates_and_leave_some_out() -> None:
    lengths = []
    for kind in KINDS[1:]:
        queries = spelled_out(toy_inputs(GRAPH, kind=kind, filtered=True), STEP)
        assert any(len(set(q.negatives)) < len(q.negatives) for q in queries)
        lengths += [len(q.negatives) for q in queries]
    assert min(lengths) < max(lengths)


@EVERY_LOSS
def test_a_query_without_negatives_has_the_loss_of_its_answer_alone(name: str) -> None:
    input_builder = toy_inputs(GRAPH, kind="triple", num=1, filtered=True, batch_size=40)
    queries = spelled_out(input_builder, STEP)
    assert any(not q.negatives for q in queries) and any(q.negatives for q in queries)
    model = toy_model(GRAPH)
    naive = NaiveModel(model)
    found = real_loss(name, View(model, whole_inputs(input_builder), grad=True))
    expected = naive_rows(naive, queries, name)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    found.sum().backward()
    expected.sum().backward()
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("option", ["temperature", "margin", "label_smoothing"])
def test_each_option_of_a_hard_loss_changes_it(option: str) -> None:
    name = {"temperature": "self_adversarial", "margin": "margin", "label_smoothing": "bce"}[option]
    view = View(toy_model(GRAPH), whole_inputs(toy_inputs(GRAPH, kind="all")), grad=False)
    low, high = (asked(hard_loss(name, view, **{option: value})) for value in (0.3, 0.6))
    assert not torch.allclose(low, high)


# -- k-vs-all -------------------------------------------------------------------------------------------------------


def naive_k_vs_all_row(name: str, answers: Tensor, others: Tensor) -> Tensor:
    """The loss of one query whose labels are all its answers."""
    if name == "softmax":
        total = torch.exp(answers).sum() + torch.exp(others).sum()
        return -sum(torch.log(torch.exp(z) / total) for z in answers) / len(answers)
    positives, negatives = -sum(log_sigmoid(z) for z in answers), -sum(log_sigmoid(-z) for z in others)
    if name == "bce":
        return positives + negatives
    return positives / len(answers) + negatives / len(others)


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("name", ["softmax", "bce", "softplus"])
def test_a_pass_over_all_triples_adds_up_to_one_k_vs_all_row_per_query(name: str, reciprocal: bool) -> None:
    size = len(GRAPH.train)
    input_builder = toy_inputs(GRAPH, kind="all", batch_size=size, filtered=name != "softmax", labels=True)
    model = toy_model(GRAPH, reciprocal=reciprocal)
    naive = NaiveModel(model)
    found = real_loss(name, View(model, whole_inputs(input_builder), grad=True)).sum()
    rows = {(q.anchor, q.relation, q.side): q for q in spelled_out(input_builder, STEP)}
    assert len(rows) < 2 * size, "some query must have several answers"
    expected = torch.zeros((), dtype=torch.float64)
    for query in rows.values():
        rest = [e for e in range(GRAPH.num_entities) if e not in query.known]
        answers, others = naive.scores(query, sorted(query.known)), naive.scores(query, rest)
        expected = expected + naive_k_vs_all_row(name, answers, others)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.backward()
    expected.backward()
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("name", ["self_adversarial", "margin", "smoothed_softmax"])
def test_k_vs_all_labels_divide_the_loss_of_a_query_by_its_number_of_answers(name: str) -> None:
    shared, alone = (toy_inputs(GRAPH, kind="all", filtered=True, labels=labels) for labels in (True, False))
    model = toy_model(GRAPH)
    number = torch.tensor([len(q.known) for q in spelled_out(shared, STEP)], dtype=torch.float64)
    found, plain = (real_loss(name, View(model, whole_inputs(s), grad=False)) for s in (shared, alone))
    assert number.max() > 1
    torch.testing.assert_close(found, plain / number)


# -- means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", [{"kind": "all"}, {"kind": "chunk", "sides": "uniform"}], ids=["all", "chunk"])
def test_the_batch_means_of_parts_add_up_to_the_mean_over_the_batch(regime: dict[str, Any]) -> None:
    input_builder = toy_inputs(GRAPH, **regime)
    model = toy_model(GRAPH)
    whole = real_loss("softplus", View(model, whole_inputs(input_builder), grad=False))
    shares = []
    for part in input_builder.parts(STEP, 3):
        inputs = input_builder.inputs(part)
        shares.append(batch_mean(real_loss("softplus", View(model, inputs, grad=False)), inputs))
    assert len(shares) == 3
    torch.testing.assert_close(sum(shares), whole.mean())
    torch.testing.assert_close(batch_mean(whole, whole_inputs(input_builder)), whole.mean())


# -- soft losses ----------------------------------------------------------------------------------------------------


def naive_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    def shares(z: Tensor) -> Tensor:
        return torch.exp(z / temperature) / torch.exp(z / temperature).sum()

    p, q = shares(teacher), shares(student)
    return temperature**2 * sum(p[i] * torch.log(p[i] / q[i]) for i in range(len(p)))


def candidate_scores(model: NaiveModel, query: Asked) -> Tensor:
    return torch.cat([model.own(query).reshape(1), model.others(query)])


@in_regimes("temperature stop_teacher", [1.0, 3.0], [False, True])
def test_the_kl_divergence_is_that_of_the_two_softmaxes_over_all_candidates(
    regime: dict[str, Any], temperature: float, stop_teacher: bool
) -> None:
    input_builder = toy_inputs(GRAPH, **regime)
    student, teacher = toy_model(GRAPH, "complex", 4, reciprocal=False), toy_model(GRAPH, "distmult", 7, seed=5)
    naive_s, naive_t = NaiveModel(student), NaiveModel(teacher)
    inputs = whole_inputs(input_builder)
    found = asked(
        kl_divergence(
            View(student, inputs, grad=True), View(teacher, inputs, grad=True), temperature, stop_teacher=stop_teacher
        )
    )
    expected = torch.stack(
        [
            naive_kl(candidate_scores(naive_s, q), candidate_scores(naive_t, q), temperature)
            for q in spelled_out(input_builder, STEP)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert found.min() > 0
    (found * weights_for(found)).sum().backward()
    (expected * weights_for(expected)).sum().backward()
    assert_same_gradients(student, naive_s)
    if stop_teacher:
        assert entity_gradient(teacher).abs().max() == 0 and teacher.relation.grad is None
    else:
        assert_same_gradients(teacher, naive_t)


def naive_js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (teacher, student))
    m = [(p[i] + q[i]) / 2 for i in range(len(p))]
    halves = [sum(x[i] * torch.log(x[i] / m[i]) for i in range(len(p))) / 2 for x in (p, q)]
    return temperature**2 * (halves[0] + halves[1])


def naive_reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return naive_kl(teacher, student, temperature)


NAIVE_DIVERGENCES = {"kl": naive_kl, "reverse_kl": naive_reverse_kl, "js": naive_js}
EVERY_DIVERGENCE = pytest.mark.parametrize("name", NAIVE_DIVERGENCES)


def naive_divergence(name: str, student: NaiveModel, teacher: NaiveModel, queries: list[Asked], t: float) -> Tensor:
    found = [
        NAIVE_DIVERGENCES[name](candidate_scores(student, q), candidate_scores(teacher, q), t)
        if q.negatives
        else 0.0 * student.own(q)
        for q in queries
    ]
    return torch.stack(found)


def test_every_divergence_of_the_config_has_a_formula_here() -> None:
    choices = BkdConfig.model_fields["divergence"].annotation
    assert choices is not None and set(choices.__args__) == NAIVE_DIVERGENCES.keys()


@in_regimes("name blocked temperature", NAIVE_DIVERGENCES, [False, True], [0.6, 3.0])
def test_a_divergence_and_both_its_gradients_are_those_of_the_formula(
    name: str, blocked: bool, temperature: float, regime: dict[str, Any]
) -> None:
    input_builder = toy_inputs(GRAPH, **regime)
    student, teacher = toy_model(GRAPH, "complex", 4, reciprocal=False), toy_model(GRAPH, "distmult", 7, seed=5)
    naive_s, naive_t = NaiveModel(student), NaiveModel(teacher)
    at_once = (lambda numbers, device: 40) if blocked else candidate_layout.numbers_at_once
    with patch.object(candidate_layout, "numbers_at_once", at_once):
        inputs = whole_inputs(input_builder)
        assert (len(inputs.layout.blocks(len(inputs.batch.queries.anchor))) > 1) == blocked
        found = asked(
            DIVERGENCES[name](View(student, inputs, grad=True), View(teacher, inputs, grad=True), temperature)
        )
        (found * weights_for(found)).sum().backward()
    expected = naive_divergence(name, naive_s, naive_t, spelled_out(input_builder, STEP), temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert found.min() > 0
    (expected * weights_for(expected)).sum().backward()
    assert_same_gradients(student, naive_s)
    assert_same_gradients(teacher, naive_t)


@EVERY_DIVERGENCE
def test_k_vs_all_labels_divide_the_divergence_of_a_query_by_its_number_of_answers(name: str) -> None:
    shared, alone = (toy_inputs(GRAPH, kind="all", filtered=True, labels=labels) for labels in (True, False))
    student, teacher = toy_model(GRAPH), toy_model(GRAPH, seed=1)
    number = torch.tensor([len(q.known) for q in spelled_out(shared, STEP)], dtype=torch.float64)
    both = [whole_inputs(s) for s in (shared, alone)]
    views = [[View(m, inputs, grad=False) for m in (student, teacher)] for inputs in both]
    found, plain = (asked(DIVERGENCES[name](*both, 2.0)) for both in views)
    assert number.max() > 1
    torch.testing.assert_close(found, plain / number)


def scores_alone(models: list[Tensor], excluded: tuple[Tensor, Tensor] | None = None) -> list[Any]:
    """Views of which only scores are known, [Q, 1 + N] of each model, the answer's first."""
    number = models[0].shape[1] - 1
    layout = CandidateLayout(Ranks(), num_candidates=number, excluded=excluded)
    one_hot = torch.eye(number, dtype=models[0].dtype)
    fields = [PairScores(layout, lambda queries, rows: queries @ rows.mT, x[:, 1:], one_hot) for x in models]
    inputs = SimpleNamespace(label_share=None)
    return [
        SimpleNamespace(positive=x[:, 0], negatives=field, inputs=inputs)
        for x, field in zip(models, fields, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize(("large", "small"), [(1e4, 1e-3), (1e-3, 1e4), (300.0, 300.0)])
@EVERY_DIVERGENCE
def test_a_divergence_of_far_apart_scores_is_finite_in_float32_and_that_of_float64(
    name: str, large: float, small: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(4)
    draws = [torch.randn(6, 9, generator=generator, dtype=torch.float64) * scale for scale in (large, small)]
    # Query 1 has lost two candidates, query 4 all of them.
    query = torch.tensor([4, 1, 4, 4, 1, 4, 4, 4, 4, 4])
    candidate = torch.tensor([0, 1, 1, 2, 2, 3, 4, 5, 6, 7])
    shown = torch.ones(6, 9, dtype=torch.bool)
    shown[query, candidate + 1] = False
    found = {}
    for dtype in (torch.float32, torch.float64):
        student, teacher = (x.float().to(dtype).requires_grad_() for x in draws)
        order = torch.sort(candidate, stable=True).indices
        excluded = query[order], candidate[order]
        value = asked(DIVERGENCES[name](*scores_alone([student, teacher], excluded), temperature))
        value.sum().backward()
        found[dtype] = value.detach().double(), student.grad.double(), teacher.grad.double()
    for single, double in zip(*found.values(), strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3 * temperature)
    value, *gradients = found[torch.float32]
    # The two KL subtract log-sum-exps as large as the scores; no term of js is larger than 1.
    rounding = 1e-6 * temperature * (1.0 if name == "js" else max(large, small))
    assert value[4].abs() < rounding * max(1.0, temperature) and all(g[4].abs().max() < 1e-5 for g in gradients)
    assert all(g[1][~shown[1]].abs().max() == 0 for g in gradients)
    if name == "js":
        assert value.min() > -1e-6 and value.max() <= temperature**2 * math.log(2.0) * (1 + 1e-6)


def test_softmaxes_that_share_nothing_have_the_largest_js_divergence_and_it_is_symmetric() -> None:
    pair = [torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 50.0]])]
    there, back = (asked(js_divergence(*scores_alone(models))) for models in (pair, pair[::-1]))
    torch.testing.assert_close(there, torch.tensor([math.log(2.0)]))
    assert torch.equal(there, back)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@EVERY_DIVERGENCE
def test_a_model_does_not_diverge_from_itself(name: str, temperature: float) -> None:
    model = toy_model(GRAPH)
    inputs = whole_inputs(toy_inputs(GRAPH, kind="batch", filtered=True))
    found = asked(DIVERGENCES[name](View(model, inputs, grad=True), View(model, inputs, grad=False), temperature))
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    found.sum().backward()
    assert entity_gradient(model).abs().max() < 1e-12


@EVERY_DIVERGENCE
def test_queries_without_negatives_do_not_diverge(name: str) -> None:
    input_builder = toy_inputs(GRAPH, kind="triple", num=1, filtered=True, batch_size=40)
    empty = torch.tensor([not q.negatives for q in spelled_out(input_builder, STEP)])
    student, teacher = toy_model(GRAPH), toy_model(GRAPH, seed=1)
    inputs = whole_inputs(input_builder)
    found = asked(DIVERGENCES[name](View(student, inputs, grad=True), View(teacher, inputs, grad=True), 3.0))
    assert empty.any() and found[empty].abs().max() < 1e-12 and found[~empty].min() > 0
    found[empty].sum().backward()
    assert entity_gradient(student).abs().max() < 1e-12 and entity_gradient(teacher).abs().max() < 1e-12


@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0])
def test_huber_is_quadratic_up_to_delta_and_linear_beyond(delta: float) -> None:
    points = [-5.0, -delta, -0.3, 0.0, 0.1, delta, delta + 1e-6, 0.9, 3.0]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    found = huber(x, delta)
    expected = [a * a / 2 if abs(a) <= delta else delta * (abs(a) - delta / 2) for a in points]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([min(max(a, -delta), delta) for a in points], dtype=torch.float64))


def test_huber_with_delta_one_is_dualdes() -> None:
    assert huber(torch.tensor([0.5, -1.0, 4.0])).tolist() == [0.125, 0.5, 3.5]  # DualDE Eq. 6


# -- regularisers ---------------------------------------------------------------------------------------------------


def naive_penalty(name: str, model: NaiveModel, query: Asked, weight: float, relation_weight: float) -> Tensor:
    h, t = model.head_tail(query, [query.answer])
    h, r, t = h.reshape(-1), model.relation_row(query), t.reshape(-1)
    if name == "dura":
        if model.reciprocal and query.side:
            h, t = t, h
        if model.scorer.name == "rescal":
            matrix = r.reshape(len(h), len(t))
            forth = [sum(h[i] * matrix[i, j] for i in range(len(h))) for j in range(len(t))]
            back = [sum(matrix[i, j] * t[j] for j in range(len(t))) for i in range(len(h))]
        else:
            forth, back = _products(model.scorer.name, h, r), _products(model.scorer.name, t, r)
        squares = [x * x for row in (h, t, forth, back) for x in row]
        return weight * sum(squares)
    power = {"n2": 2, "n3": 3}[name]
    total = torch.zeros((), dtype=torch.float64)
    for w, row in ((weight, h), (relation_weight, r), (weight, t)):
        if name == "n3" and model.scorer.name == "complex":
            sizes = [torch.sqrt(row[k] ** 2 + row[k + 1] ** 2) for k in range(0, len(row), 2)]
        else:
            sizes = [torch.abs(x) for x in row]
        total = total + w * sum(size**power for size in sizes)
    return total


def _products(name: str, entity: Tensor, relation: Tensor) -> list[Tensor]:
    """Coordinates of entity * relation; conjugates do not change their squares' sum."""
    if name == "distmult":
        return [entity[k] * relation[k] for k in range(len(entity))]
    out = []
    for k in range(0, len(entity), 2):
        a, b, c, d = entity[k], entity[k + 1], relation[k], relation[k + 1]
        out += [a * c - b * d, a * d + b * c]
    return out


PENALTIES = [(name, scorer) for name in ("n2", "n3") for scorer in ("complex", "distmult", "transe")]
PENALTIES += [("dura", scorer) for scorer in ("complex", "distmult", "rescal")]


@pytest.mark.parametrize(("penalty", "reciprocal", "relation_weight"), all_pairs(PENALTIES, [True, False], [None, 0.2]))
def test_a_regulariser_and_its_gradient_are_those_of_the_formula(
    penalty: tuple[str, str], reciprocal: bool, relation_weight: float | None
) -> None:
    name, scorer = penalty
    input_builder = toy_inputs(GRAPH, kind="batch")
    model = toy_model(GRAPH, scorer, 4, reciprocal=reciprocal)
    naive = NaiveModel(model)
    found = regulariser(name, View(model, whole_inputs(input_builder), grad=True), 0.3, relation_weight)
    second = 0.3 if relation_weight is None else relation_weight
    expected = torch.stack([naive_penalty(name, naive, q, 0.3, second) for q in spelled_out(input_builder, STEP)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    (found * weights_for(found)).sum().backward()
    (expected * weights_for(expected)).sum().backward()
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("kind", ["all", "batch", "triple"])
@pytest.mark.parametrize("name", ["n2", "n3", "dura"])
def test_a_regulariser_acts_on_the_master_rows_of_few_bits(name: str, kind: str) -> None:
    inputs = whole_inputs(toy_inputs(GRAPH, kind=kind))
    whole, few = toy_model(GRAPH, "complex", 4), toy_model(GRAPH, "complex", 4).quantised(Rounding(1, 2))
    views = [View(model, inputs, grad=True) for model in (whole, few)]
    assert not torch.allclose(views[0].anchor, views[1].anchor)
    found = [regulariser(name, view, 0.3, None if name == "dura" else 0.2) for view in views]
    assert torch.equal(*found)
    for one in found:
        one.sum().backward()
    assert torch.equal(entity_gradient(whole), entity_gradient(few)) and torch.equal(
        *(model.relation.grad for model in (whole, few))
    )


@pytest.mark.parametrize(("name", "scorer"), PENALTIES)
def test_columns_count_as_often_as_models_have_them(name: str, scorer: str) -> None:
    # Two models, of the first two coordinates and of all four, the first with half of its weight.
    whole, small = toy_model(GRAPH, scorer, 4), toy_model(GRAPH, scorer, 4)
    columns = whole.scorer.crop_columns(2)
    with torch.no_grad():
        small.entity.weight[:, 2:] = 0.0
        outside = torch.ones(small.relation.shape[1], dtype=torch.bool)
        outside[columns] = False
        small.relation[:, outside] = 0.0
    entity, relation = NestedScores(whole.scorer, [2, 4]).members()
    weights = torch.tensor([0.5, 1.0], dtype=torch.float64)
    times = weights @ entity.double(), weights @ relation.double()
    inputs = whole_inputs(toy_inputs(GRAPH, kind="batch"))
    found = regulariser(name, View(whole, inputs, grad=False), 0.3, 0.2 if name != "dura" else None, times)
    alone = [
        regulariser(name, View(model, inputs, grad=False), 0.3, 0.2 if name != "dura" else None)
        for model in (whole, small)
    ]
    if name == "dura" and scorer == "rescal":  # its queries are those of the whole model
        assert bool((found > alone[0]).all())
    else:
        torch.testing.assert_close(found, alone[0] + 0.5 * alone[1], rtol=1e-6, atol=1e-9)


def test_n3_of_a_complex_row_of_zeros_has_a_finite_gradient() -> None:
    model = toy_model(GRAPH)
    model.entity.weight[::2] = 0.0
    regulariser("n3", View(model, whole_inputs(toy_inputs(GRAPH, kind="all")), grad=True), 1.0, None).sum().backward()
    assert entity_gradient(model).isfinite().all()
    assert entity_gradient(model)[::2].abs().max() == 0


def test_dura_refuses_a_distance_scorer_by_name() -> None:
    view = View(toy_model(GRAPH, "transe"), whole_inputs(toy_inputs(GRAPH, kind="all")), grad=False)
    with pytest.raises(UnsupportedError, match=r"dura.*not transe; use n2 or n3"):
        regulariser("dura", view, 1.0, None)
