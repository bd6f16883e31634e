"""MetaSD against its formulas: both updates, the second-order gradient, the quiz set, the pruned model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.data.filters import KnownAnswers
from distkgd.data.step_inputs import StepInputBuilder
from distkgd.distributed.pruning import Mask
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.evaluation.ranking import ranks_of
from distkgd.methods.losses.meta_gradient import gradient_of
from distkgd.methods.metasd import MetaSD, MetasdConfig
from distkgd.models import view as view_module
from distkgd.pipeline.config import parse_config
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step
from tests.jobs import NaiveModel, spelled_out
from tests.methods.steps import Sharding, on_ranks, over_shardings
from tests.toys import toy_graph, toy_job

GRAPH = toy_graph(entities=15, relations=3, triples=150)
TRIPLES = {tuple(t) for t in GRAPH.train.tolist()}
REGIMES: dict[str, dict[str, Any]] = {
    "all": {"kind": "all"},
    "filtered": {"kind": "all", "filtered": True},
    "batch": {"kind": "batch", "num": 20},
    "chunk": {"kind": "chunk", "num": 9, "chunk": 2, "sides": "uniform"},
    "triple": {"kind": "triple", "num": 5, "filtered": True},
}
DISTILL = {
    "prune": {"rate": 0.4},
    "alpha": 0.3,
    "beta": 0.6,
    "kl": 0.8,
    "reverse_kl": 0.5,
    "teacher_kl": 0.4,
    "teacher_reverse_kl": 0.9,
    "temperature": 2.0,
    "virtual_lr": 0.7,  # far from theta_S, so that a gradient taken at the wrong one would show
    "quiz": 0.2,
    "quiz_batch": 6,
    "meta_lr": 1.0,
    "meta_optimizer": "sgd",
}


def config_of(regime: str = "all", scorer: str = "complex", distill: Mapping[str, Any] = {}, **more: Any) -> Any:
    """One step of it is the gradient, negated."""
    stage = {"scorer": scorer, "dim": 6, "method": "metasd", "distill": {**DISTILL, **distill}, "init_scale": 0.8}
    stage |= {"negatives": REGIMES[regime], "batch_size": 8, "optimizer": {"name": "sgd", "lr": 1.0}}
    return {"dtype": "float64", "student": stage | more}


def job_of(config: Any, ranks: Ranks | None = None, folder: str = "/nonexistent") -> Job:
    job = toy_job(config, ranks or Ranks(), Path(folder), GRAPH)
    job.method.student.relation.data.mul_(4.0)
    return job


def method_of(job: Job) -> MetaSD:
    assert isinstance(job.method, MetaSD)
    return job.method


# -- the naive side -------------------------------------------------------------------------------------------------


class Naive(NaiveModel):
    """Formulas on given tables; `factor` stands for a dropout that scales every score."""

    def __init__(self, like: NaiveModel, entity: Tensor, relation: Tensor, factor: float = 1.0) -> None:
        self.scorer, self.reciprocal, self.num_relations = like.scorer, like.reciprocal, like.num_relations
        self.entity, self.relation, self.factor = entity, relation, factor

    def scores(self, asked: Any, entities: Any) -> Tensor:
        return self.factor * super().scores(asked, entities)


def cross_entropy(model: NaiveModel, queries: list[Any]) -> Tensor:
    found = [model.scores(q, [q.answer, *q.negatives]) for q in queries]
    return torch.stack([torch.log(torch.exp(z).sum()) - z[0] for z in found]).mean()


def divergences(small: NaiveModel, source: NaiveModel, queries: list[Any], temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(S || T) and T^2 KL(T || S), means over queries."""
    found = []
    for q in queries:
        everyone = [q.answer, *q.negatives]
        s, t = (torch.log_softmax(m.scores(q, everyone) / temperature, 0) for m in (small, source))
        found.append(torch.stack([(s.exp() * (s - t)).sum(), (t.exp() * (t - s)).sum()]))
    kl, back = (temperature**2 * torch.stack(found)).mean(0).unbind()
    return kl, back


def n3(model: NaiveModel, queries: list[Any], weight: float) -> Tensor:
    def size(row: Tensor) -> Tensor:
        return row.reshape(-1, 2).square().sum(1).pow(1.5).sum()

    rows = [(model.entity[q.anchor], model.relation_row(q), model.entity[q.answer]) for q in queries]
    return weight * torch.stack([size(a) + size(r) + size(e) for a, r, e in rows]).mean()


