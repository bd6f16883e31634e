"""Relational KD against its formulas, spelled out for one pair and one triple of samples at a time."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.methods.rkd import angle_loss, distance_loss, inner_products
from distkgd.pipeline.config import parse_config
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step
from tests.jobs import Asked, NaiveModel
from tests.methods.steps import (
    GRAPH,
    REGIMES,
    Naive,
    Sharding,
    assert_step_is,
    cross_entropy,
    over_shardings,
    plain_sgd,
)
from tests.toys import toy_job


def huber_of(own: Tensor, theirs: Tensor, delta: float) -> Tensor:
    gap = abs(own - theirs)
    return gap * gap / 2 if gap <= delta else delta * (gap - delta / 2)


def length(x: Tensor) -> Tensor:
    return x.square().sum().clamp(min=1e-12).sqrt()


def naive_distance(own: list[Tensor], theirs: list[Tensor], delta: float) -> Tensor:
    """RKD[D] of one group."""
    pairs = list(combinations(range(len(own)), 2))
    mu_s, mu_t = (sum(length(x[i] - x[j]) for i, j in pairs) / len(pairs) for x in (own, theirs))
    each = [huber_of(length(own[i] - own[j]) / mu_s, length(theirs[i] - theirs[j]) / mu_t, delta) for i, j in pairs]
    return sum(each, torch.tensor(0.0)) / len(each)


def naive_angle(own: list[Tensor], theirs: list[Tensor], delta: float) -> Tensor:
    """RKD[A] of one group."""

    def cosine(x: list[Tensor], i: int, j: int, k: int) -> Tensor:
        if torch.equal(x[i], x[j]) or torch.equal(x[k], x[j]):
            return torch.zeros((), dtype=x[0].dtype)
        return ((x[i] - x[j]) / length(x[i] - x[j]) * (x[k] - x[j]) / length(x[k] - x[j])).sum()

    each = [
        huber_of(cosine(own, i, j, k), cosine(theirs, i, j, k), delta)
        for j in range(len(own))
        for i, k in combinations([n for n in range(len(own)) if n != j], 2)
    ]
    return sum(each, torch.tensor(0.0)) / len(each)


def sample(model: NaiveModel, query: Asked, vectors: str) -> Tensor:
    """A query's vector: its answer's row, or ComplEx's h * r (all these models are reciprocal)."""
    if vectors == "entity":
        return model.entity[query.answer]
    h, r = model.entity[query.anchor], model.relation_row(query)
    h, r = (torch.complex(x[0::2], x[1::2]) for x in (h, r))
    return torch.view_as_real(h * r).reshape(-1)


def terms(naive: Naive, options: dict[str, Any]) -> dict[str, Tensor]:
    how = {"vectors": "entity", "distance_weight": 1.0, "angle_weight": 2.0, "hard_weight": 1.0, "delta": 1.0} | options
    student, teacher = naive.models["student"], naive.teachers[0]
    n = how["group"] * (2 if naive.job.input_builder.sampler.sides == "both" else 1)
    groups = [naive.asked[i : i + n] for i in range(0, len(naive.asked), n)]
    out = {"hard": how["hard_weight"] * naive.mean(lambda query: cross_entropy(student, query))}
    for name, loss in (("distance", naive_distance), ("angle", naive_angle)):
        if how[f"{name}_weight"]:
            samples = [[[sample(m, q, how["vectors"]) for q in g] for m in (student, teacher)] for g in groups]
            each = torch.stack([loss(own, theirs, how["delta"]) for own, theirs in samples])
            out[name] = how[f"{name}_weight"] * each.mean()
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "entity": {"group": 4, "delta": 0.3},
    "query": {"group": 4, "vectors": "query", "distance_weight": 0.5, "angle_weight": 0.7, "hard_weight": 0.6},
    "distance": {"group": 3, "angle_weight": 0.0},
    "angle": {"group": 4, "distance_weight": 0.0},
}


