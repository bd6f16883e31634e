"""IterDE against its formulas, spelled out for one query at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.methods.iterde import IterDE, IterdeConfig
from distkgd.pipeline.config import StageConfig, parse_config
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.jobs import Asked
from tests.methods.steps import (
    GRAPH,
    REGIMES,
    Naive,
    Sharding,
    assert_step_is,
    cross_entropy,
    kl,
    over_shardings,
    plain_sgd,
)
from tests.toys import toy_job

EPOCHS = 4


def huber_of(own: Tensor, theirs: Tensor, delta: float) -> Tensor:
    gap = abs(own - theirs)
    return gap * gap / 2 if gap <= delta else delta * (gap - delta / 2)


def soft_loss(naive: Naive, options: dict[str, Any]) -> Tensor:
    """IterDE[soft], or its listwise form."""
    student, teacher = naive.models["student"], naive.teachers[0]

    def of_query(query: Asked) -> Tensor:
        everyone = [query.answer, *query.negatives]
        z, theirs = student.scores(query, everyone), teacher.scores(query, everyone)
        if options.get("soft") == "kl":
            return kl(theirs, z, options.get("temperature", 1.0))
        each = [huber_of(a, b, options.get("delta", 1.0)) for a, b in zip(z, theirs, strict=True)]
        return each[0] + sum(each[1:], torch.tensor(0.0)) / max(1, len(each) - 1)

    return naive.mean(of_query)


def swda(naive: Naive, options: dict[str, Any]) -> float:
    """IterDE[SWDA] = k (epoch / M)^p."""
    epoch = naive.step // naive.job.input_builder.sampler.steps_per_epoch
    return float(options.get("k", 1.0) * (epoch / EPOCHS) ** options.get("p", 1.0))


def terms(naive: Naive, options: dict[str, Any]) -> dict[str, Tensor]:
    student = naive.models["student"]
    share = options["k"] if options.get("schedule") == "constant" else swda(naive, options)
    kept = 1.0 - share if options.get("combination") == "convex" else 1.0
    hard = naive.mean(lambda query: cross_entropy(student, query))
    return {"soft": share * soft_loss(naive, options), "hard": kept * hard}


VARIANTS: dict[str, dict[str, Any]] = {
    "swda": {"k": 0.8, "p": 0.5, "delta": 0.4},
    "constant": {"k": 0.7, "schedule": "constant", "combination": "convex"},
    "listwise": {"k": 0.9, "p": 2.0, "soft": "kl", "temperature": 2.0, "combination": "convex"},
}


@over_shardings("variant regime", VARIANTS, REGIMES)
def test_a_step_is_the_hard_loss_and_the_weighed_distance_to_the_teachers_scores(
    variant: str, regime: str, sharding: Sharding
) -> None:
    options = VARIANTS[variant]
    # An epoch has 8 steps: this one is in epoch 2.
    assert_step_is(plain_sgd("iterde", options, regime), lambda naive: terms(naive, options), sharding, step=17)


def rescaled(product: float) -> float:
    """The power of ten that brings a product into [1, 10), as the released code finds it."""
    power = 1.0
    while product * power < 1.0:
        power *= 10.0
    while product * power >= 10.0:
        power /= 10.0
    return power


@over_shardings("soft regime", ["huber", "kl"], REGIMES)
def test_two_phase_first_divides_by_a_product_that_is_not_detached(soft: str, regime: str, sharding: Sharding) -> None:
    options = {"k": 0.3, "schedule": "two_phase", "soft": soft}

    def first_half(naive: Naive) -> dict[str, Tensor]:
        soft, hard = soft_loss(naive, options), naive.mean(lambda q: cross_entropy(naive.models["student"], q))
        c = soft * hard * rescaled(float((soft * hard).detach()))
        assert 1.0 <= float(c.detach()) < 10.0
        return {"soft": 0.3 / c * soft, "hard": hard}

    def second_half(naive: Naive) -> dict[str, Tensor]:
        hard = naive.mean(lambda q: cross_entropy(naive.models["student"], q))
        return {"soft": 0.3 * soft_loss(naive, options), "hard": hard}

    config = plain_sgd("iterde", options, regime)
    assert_step_is(config, first_half, sharding, step=15)
    assert_step_is(config, second_half, sharding, step=16)


def test_in_the_first_of_two_phases_no_gradient_comes_from_the_teacher() -> None:
    options = {"k": 0.3, "schedule": "two_phase"}

    def hard_alone(naive: Naive) -> dict[str, Tensor]:
        """k / c * soft is k / (power * hard)."""
        soft, hard = soft_loss(naive, options), naive.mean(lambda q: cross_entropy(naive.models["student"], q))
        return {"soft": 0.3 / (rescaled(float((soft * hard).detach())) * hard), "hard": hard}

    assert_step_is(plain_sgd("iterde", options, "all"), hard_alone, (2, "queries", None))


def test_two_phase_refuses_a_patience_that_could_end_it_before_its_second_half() -> None:
    with pytest.raises(ValueError, match="patience 3 may end the stage"):
        StageConfig(method="iterde", patience=3, distill={"schedule": "two_phase"})


def test_two_phase_ends_where_a_loss_is_zero(tmp_path: Any) -> None:
    stage = plain_sgd("iterde", {"schedule": "two_phase"}, "triple")["student"]
    stage |= {"loss": {"name": "margin", "margin": 1e-9}, "init_scale": 1e-12}
    job = toy_job({"dtype": "float64", "student": stage}, Ranks(), tmp_path, GRAPH)
    for model in (job.method.student, job.method.teachers[0]):
        model.entity.weight.zero_()
    assert train_step(job, Progress(), 0)[0]["soft"] == 0.0


def test_the_weight_grows_with_the_epochs_and_stays_below_k(tmp_path: Any) -> None:
    method = toy_job(plain_sgd("iterde", {"k": 0.8, "p": 2.0}, "all"), Ranks(), tmp_path, GRAPH).method
    assert isinstance(method, IterDE)
    per_epoch = method.setup.steps_per_epoch
    assert [method.soft_weight(epoch * per_epoch) for epoch in range(EPOCHS)] == pytest.approx(
        [0.0, 0.8 / 16, 0.8 / 4, 0.8 * 9 / 16]
    )
    assert method.soft_weight(2 * per_epoch - 1) == method.soft_weight(per_epoch)


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"distill": {"combination": "convex", "k": 1.5}}, "at most 1"),
        ({"distill": {"combination": "convex", "schedule": "two_phase"}}, "two_phase adds"),
        ({"distill": {"schedule": "two_phase"}, "accumulate": 2}, "accumulate: 1"),
        ({"negatives": {"labels": "known"}}, "no labels: known"),
    ],
)
def test_what_cannot_be_combined_is_refused(student: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"teacher": "somewhere", "student": {"method": "iterde", **student}}, "test")


def test_the_teacher_rests_bit_for_bit_while_the_student_learns(tmp_path: Any) -> None:
    stage = {"dim": 6, "batch_size": 16, "method": "iterde", "distill": {"schedule": "constant"}}
    job = toy_job({"student": stage}, Ranks(), tmp_path, GRAPH)
    teacher = job.method.teachers[0]
    before = [teacher.entity.weight.clone(), teacher.relation.clone()]
    losses = [train_step(job, Progress(step=step), 0)[0]["soft"] for step in range(30)]
    assert torch.equal(before[0], teacher.entity.weight) and torch.equal(before[1], teacher.relation)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_defaults_are_the_papers_form() -> None:
    assert IterdeConfig().schedule == "polynomial" and IterdeConfig().soft == "huber"