def relation_entropy(model: NaiveModel, queries: list[Any]) -> Tensor:
    found = []
    for q in queries:
        inverse = model.reciprocal and q.side
        every = range(model.num_relations, 2 * model.num_relations) if inverse else range(model.num_relations)
        others = range(2 * model.num_relations) if model.reciprocal else every
        # The same two ends, under every relation there is.
        z = []
        for r in others:
            relation = torch.zeros_like(model.relation_row(q)) + model.relation[r]
            at = model.num_relations if inverse else 0
            table = model.relation.clone()
            table[q.relation + at] = relation
            z.append(Naive(model, model.entity, table).own(q))
        target = q.relation + (model.num_relations if inverse else 0)
        found.append(F.cross_entropy(torch.stack(z).unsqueeze(0), torch.tensor([target])))
    return torch.stack(found).mean()


def quiz_loss(
    tables: tuple[Tensor, Tensor],
    frozen: tuple[Tensor, Tensor],
    mask: Mask,
    job: Job,
    how: Mapping[str, Any],
    factor: float = 1.0,
    weight: float = 0.0,
) -> Tensor:
    """Eq. 5 as a function of T's tables; theta_S and the mask stay as they are."""
    method = method_of(job)
    like = NaiveModel(method.student)
    queries, quiz = spelled_out(job.input_builder, 0), spelled_out(method.quiz_inputs(), 0)
    theta = [(x.detach() * m).requires_grad_() for x, m in zip(frozen, (mask.entity, mask.relation), strict=True)]
    small, source = Naive(like, theta[0], theta[1], factor), Naive(like, *tables)
    kl, back = divergences(small, source, queries, how["temperature"])
    learns = how["alpha"] * cross_entropy(small, queries)
    learns = learns + (1 - how["alpha"]) * (how["kl"] * kl + how["reverse_kl"] * back) + n3(small, queries, weight)
    pulls = torch.autograd.grad(learns, theta, create_graph=True)
    masks = (mask.entity, mask.relation)
    after = [x - how["virtual_lr"] * g * m for x, g, m in zip(theta, pulls, masks, strict=True)]
    return cross_entropy(Naive(like, *after), quiz)


# -- on ranks -------------------------------------------------------------------------------------------------------


def meta_on_ranks(ranks: Ranks, config: Any) -> dict[str, Any]:
    """The first update: its terms, and the gradient it leaves in T."""
    job = job_of(config, ranks)
    method = method_of(job)
    update = next(method.updates(job.prefetcher.inputs(0, 0)))
    sum(update.terms.values()).backward()
    job.prefetcher.drop()
    terms = {name: float(ranks.all_reduce(term.detach().clone())) for name, term in update.terms.items()}
    gradient = gradient_of(method.student)
    return {
        "groups": update.groups,
        "terms": terms,
        "entity": gradient.entity.weight,
        "relation": gradient.relation,
        "mask": method.mask,
    }


def mutual_on_ranks(ranks: Ranks, config: Any) -> dict[str, Any]:
    """A whole step without a quiz: losses, and what it took from the tables."""
    job = job_of(config, ranks)
    student = job.method.student
    before = [student.entity.weight.clone(), student.relation.detach().clone()]
    losses = train_step(job, Progress(), 0)[0]
    job.prefetcher.drop()
    entity, relation = before[0] - student.entity.weight, before[1] - student.relation.detach()
    return {"terms": losses, "entity": entity, "relation": relation}


