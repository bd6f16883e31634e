"""MulDE against its formulas, spelled out for one query at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.methods import check_teachers
from distkgd.methods.mulde import MulDE
from distkgd.pipeline.config import parse_config
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.jobs import Asked, spelled_out
from tests.methods.steps import (
    GRAPH,
    REGIMES,
    Naive,
    Sharding,
    assert_step_is,
    cross_entropy,
    kl,
    on_one_scale,
    over_shardings,
    plain_sgd,
)
from tests.toys import toy_job


def attention(naive: Naive, query: Asked, how: dict[str, Any]) -> list[Tensor]:
    """MulDE[attention]: the weights of the teachers."""
    teachers = naive.teachers
    if not how["contrast_attention"]:
        return [torch.tensor(w / sum(how["weights"]), dtype=torch.float64) for w in how["weights"]]
    odds = []
    for weight, teacher in zip(how["weights"], teachers, strict=True):
        scores = [z.detach() for z in teacher.scores(query, [query.answer, *query.negatives])]
        mean = sum(scores) / len(scores)
        variance = sum((z - mean) ** 2 for z in scores) / len(scores)
        contrast = (scores[0] - mean) / max(float(variance), 1e-10) ** 0.5
        odds.append(weight * torch.exp(naive.evaluators["attention"][0] * contrast))
    return [o / sum(odds) for o in odds]


def scaling(naive: Naive, query: Asked, how: dict[str, Any]) -> list[Tensor]:
    """MulDE[scaling]: the factors of the teachers for a relation and direction."""
    if not how["relation_scaling"]:
        return [torch.tensor(1.0)] * 2
    return list(torch.exp(naive.evaluators["scale"][query.relation + 3 * query.side]))


def senior(naive: Naive, query: Asked, how: dict[str, Any]) -> Tensor:
    """The Senior's scores of the answer and the other candidates."""
    everyone = [query.answer, *query.negatives]
    weights = [a * s for a, s in zip(attention(naive, query, how), scaling(naive, query, how), strict=True)]
    scores = [teacher.scores(query, everyone).detach() for teacher in naive.teachers]
    if how["normalise"] == "zscore":
        scores = on_one_scale(scores, how["weights"])
    return sum(w * z for w, z in zip(weights, scores, strict=True))


def senior_loss(naive: Naive, query: Asked, how: dict[str, Any]) -> Tensor:
    """MulDE[senior]"""
    z = senior(naive, query, how)
    return torch.log(torch.exp(z).sum()) - z[0]


def terms(naive: Naive, options: dict[str, Any]) -> dict[str, Tensor]:
    how = {"weight": 1.0, "hard_weight": 1.0, "temperature": 1.0, "relation_scaling": True, "contrast_attention": True}
    how |= {"weights": (1.0, 1.0), "normalise": "none"} | options
    student = naive.models["student"]

    def soft(query: Asked) -> Tensor:
        own = student.scores(query, [query.answer, *query.negatives])
        return kl(senior(naive, query, how).detach(), own, how["temperature"])

    out = {"soft": how["weight"] * naive.mean(soft)}
    if how["hard_weight"]:
        out["hard"] = how["hard_weight"] * naive.mean(lambda query: cross_entropy(student, query))
    if naive.evaluators:
        out["senior"] = naive.mean(lambda query: senior_loss(naive, query, how))
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {"attention": 0.6, "weight": 0.7, "hard_weight": 0.3, "temperature": 2.0},
    "scaling": {"contrast_attention": False},
    "attention": {"relation_scaling": False, "hard_weight": 0.0},
    "mean": {"relation_scaling": False, "contrast_attention": False},
    "weighted": {"relation_scaling": False, "contrast_attention": False, "weights": (1.0, 0.25), "normalise": "zscore"},
    "one scale": {"attention": 0.6, "weights": (3.0, 1.0), "normalise": "zscore", "temperature": 2.0},
}


@over_shardings("variant regime", VARIANTS, REGIMES)
def test_a_step_is_the_hard_loss_the_seniors_distribution_and_the_seniors_own_loss(
    variant: str, regime: str, sharding: Sharding
) -> None:
    options = VARIANTS[variant]
    assert_step_is(plain_sgd("mulde", options, regime), lambda naive: terms(naive, options), sharding)


def test_the_teachers_differ_in_scorer_and_dim_and_none_of_them_moves(tmp_path: Any) -> None:
    job = toy_job(plain_sgd("mulde", {}, "all", optimizer={"name": "adam", "lr": 0.05}), Ranks(), tmp_path, GRAPH)
    method = job.method
    assert isinstance(method, MulDE)
    assert len({(t.scorer.name, t.entity.dim) for t in method.teachers}) == 2
    before = [t.detach().clone() for model in method.teachers for t in (model.entity.weight, model.relation)]
    losses = [train_step(job, Progress(step=step), 0)[0] for step in range(40)]
    after = [t for model in method.teachers for t in (model.entity.weight, model.relation)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for name in ("soft", "hard", "senior"):
        assert sum(x[name] for x in losses[-5:]) < sum(x[name] for x in losses[:5])


def test_scores_that_do_not_count_stay_out_of_a_senior_that_shrinks_them() -> None:
    """With scale far below 0 a left-out score times its factor would look like one that counts."""
    config = plain_sgd("mulde", {"contrast_attention": False}, "all")
    config["dtype"] = "float32"
    job = toy_job(config, Ranks(), Path("/nonexistent"), GRAPH)
    assert isinstance(job.method, MulDE)
    job.method.scale.data.fill_(-80.0)
    losses, _ = train_step(job, Progress(), 0)
    job.prefetcher.drop()
    sizes = [1 + len(query.negatives) for query in spelled_out(job.input_builder, 0)]
    assert losses["senior"] == pytest.approx(float(torch.tensor(sizes).double().log().mean()), rel=1e-4)
    assert torch.isfinite(job.method.scale).all() and torch.isfinite(job.method.student.entity.weight).all()


def test_no_teacher_and_too_many_are_refused() -> None:
    for number in (0, 9):
        with pytest.raises(ConfigError, match=f"method mulde needs 1 to 8 teachers, and got {number}"):
            check_teachers("mulde", number)


def test_as_many_weights_as_teachers_and_not_all_of_them_0() -> None:
    teachers = {"teachers": {"a": {"dim": 4}, "b": {"dim": 8}}}
    for weights, said in (
        ([1, 1, 0.25], "one number for each teacher, in their order: 3, not 2"),
        ([0, 0], "weights of teachers must not all be 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(teachers | {"student": {"method": "mulde", "distill": {"weights": weights}}}, "test")
