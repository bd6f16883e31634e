"""The basic distillation baseline against its formula."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import loss_requests, query_blocks
from distkgd.errors import ConfigError
from distkgd.methods import TaskLoss
from distkgd.methods.bkd import Bkd, BkdConfig
from distkgd.methods.losses import scores as losses
from distkgd.pipeline.config import parse_config
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.covering import all_pairs
from tests.jobs import NaiveModel, assert_same_gradients, spelled_out, toy_inputs, toy_model, toy_setup
from tests.methods.steps import GRAPH, REGIMES, Naive, Sharding, assert_step_is, one_step, over_shardings, plain_sgd
from tests.ranks import run_on_threads
from tests.toys import toy_job

STEP = 1


def settings(**more: Any) -> TaskLoss:
    plain = dict(loss="softmax", temperature=1.0, margin=1.0, label_smoothing=0.0, regulariser="none", weight=0.0)
    plain |= dict(relation_weight=None, dropout=0.0, relation_dropout=0.0, bf16=False)
    return TaskLoss(**(plain | more))


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True)), torch.tensor(0.0))


NAIVE = {
    "kl": naive_kl,
    "reverse_kl": lambda p, q: naive_kl(q, p),
    "js": lambda p, q: (naive_kl(p, (p + q) / 2) + naive_kl(q, (p + q) / 2)) / 2,
}
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", NAIVE)


def naive_terms(student: NaiveModel, teacher: NaiveModel, queries: list[Any], options: dict[str, Any]) -> Any:
    """{name: mean over queries} of the soft and, unless it weighs nothing, the hard term."""
    temperature, hard_weight = options["temperature"], options["hard_weight"]
    soft, hard = [], []
    for query in queries:
        everyone = [query.answer, *query.negatives]
        z, theirs = student.scores(query, everyone), teacher.scores(query, everyone)
        p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (theirs, z))
        soft.append(options["weight"] * temperature**2 * NAIVE[options["divergence"]](p, q))
        hard.append(hard_weight * (torch.log(torch.exp(z).sum()) - z[0]))
    return {"soft": torch.stack(soft).mean()} | ({"hard": torch.stack(hard).mean()} if hard_weight else {})


@pytest.mark.parametrize(
    ("divergence", "kind", "weights"),
    all_pairs(NAIVE, ["all", "batch", "chunk", "triple"], [(1.0, 1.0, 1.0), (0.7, 0.3, 3.0), (2.0, 0.0, 0.5)]),
)
def test_the_student_learns_the_teachers_softened_distribution_beside_the_labels(
    divergence: str, kind: str, weights: tuple[float, float, float]
) -> None:
    weight, hard_weight, temperature = weights
    student, teacher = toy_model(GRAPH, "transe", 5, reciprocal=False, margin=3.0), toy_model(GRAPH, seed=6)
    naive, naive_teacher = NaiveModel(student), NaiveModel(teacher)
    input_builder = toy_inputs(GRAPH, kind=kind, filtered=True)
    options = {"weight": weight, "hard_weight": hard_weight, "temperature": temperature, "divergence": divergence}
    method = Bkd(student, settings(), [teacher], BkdConfig(**options), toy_setup(GRAPH))
    (update,) = method.updates(input_builder.inputs(*input_builder.parts(STEP, 1)))
    expected = naive_terms(naive, naive_teacher, spelled_out(input_builder, STEP), options)
    assert update.groups == {"student"} and update.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(update.terms[name], value)
    sum(update.terms.values()).backward()
    sum(expected.values()).backward()
    assert_same_gradients(student, naive)
    assert teacher.entity.opened == [] and teacher.relation.grad is None


# -- on ranks -------------------------------------------------------------------------------------------------------


def config_of(divergence: str, regime: str, **more: Any) -> dict[str, Any]:
    distill = {"weight": 0.7, "hard_weight": 0.3, "temperature": 3.0, "divergence": divergence}
    return plain_sgd("bkd", distill, regime, **more)


@over_shardings("divergence regime", NAIVE, REGIMES)
def test_on_any_number_of_ranks_in_blocks_or_not_a_step_is_that_of_the_formula(
    divergence: str, regime: str, sharding: Sharding
) -> None:
    config = config_of(divergence, regime)

    def formula(naive: Naive) -> Any:
        return naive_terms(naive.models["student"], naive.teachers[0], naive.asked, config["student"]["distill"])

    assert_step_is(config, formula, sharding)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("regime", ["batch", "triple"])
def test_a_rank_without_triples_or_candidates_takes_part_in_every_pass(divergence: str, regime: str) -> None:
    negatives = REGIMES[regime] | {"num": 1}
    for move in ("rows", "queries"):
        config = config_of(divergence, regime, batch_size=2, negatives=negatives, move=move)
        one, many = one_step(Ranks(), config), run_on_threads(3, one_step, config=config)
        assert many[0]["losses"] == pytest.approx(one["losses"], rel=1e-9)
        entity = torch.cat([x["gradients"]["student.entity"] for x in many])
        torch.testing.assert_close(entity, one["gradients"]["student.entity"], rtol=1e-9, atol=1e-11)


# -- the method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
@pytest.mark.parametrize(("divergence", "passes"), [("kl", 1), ("reverse_kl", 1), ("js", 2)])
def test_the_hard_loss_costs_no_pass_of_its_own(divergence: str, passes: int, hard_weight: float) -> None:
    student, teacher = toy_model(GRAPH), toy_model(GRAPH, seed=6)
    input_builder = toy_inputs(GRAPH, kind="all")
    options = {"weight": 1.0, "hard_weight": hard_weight, "temperature": 2.0, "divergence": divergence}
    with (
        patch.object(query_blocks, "reduce_over_candidates", wraps=loss_requests.reduce_over_candidates) as last,
        patch.object(losses, "reduce_over_candidates", wraps=loss_requests.reduce_over_candidates) as first,
    ):
        list(
            Bkd(student, settings(), [teacher], BkdConfig(**options), toy_setup(GRAPH)).updates(
                input_builder.inputs(*input_builder.parts(STEP, 1))
            )
        )
    assert last.call_count + first.call_count == passes


def test_a_divergence_that_does_not_exist_is_refused_with_those_that_do() -> None:
    student = {"method": "bkd", "distill": {"divergence": "jensen"}}
    with pytest.raises(ConfigError, match=r"divergence: .*'kl', 'reverse_kl' or 'js' \(given: 'jensen'\)"):
        parse_config({"teacher": "somewhere", "student": student}, "test")


@EVERY_DIVERGENCE
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(divergence: str) -> None:
    model = toy_model(GRAPH)
    input_builder = toy_inputs(GRAPH, kind="all")
    options = BkdConfig(hard_weight=0.0, temperature=2.0, divergence=divergence)
    method = Bkd(model, settings(), [model], options, toy_setup(GRAPH))
    (update,) = method.updates(input_builder.inputs(*input_builder.parts(STEP, 1)))
    assert abs(float(update.terms["soft"].detach())) < 1e-12


def test_the_teacher_rests_bit_for_bit_while_the_student_learns(tmp_path: Any) -> None:
    student = {"dim": 6, "batch_size": 16, "method": "bkd", "negatives": {"kind": "all"}}
    job = toy_job({"student": student}, Ranks(), tmp_path, GRAPH)
    method = job.method
    assert isinstance(method, Bkd) and set(method.groups) == {"student"}
    tables = [method.teachers[0].entity.weight, method.teachers[0].relation, method.student.entity.weight]
    before = [x.detach().clone() for x in tables]
    losses = [train_step(job, Progress(step=step), 0)[0]["soft"] for step in range(30)]
    same = [torch.equal(a, b) for a, b in zip(before, tables, strict=True)]
    assert same == [True, True, False]
    assert sum(losses[-5:]) < sum(losses[:5])


OTHER_OPTIONS = {"weight": 0.5, "hard_weight": 0.5, "temperature": 2.0, "divergence": "js"}


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_every_option_changes_what_is_trained(option: str, tmp_path: Any) -> None:
    rows = []
    for distill in ({}, {option: OTHER_OPTIONS[option]}):
        student = {"dim": 6, "batch_size": 16, "method": "bkd", "distill": distill}
        job = toy_job({"student": student}, Ranks(), tmp_path, GRAPH)
        train_step(job, Progress(), 0)
        rows.append(job.method.student.relation.detach().clone())
        train_step(job, Progress(step=1), 0)
        rows[-1] = job.method.student.entity.weight.clone()
    assert not torch.equal(*rows)


def test_every_option_is_in_this_test() -> None:
    assert OTHER_OPTIONS.keys() | {"labels"} == BkdConfig.model_fields.keys()  # labels: tests/methods/test_cached.py
