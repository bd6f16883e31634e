"""M-DualDE: several teachers, against formulas for one triple at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE
from distkgd.methods.base import trained_models
from distkgd.methods.dualde import DualDE, _mean_of
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.jobs import Asked, NaiveModel
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

BOTH = {"stage_one": False, "stage_two": {"lr_scale": 1.0, "teacher_lr_scale": 1.0}}
FIRST = {"stage_two": None}
NAMES = ["", "teacher_", "teacher_2_"]


def huber_of(own: Tensor, theirs: Tensor) -> Tensor:
    gap = abs(own - theirs)
    return gap * gap / 2 if gap <= 1.0 else gap - 0.5


def numbers(model: NaiveModel, query: Asked, entity: int) -> list[Tensor]:
    """Score, angle and length ratio of the triple that `entity` makes of a query."""
    h, t = (x.reshape(-1) for x in model.head_tail(query, [entity]))
    lengths = [x.square().sum().sqrt() for x in (h, t)]
    return [model.scores(query, [entity])[0], (h * t).sum() / (lengths[0] * lengths[1]), lengths[0] / lengths[1]]


def opposite(naive: Naive, which: int, query: Asked, entity: int) -> tuple[list[Tensor], list[Tensor]]:
    """The numbers of model `which` (0: the student), and those it is compared with: averaged over teachers, or the
    student's."""
    student, *teachers = [numbers(m, query, entity) for m in (naive.models["student"], *naive.teachers)]
    if which:
        return teachers[which - 1], student
    how = naive.job.method.settings
    if how.normalise == "zscore":
        everyone = [query.answer, *query.negatives]
        scaled = on_one_scale([m.scores(query, everyone).detach() for m in naive.teachers], how.weights)
        raw = [m.scores(query, everyone).detach() for m in naive.teachers]
        # The scale is a constant; what a teacher learns passes through it.
        for one, z, y in zip(teachers, raw, scaled, strict=True):
            slope = (y[1] - y[0]) / (z[1] - z[0])
            one[0] = y[everyone.index(entity)] + slope * (one[0] - one[0].detach())
    w = how.weights or (1.0, 1.0)
    return student, [
        sum((w[i] * x for i, x in enumerate(each)), torch.tensor(0.0)) / sum(w) for each in zip(*teachers, strict=True)
    ]


def quality(naive: Naive, which: int, positive: bool, score: Tensor) -> Tensor:
    alpha, beta = (naive.evaluators[name][2 * which + (not positive)] for name in ("alpha", "beta"))
    p = 1.0 / (1.0 + torch.exp(-alpha * (score.detach() + beta)))
    return p if positive else 1.0 - p


def pointwise(naive: Naive, sides: int) -> dict[str, Tensor]:
    out = {}
    for which, tag in list(enumerate(NAMES))[:sides]:

        def soft(query: Asked, entity: int, which: int = which) -> Tensor:
            own, other = opposite(naive, which, query, entity)
            distance = sum((huber_of(a, b) for a, b in zip(own, other, strict=True)), torch.tensor(0.0))
            return quality(naive, which, entity == query.answer, other[0]) * distance

        def hard(query: Asked, entity: int, which: int = which) -> Tensor:
            own, other = opposite(naive, which, query, entity)
            positive = entity == query.answer
            kept = 1.0 - quality(naive, which, positive, other[0])
            return kept * torch.log(1.0 + torch.exp(-own[0] if positive else own[0]))

        for name, of in (("soft", soft), ("hard", hard)):
            out[f"{tag}{name}_positive"] = naive.mean(lambda q, of=of: of(q, q.answer))
            out[f"{tag}{name}_negative"] = naive.mean(
                lambda q, of=of: sum((of(q, e) for e in q.negatives), torch.tensor(0.0)) / max(1, len(q.negatives))
            )
    return out