def assert_found(found: list[dict[str, Any]], terms: Mapping[str, float], entity: Tensor, relation: Tensor) -> None:
    for one in found:
        assert one["terms"] == pytest.approx(dict(terms), rel=1e-9)
        torch.testing.assert_close(one["relation"], relation, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(torch.cat([one["entity"] for one in found]), entity, rtol=1e-8, atol=1e-11)


# -- the quiz: Eq. 4-6 ----------------------------------------------------------------------------------------------


@over_shardings("regime", REGIMES)
def test_the_meta_gradient_is_that_of_the_quiz_loss_through_the_virtual_step(regime: str, sharding: Sharding) -> None:
    config = config_of(regime, regulariser={"name": "n3", "weight": 0.02})
    job = job_of(config)
    method = method_of(job)
    method.prune(0)
    tables = NaiveModel(method.student)
    given = tables.entity, tables.relation
    loss = quiz_loss(given, given, method.mask, job, DISTILL, weight=0.02)
    entity, relation = torch.autograd.grad(loss, given)
    assert entity.abs().max() > 1e-4 and relation.abs().max() > 1e-4
    found = on_ranks(sharding, meta_on_ranks, config)
    assert found[0]["groups"] == {"meta"}
    assert torch.equal(torch.cat([one["mask"].entity for one in found]), method.mask.entity)
    assert_found(found, {"quiz": float(loss.detach())}, entity, relation)


@pytest.mark.parametrize("scorer", ["complex", "distmult"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.8, 0.5)], ids=["kl", "reverse", "both"])
def test_the_meta_gradient_is_the_limit_of_differences_with_theta_s_held(
    weights: tuple[float, float], scorer: str
) -> None:
    how = DISTILL | {"kl": weights[0], "reverse_kl": weights[1]}
    config = config_of(scorer=scorer, distill=how, reciprocal=False)
    job = job_of(config)
    method = method_of(job)
    method.prune(0)
    tables = NaiveModel(method.student)
    given = tables.entity.detach(), tables.relation.detach()
    found = meta_on_ranks(Ranks(), config)
    for which, gradient in enumerate((found["entity"], found["relation"])):
        places = gradient.abs().flatten().argsort(descending=True)[[0, 5]]
        for place in places.tolist():
            step = torch.zeros(gradient.numel(), dtype=torch.float64)
            step[place] = 1e-4
            moved = [
                quiz_loss(
                    tuple(x + sign * step.view_as(x) if i == which else x for i, x in enumerate(given)),
                    given,
                    method.mask,
                    job,
                    how,
                )
                for sign in (1, -1)
            ]
            slope = float((moved[0] - moved[1]).detach()) / 2e-4
            assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def scaled(rows: Tensor, rate: float, *_: Any) -> Tensor:
    """In place of dropout: a factor, which shows wherever dropout must come in."""
    return rows * (1.0 + rate)


def test_in_the_virtual_step_the_pruned_model_alone_has_dropout() -> None:
    config = config_of(dropout=0.2, relation_dropout=0.1)
    job = job_of(config)
    method = method_of(job)
    method.prune(0)
    tables = NaiveModel(method.student)
    given = tables.entity, tables.relation
    loss = quiz_loss(given, given, method.mask, job, DISTILL, factor=1.2 * 1.1)
    entity, relation = torch.autograd.grad(loss, given)
    with patch.object(view_module, "_drop", scaled):
        found = meta_on_ranks(Ranks(), config)
    assert_found([found], {"quiz": float(loss.detach())}, entity, relation)


def test_a_quiz_step_moves_the_source_model_by_its_own_rate_and_optimiser() -> None:
    alone = meta_on_ranks(Ranks(), config_of())
    moved = {}
    for name in ("sgd", "adagrad"):
        job = job_of(config_of(distill={"meta_lr": 0.25, "meta_optimizer": name}))
        before = job.method.student.entity.weight.clone()
        updates = job.method.updates(job.prefetcher.inputs(0, 0))
        sum(next(updates).terms.values()).backward()
        job.rows["meta"].step(1.0)
        moved[name] = before - job.method.student.entity.weight
        assert job.rows["student"].table.opened == []
    torch.testing.assert_close(moved["sgd"], 0.25 * alone["entity"])
    torch.testing.assert_close(moved["adagrad"], 0.25 * alone["entity"].sign(), atol=1e-5, rtol=0)


# -- learning from each other: Eq. 1-3, 7-11 ------------------------------------------------------------------------