@over_shardings("variant regime", VARIANTS, REGIMES)
def test_a_step_is_the_hard_loss_and_the_distances_and_angles_within_each_group(
    variant: str, regime: str, sharding: Sharding
) -> None:
    options = VARIANTS[variant]
    values = assert_step_is(plain_sgd("rkd", options, regime), lambda naive: terms(naive, options), sharding)
    assert all(value > 1e-4 for value in values.values())


@pytest.mark.parametrize("move", ["rows", "queries"])
@pytest.mark.parametrize("at_once", [None, 20])
def test_more_ranks_than_groups_leave_a_rank_without_samples(move: str, at_once: int | None) -> None:
    config = plain_sgd("rkd", {"group": 4}, "batch", batch_size=4)
    assert_step_is(config, lambda naive: terms(naive, {"group": 4}), (3, move, at_once))


def test_chunks_and_groups_both_stay_whole(tmp_path: Any) -> None:
    stage = plain_sgd("rkd", {"group": 4}, "chunk", batch_size=24)
    stage["student"]["negatives"] = {"kind": "chunk", "num": 9, "chunk": 3}
    input_builder = toy_job(stage, Ranks(), tmp_path, GRAPH).input_builder
    input_builder.ranks = Ranks(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "bounds", lambda _self, n: [n * i // 5 for i in range(6)])
        cuts = input_builder.cuts_of(input_builder.sampler.batch(0))
    assert cuts[-1] == 24 and all(cut % 12 == 0 for cut in cuts)


def test_scaled_and_turned_embeddings_have_the_same_relations() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    own, theirs = inner_products(x), inner_products(3.0 * x @ turn + 1.0)
    for loss in (distance_loss, angle_loss):
        assert float(loss(own, theirs, 1.0).abs().max()) < 1e-20
        assert float(loss(own, inner_products(x.square()), 1.0).min()) > 1e-3


def test_equal_samples_leave_no_infinite_gradient() -> None:
    x = torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = inner_products(x)
    x = x.clone()
    x[0, 1] = x[0, 0]
    x.requires_grad_()
    own = inner_products(x)
    (distance_loss(own, theirs, 1.0) + angle_loss(own, theirs, 1.0)).sum().backward()
    assert x.grad is not None and math.isfinite(float(x.grad.sum())) and float(x.grad.abs().max()) < 100


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"batch_size": 20}, "multiple of 8"),
        ({"batch_size": 24, "accumulate": 2}, "multiple of 16"),
        ({"batch_size": 24, "negatives": {"kind": "chunk", "chunk": 6}, "distill": {"group": 4}}, None),
        ({"batch_size": 18, "negatives": {"kind": "chunk", "chunk": 6}, "distill": {"group": 4}}, "multiple of 12"),
        ({"distill": {"group": 2}, "negatives": {"sides": "uniform"}}, "3 or more"),
        ({"distill": {"group": 2}}, None),
        ({"balanced": True}, "balanced"),
        ({"distill": {"distance_weight": 0, "angle_weight": 0}}, "both 0"),
    ],
)
def test_what_would_tear_a_group_is_refused(student: dict[str, Any], words: str | None) -> None:
    config = {"teacher": "somewhere", "student": {"method": "rkd", **student}}
    if words is None:
        parse_config(config, "test")
        return
    with pytest.raises(ConfigError, match=words):
        parse_config(config, "test")


def test_the_student_takes_on_the_teachers_distances(tmp_path: Any) -> None:
    stage = {"dim": 6, "batch_size": 16, "method": "rkd", "distill": {"distance_weight": 5.0}}
    job: Job = toy_job({"student": stage}, Ranks(), tmp_path, GRAPH)
    teacher = job.method.teachers[0]
    before = [teacher.entity.weight.clone(), teacher.relation.clone()]
    losses = [train_step(job, Progress(step=step), 0)[0]["distance"] for step in range(40)]
    assert torch.equal(before[0], teacher.entity.weight) and torch.equal(before[1], teacher.relation)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