def listwise(naive: Naive, sides: int) -> dict[str, Tensor]:
    models, out = [naive.models["student"], *naive.teachers], {}
    for which, tag in list(enumerate(NAMES))[:sides]:
        shares = naive.job.method.settings.shares(2) if which == 0 else [1.0]

        def weight(query: Asked, which: int = which) -> Tensor:
            return quality(naive, which, True, opposite(naive, which, query, query.answer)[1][0])

        def soft(query: Asked, which: int = which, shares: list[float] = shares) -> Tensor:
            others = naive.teachers if which == 0 else models[:1]
            own, *z = [m.scores(query, [query.answer, *query.negatives]) for m in (models[which], *others)]
            return sum((w * kl(theirs, own, 2.0) for w, theirs in zip(shares, z, strict=True)), torch.tensor(0.0))

        out[f"{tag}soft"] = naive.mean(lambda q, w=weight, s=soft: w(q) * s(q))
        out[f"{tag}hard"] = naive.mean(lambda q, w=weight, m=models[which]: (1.0 - w(q)) * cross_entropy(m, q))
    return out


def config_of(options: dict[str, Any], regime: str, loss: str) -> dict[str, Any]:
    return {"two": True} | plain_sgd("dualde", options, regime, loss={"name": loss}, dim=8, batch_size=6)


@over_shardings("stage regime", [1, 2], REGIMES)
def test_the_student_is_compared_with_the_average_of_its_teachers(stage: int, regime: str, sharding: Sharding) -> None:
    config = config_of(FIRST if stage == 1 else BOTH, regime, "softplus")
    sides = 1 if stage == 1 else 3
    config["student"]["distill"] = config["student"]["distill"] | {"alpha": 0.3, "beta": 0.1}
    assert_step_is(config, lambda naive: pointwise(naive, sides), sharding)


@over_shardings("stage regime", [1, 2], REGIMES)
def test_the_average_is_weighted_and_its_scores_are_on_one_scale(stage: int, regime: str, sharding: Sharding) -> None:
    averaged = {"weights": (1.0, 0.25), "normalise": "zscore", "alpha": 0.3, "beta": 0.1}
    config = config_of((FIRST if stage == 1 else BOTH) | averaged, regime, "softplus")
    assert_step_is(config, lambda naive: pointwise(naive, 1 if stage == 1 else 3), sharding)


@over_shardings("stage regime", [1, 2], REGIMES)
def test_listwise_the_divergences_from_the_teachers_are_averaged(stage: int, regime: str, sharding: Sharding) -> None:
    how = {"soft": "kl", "temperature": 2.0, "structure": False, "alpha": 0.3, "weights": (1.0, 0.25)}
    config = config_of((FIRST if stage == 1 else BOTH) | how, regime, "softmax")
    sides = 1 if stage == 1 else 3
    assert_step_is(config, lambda naive: listwise(naive, sides), sharding)


def test_teachers_rest_in_stage_one_and_all_of_them_learn_in_stage_two(tmp_path: Any) -> None:
    job = toy_job(config_of({"stage_two": {"start": 1}}, "triple", "softplus"), Ranks(), tmp_path, GRAPH)
    method = job.method
    assert isinstance(method, DualDE) and set(trained_models(method)) == {"student", "teacher", "teacher_2"}
    assert method.alpha.shape == (6,)

    def rows() -> list[Tensor]:
        return [model.entity.weight.clone() for model in trained_models(method).values()]

    start = rows()
    train_step(job, Progress(), 0)
    one = rows()
    assert [torch.equal(a, b) for a, b in zip(start, one, strict=True)] == [False, True, True]
    assert method.advance(1, 4, False)
    assert [method.phase(4).lr_scale[group] for group in ("teacher", "teacher_2")] == [0.1, 0.1]
    train_step(job, Progress(step=1), 0)
    assert not any(torch.equal(a, b) for a, b in zip(one, rows(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_of_scores_that_do_not_count_is_exactly_such_a_score(dtype: torch.dtype) -> None:
    """However many teachers there are: a rounding error of 1e30 would be a distance."""
    for number in range(1, 9):
        scores = [torch.full((50,), MASKED_SCORE, dtype=dtype)] * number
        assert torch.equal(_mean_of(scores, scores[0], [0.3] * number), scores[0])
    own, *scores = [torch.full((50,), float(i), dtype=dtype) for i in range(4)]
    assert _mean_of(scores, own, [1.0] * 3).tolist() == [2.0] * 50