@over_shardings("reciprocal regime", [True, False], REGIMES)
def test_a_mutual_step_is_that_of_the_formulas_each_model_taking_the_other_as_it_is(
    reciprocal: bool, regime: str, sharding: Sharding
) -> None:
    more = {"reciprocal": reciprocal, "regulariser": {"name": "n3", "weight": 0.02}}
    config = config_of(regime, distill={"meta": False, "relation_weight": 0.7}, **more)
    job = job_of(config)
    method = method_of(job)
    method.prune(0)
    like = NaiveModel(method.student)
    queries = spelled_out(job.input_builder, 0)
    small = Naive(like, like.entity * method.mask.entity, like.relation * method.mask.relation)
    constant = Naive(like, small.entity.detach(), small.relation.detach())
    source_constant = Naive(like, like.entity.detach(), like.relation.detach())
    how = DISTILL
    kl_s, back_s = divergences(small, source_constant, queries, how["temperature"])
    kl_t, back_t = divergences(constant, like, queries, how["temperature"])
    terms = {
        "hard": how["alpha"] * cross_entropy(small, queries),
        "kl": (1 - how["alpha"]) * how["kl"] * kl_s,
        "reverse_kl": (1 - how["alpha"]) * how["reverse_kl"] * back_s,
        "n3": n3(small, queries, 0.02),
        "relation": how["alpha"] * 0.7 * relation_entropy(small, queries),
        "teacher_hard": how["beta"] * cross_entropy(like, queries),
        "teacher_kl": (1 - how["beta"]) * how["teacher_kl"] * kl_t,
        "teacher_reverse_kl": (1 - how["beta"]) * how["teacher_reverse_kl"] * back_t,
        "teacher_n3": n3(like, queries, 0.02),
        "teacher_relation": how["beta"] * 0.7 * relation_entropy(like, queries),
    }
    entity, relation = torch.autograd.grad(sum(terms.values()), (like.entity, like.relation))
    assert_found(
        on_ranks(sharding, mutual_on_ranks, config),
        {name: float(term.detach()) for name, term in terms.items()},
        entity,
        relation,
    )


def test_without_pruning_both_models_are_one() -> None:
    job = job_of(config_of(distill={"prune": {"rate": 0.0}, "meta": False}))
    terms = train_step(job, Progress(), 0)[0]
    assert terms["kl"] == pytest.approx(0.0, abs=1e-12) and terms["teacher_kl"] == pytest.approx(0.0, abs=1e-12)
    assert terms["hard"] / DISTILL["alpha"] == pytest.approx(terms["teacher_hard"] / DISTILL["beta"])
    assert method_of(job).output_model is job.method.student


# -- the mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 5, 1])
def test_the_mask_is_made_anew_as_often_as_asked(every: int) -> None:
    job = job_of(config_of(distill={"prune": {"rate": 0.4, "every": every}, "meta": False}))
    per_epoch = job.input_builder.sampler.steps_per_epoch
    assert 5 < per_epoch < 16
    method, made = method_of(job), []
    for step in range(32):
        before = method.pruned_at
        method.prune(step)
        made += [step] if method.pruned_at != before else []
    assert made == list(range(0, 32, every or per_epoch))


def test_the_rate_rises_along_a_cubic_to_its_final_value() -> None:
    # Zhu & Gupta 2017, Eq. 1, from 0.
    job = job_of(config_of(distill={"prune": {"rate": 0.8, "ramp": 4}, "meta": False}))
    method, shares = method_of(job), []
    for epoch in range(6):
        method.prune(job.input_builder.sampler.steps_per_epoch * epoch)
        kept = int(method.mask.entity.sum() + method.mask.relation.sum())
        shares.append(1 - kept / (method.mask.entity.numel() + method.mask.relation.numel()))
    assert shares == pytest.approx([0.8 * (1 - (1 - t) ** 3) for t in (0, 0.25, 0.5, 0.75, 1, 1)], abs=1 / 126)


@pytest.mark.parametrize("scope", ["global", "table", "row", "column"])
def test_the_product_is_pruned_on_both_sides_and_scores_as_the_masked_model(scope: str) -> None:
    job = job_of(config_of(distill={"prune": {"rate": 0.4, "scope": scope}, "meta": False}))
    method = method_of(job)
    train_step(job, Progress(), 0)
    job.prefetcher.drop()
    product, student = method.output_model, method.student
    if scope == "column":
        assert product.scorer.dim == product.entity.dim == 4 and product.relation.shape[1] == 4
    else:
        zeros = int((product.entity.weight == 0).sum() + (product.relation == 0).sum())
        total = student.num_parameters
        assert 0.3 * total < zeros <= 0.4 * total
    everything = torch.cat([GRAPH.train, GRAPH.valid, GRAPH.test])
    known = KnownAnswers(everything, GRAPH.num_entities)
    method.pruned_at = -1
    method.prune(0)
    masked = job_of(config_of()).method.student
    masked.entity.weight.copy_(student.entity.weight * method.mask.entity)
    masked.relation.data.copy_(student.relation * method.mask.relation)
    found = ranks_of(product, GRAPH.valid, known, Ranks())
    assert torch.equal(found, ranks_of(masked, GRAPH.valid, known, Ranks()))
    assert not torch.equal(found, ranks_of(student, GRAPH.valid, known, Ranks()))
    assert job.validate is not None
    assert job.validate()["mrr"] == pytest.approx(float(found.reciprocal().mean()))


# -- the quiz set ---------------------------------------------------------------------------------------------------


def triples_of(input_builder: StepInputBuilder, steps: int) -> set[tuple[int, ...]]:
    return {tuple(t) for step in range(steps) for t in input_builder.sampler.batch(step).triples.tolist()}


@pytest.mark.parametrize("quiz_set", ["fixed", "anew"])
def test_the_quiz_set_is_drawn_by_seed_and_held_out_of_the_pass(quiz_set: str) -> None:
    drawn = []
    for seed in (0, 0, 1):
        job = job_of(config_of(distill={"quiz_set": quiz_set}) | {"seed": seed})
        quiz = method_of(job).quiz_inputs()
        assert quiz.sampler.batch_size == 6
        per_pass = (len(TRIPLES) - -(-len(TRIPLES) // 5)) // 8
        held, trained = triples_of(quiz, per_pass), triples_of(job.input_builder, per_pass)
        assert len(held) == -(-len(TRIPLES) // 5) and not held & trained
        drawn.append(held)
    assert drawn[0] == drawn[1] != drawn[2]
    first = {tuple(t) for t in GRAPH.train[: len(drawn[0])].tolist()}
    assert drawn[0] != first


def test_a_fixed_quiz_set_is_never_trained_on_and_one_drawn_anew_loses_no_triple() -> None:
    for quiz_set in ("fixed", "anew"):
        job = job_of(config_of(distill={"quiz_set": quiz_set}))
        quiz = method_of(job).quiz_inputs()
        held, trained = triples_of(quiz, 90), triples_of(job.input_builder, 90)  # six passes
        share = -(-len(TRIPLES) // 5)
        if quiz_set == "fixed":
            assert len(held) == share and trained == TRIPLES - held
        else:
            assert len(held) > 2 * share and trained == TRIPLES


def test_without_meta_all_triples_are_trained_on() -> None:
    job = job_of(config_of(distill={"meta": False}))
    assert len(triples_of(job.input_builder, 30)) == len(GRAPH.train)
    assert set(job.rows) == {"student"}


# -- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "accumulate: 2": {"accumulate": 2},
    "needs a bilinear scorer, not transe; use meta: false": {"scorer": "transe"},
    "relation_weight needs a bilinear scorer, not rotate": {
        "scorer": "rotate",
        "distill": {"meta": False, "relation_weight": 1.0},
    },
    "column cannot prune roth, which has biases": {
        "scorer": "roth",
        "distill": {"meta": False, "prune": {"scope": "column"}},
    },
    "neither balanced: true nor labels: known": {"negatives": {"labels": "known"}},
    "alpha: 0 and beta: 0": {"distill": {"alpha": 0.0, "beta": 0.0}},
    "set alpha below 1": {"distill": {"alpha": 1.0}},
    "kl or reverse_kl above 0": {"distill": {"kl": 0.0}},
    "set quiz above 0": {"distill": {"quiz": 0.0}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message: str) -> None:
    with pytest.raises(ConfigError if "distill" not in message else Exception, match=message):
        parse_config({"student": {"method": "metasd", **REFUSED[message]}}, "test")


def test_a_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a teacher is given but student\.method is metasd"):
        parse_config({"teacher": "a/path", "student": {"method": "metasd"}}, "test")


def test_the_defaults_are_the_papers() -> None:
    how = MetasdConfig()
    assert (how.prune.rate, how.prune.scope, how.alpha, how.beta) == (0.9, "global", 0.5, 0.5)
    assert (how.virtual_lr, how.meta_lr, how.meta) == (0.1, 1e-4, True)
    assert (how.kl, how.reverse_kl, how.teacher_kl, how.teacher_reverse_kl) == (1.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("scorer", ["transe", "rotate", "complex", "rescal", "cp"])
def test_a_stage_trains_with_any_scorer(scorer: str) -> None:
    meta = scorer not in ("transe", "rotate")
    config = config_of(
        scorer=scorer, distill={"meta": meta, "meta_lr": 1e-3}, optimizer={"name": "adagrad", "lr": 0.1}, dim=16
    )
    job = job_of(config)
    hard = []
    for step in range(40):
        hard.append(train_step(job, Progress(step=step), 0)[0]["hard"])
    job.prefetcher.drop()
    assert sum(hard[-5:]) < 0.95 * sum(hard[:5])
