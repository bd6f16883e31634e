"""MED against its formulas, one triple and one sub-model at a time."""

import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import candidate_layout, query_blocks
from distkgd.errors import ConfigError
from distkgd.kernels import nested, nested_products
from distkgd.methods import TaskLoss
from distkgd.methods.med import Med, MedConfig, _Sums
from distkgd.pipeline.config import parse_config
from distkgd.scorers import SCORERS, build_scorer
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.covering import all_pairs
from tests.jobs import Asked, NaiveModel, assert_same_gradients, spelled_out, toy_inputs, toy_model, toy_setup
from tests.methods.steps import GRAPH, REGIMES
from tests.methods.test_losses import naive_penalty
from tests.ranks import run_on_threads
from tests.toys import toy_job

STEP = 1
TEMPERATURE = 0.6
U = (-0.8, 0.3, 0.7)
LOSSES = ("softmax", "softplus", "bce", "self_adversarial")
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
EVERY_REGIME = pytest.mark.parametrize("regime", REGIMES)


def settings(**more: Any) -> TaskLoss:
    plain = dict(loss="softmax", temperature=TEMPERATURE, margin=1.0, label_smoothing=0.0, regulariser="none")
    plain |= dict(weight=0.0, relation_weight=None, dropout=0.0, relation_dropout=0.0, bf16=False)
    return TaskLoss(**(plain | more))


def options(**more: Any) -> MedConfig:
    return MedConfig(**({"dims": (2, 4, 8)} | more))


def bounded(how: MedConfig, u: Tensor) -> Tensor:
    """[3]: the exponents of what is learned of them."""
    return torch.stack(
        [a + (b - a) / (1 + torch.exp(-x)) for (a, b), x in zip((how.w1, how.w2, how.w3), u, strict=True)]
    )


# -- the formulas, for one sub-model and one triple -----------------------------------------------------------------


class Cropped(NaiveModel):
    """The first `dim` columns of a naive model, sharing its leaves."""

    def __init__(self, whole: NaiveModel, dim: int) -> None:
        self.scorer = whole.scorer.crop(dim)
        self.reciprocal, self.num_relations = whole.reciprocal, whole.num_relations
        self.entity = whole.entity[:, : self.scorer.entity_size]
        self.relation = whole.relation[:, whole.scorer.crop_columns(dim)]
        self.scored: dict[int, Tensor] = {}

    def all_scores(self, asked: Asked) -> Tensor:
        """[1 + n]: of the query's own answer and of its negatives; kept, since several terms want them."""
        if id(asked) not in self.scored:
            self.scored[id(asked)] = self.scores(asked, [asked.answer, *asked.negatives])
        return self.scored[id(asked)]

    def own(self, asked: Asked) -> Tensor:
        return self.all_scores(asked)[0]

    def others(self, asked: Asked) -> Tensor:
        return self.all_scores(asked)[1:]

    def scores(self, asked: Asked, entities: Any) -> Tensor:
        """[n]: the scorer's own formula of whole triples, so that every scorer has an oracle."""
        h, t = self.head_tail(asked, entities)
        if self.reciprocal and asked.side:
            h, t = t, h
        return self.scorer.score(h, self.relation_row(asked), t).reshape(-1)


def naive_huber(gap: Tensor, delta: float) -> Tensor:
    return torch.where(gap.abs() <= delta, gap * gap / 2, delta * (gap.abs() - delta / 2))


def naive_evolution(
    models: list[Cropped], queries: list[Asked], how: MedConfig, w: Tensor, loss: str, i: int
) -> Tensor:
    """[]: L_EI of sub-model i, spelled out."""
    model = models[i]
    lower = models[i - 1] if i and how.evolution else None
    odds = [torch.ones((), dtype=torch.float64) for _ in queries]
    if lower is not None:
        seen = [lower.own(query).detach() for query in queries]
        odds = [torch.exp(-w[0] * (torch.sigmoid(s) if how.positives == "sigmoid" else s)) for s in seen]
    terms, mean = [], sum(odds) / len(queries)
    for query, odd in zip(queries, odds, strict=True):
        pos = odd / mean
        z, others = model.own(query), model.others(query)
        if loss == "softmax":
            z, others = ((how.dims[-1] / how.dims[i]) ** how.sharpness * x for x in (z, others))
            terms.append(pos * (torch.log(torch.exp(z) + torch.exp(others).sum()) - z))
            continue
        neg = torch.ones_like(others)
        if lower is not None:
            neg = torch.exp(w[1] * lower.others(query).detach())
        elif loss == "self_adversarial":
            neg = torch.exp(TEMPERATURE * others.detach())
        negative = (neg * torch.log(1.0 + torch.exp(others))).sum() / (neg.sum() if len(neg) else 1.0)
        terms.append(pos * torch.log(1.0 + torch.exp(-z)) + negative * (len(others) if loss == "bce" else 1))
    return sum(terms) / len(queries)


def naive_mutual(models: list[Cropped], queries: list[Asked], how: MedConfig, i: int) -> Tensor:
    """[]: L_ML of sub-models i - 1 and i."""
    model, below = models[i], models[i - 1]
    gaps = []
    for query in queries:
        gap = naive_huber(model.own(query) - below.own(query), how.mutual_delta)
        if query.negatives:
            gap = gap + naive_huber(model.others(query) - below.others(query), how.mutual_delta).mean()
        gaps.append(gap)
    return how.mutual_weight * sum(gaps) / len(queries)


def naive_terms(whole: NaiveModel, queries: list[Asked], how: MedConfig, w: Tensor, loss: str) -> dict[str, Tensor]:
    """{name: term}: MED's loss."""
    n, models = len(how.dims), [Cropped(whole, dim) for dim in how.dims]
    factors = [torch.exp(w[2] * dim / how.dims[-1]) if how.dynamic else torch.ones(()) for dim in how.dims]
    factors = [torch.tensor(x, dtype=torch.float64) for x in how.weights] if how.weights else factors
    losses = [naive_evolution(models, queries, how, w, loss, i) for i in range(n)]
    found = {"evolution": sum(f * x for f, x in zip(factors, losses, strict=True)) / (sum(factors) / n)}
    return found | ({"mutual": sum(naive_mutual(models, queries, how, i) for i in range(1, n))} if how.mutual else {})


def compare(
    scorer: str, reciprocal: bool, regime: str, loss: str, how: MedConfig, margin: Any = None, norm: Any = None
) -> None:
    model = toy_model(GRAPH, scorer, how.dims[-1], reciprocal=reciprocal, margin=margin)
    if norm is not None:
        model.scorer = build_scorer(scorer, how.dims[-1], 3.0, norm)
    naive = NaiveModel(model)
    input_builder = toy_inputs(GRAPH, **REGIMES[regime])
    method = Med(model, settings(loss=loss), [], how, toy_setup(GRAPH))
    with torch.no_grad():
        method.u.copy_(torch.tensor(U, dtype=torch.float64))
    method.u.requires_grad_(True)
    (update,) = method.updates(input_builder.inputs(*input_builder.parts(STEP, 1)))
    u = torch.tensor(U, dtype=torch.float64, requires_grad=True)
    expected = naive_terms(naive, spelled_out(input_builder, STEP), how, bounded(how, u), loss)
    assert update.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(update.terms[name], value, rtol=1e-9, atol=1e-11)
    sum(update.terms.values()).backward()
    sum(expected.values()).backward()
    assert_same_gradients(model, naive)
    if how.evolution or how.dynamic:
        assert u.grad is not None and u.grad.abs().max() > 1e-6
        torch.testing.assert_close(method.u.grad, u.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dims", "regime", "loss"), all_pairs([(2, 4, 6, 8), (2, 8)], REGIMES, LOSSES))
def test_all_terms_and_gradients_are_those_of_the_formulas(dims: tuple[int, ...], regime: str, loss: str) -> None:
    compare("complex", True, regime, loss, options(dims=dims, mutual_delta=0.7, mutual_weight=0.4))


@pytest.mark.parametrize(
    ("switched_off", "loss", "scorer"),
    all_pairs(["mutual", "evolution", "dynamic", "all"], LOSSES, ["complex", "transe"]),
)
def test_each_mechanism_can_be_switched_off(switched_off: str, loss: str, scorer: str) -> None:
    names = ("mutual", "evolution", "dynamic") if switched_off == "all" else (switched_off,)
    how = options(**dict.fromkeys(names, False))
    if scorer == "complex":
        compare("complex", True, "batch", loss, how)
    else:
        compare("transe", False, "triple", loss, how, margin=3.0)


@pytest.mark.parametrize("loss", ["softmax", "softplus"])
def test_the_sub_models_weights_can_be_given(loss: str) -> None:
    compare("complex", True, "batch", loss, options(dynamic=False, weights=(3.0, 0.5, 1.5)))


@EVERY_REGIME
def test_small_sub_models_may_have_sharper_logits(regime: str) -> None:
    compare("complex", True, regime, "softmax", options(sharpness=0.7))
    compare("transe", False, regime, "softmax", options(dims=(2, 4, 6, 8), sharpness=0.7), margin=3.0)
    compare("pairre", False, regime, "softmax", options(sharpness=0.7), margin=3.0)


BOTH = [(name, way) for name, scorer in SCORERS.items() for way in (True, False) if way or not scorer.tails_only]


@pytest.mark.parametrize(
    ("which", "regime", "loss", "dims"),
    all_pairs(BOTH, ["all", "chunk", "triple"], ["softmax", "softplus"], [(2, 4, 6, 8), (2, 6, 8)]),
)
def test_every_scorers_crops_score_as_their_formula_does(
    which: tuple[str, bool], regime: str, loss: str, dims: tuple[int, ...]
) -> None:
    scorer, reciprocal = which
    margin = 3.0 if "margin" in SCORERS[scorer].options else None
    compare(scorer, reciprocal, regime, loss, options(dims=dims), margin=margin)


@pytest.mark.parametrize(
    ("dims", "regime", "loss"), all_pairs([(2, 4, 6, 8), (1, 3, 8)], REGIMES, ["softmax", "softplus"])
)
def test_euclidean_distances_are_summed_before_the_root(dims: tuple[int, ...], regime: str, loss: str) -> None:
    compare("transe", True, regime, loss, options(dims=dims), norm=2)


@EVERY_LOSS
def test_the_scores_themselves_can_weigh_the_positives(loss: str) -> None:
    compare("complex", False, "all", loss, options(positives="score"))


@pytest.mark.parametrize(("small", "sharpness"), [(1.0, 0.0), (5.0, 0.0), (5.0, 0.5)])
@pytest.mark.parametrize("name", ["n2", "n3", "dura"])
def test_every_sub_model_has_its_own_regulariser(name: str, small: float, sharpness: float) -> None:
    model, how, input_builder = (
        toy_model(GRAPH, "complex", 8),
        options(small_regulariser=small, sharpness=sharpness),
        toy_inputs(GRAPH, kind="batch"),
    )
    method = Med(model, settings(regulariser=name, weight=0.3), [], how, toy_setup(GRAPH))
    (update,) = method.updates(input_builder.inputs(*input_builder.parts(STEP, 1)))
    queries, naive = spelled_out(input_builder, STEP), NaiveModel(model)
    models = [Cropped(naive, dim) for dim in how.dims]
    shares = torch.tensor(how.dims) / how.dims[-1]
    factors = torch.softmax(method.w[2].detach() * shares, 0) * len(how.dims) * (small + (1 - small) * shares)
    factors *= shares**-sharpness
    alone = [sum(naive_penalty(name, one, query, 0.3, 0.3) for query in queries) / len(queries) for one in models]
    expected = sum(factor * one for factor, one in zip(factors, alone, strict=True))
    torch.testing.assert_close(update.terms[name], expected, rtol=1e-6, atol=0)


# -- on ranks and in blocks -----------------------------------------------------------------------------------------

BLOCKS = ("whole", "queries", "candidates")
SWITCHES = ["", "mutual", "evolution", "dynamic"]
MOVES = ["rows", "queries"]


def config_of(loss: str, regime: str, switched_off: str = "", **more: Any) -> dict[str, Any]:
    """One step of it is the gradient, negated."""
    distill: dict[str, Any] = {"dims": [2, 4, 8], "mutual_delta": 0.7, "mutual_weight": 0.4, "evaluator_lr": 1.0}
    distill |= {switched_off: False} if switched_off else {}
    stage = {"scorer": "complex", "dim": 8, "method": "med", "distill": distill, "negatives": REGIMES[regime]}
    stage |= {"init_scale": 0.8, "batch_size": 12, "optimizer": {"name": "sgd", "lr": 1.0}}
    stage |= {"loss": {"name": loss, "temperature": TEMPERATURE}}
    return {"dtype": "float64", "student": stage | more}


def one_step(ranks: Ranks, config: dict[str, Any]) -> dict[str, Any]:
    """Losses and this rank's share of the gradients of step 0."""
    job = toy_job(config, ranks, Path("/nonexistent"), GRAPH)
    method = job.method
    assert isinstance(method, Med)
    watched = [method.student.entity.weight, method.student.relation, method.u]
    before = [x.detach().clone() for x in watched]
    losses = train_step(job, Progress(), 0)[0]
    job.prefetcher.drop()
    entity, relation, u = (was - now.detach() for was, now in zip(before, watched, strict=True))
    return {"losses": losses, "entity": entity, "relation": relation, "u": u}


def step_on(world: int, config: dict[str, Any], blocks: str) -> list[dict[str, Any]]:
    """`one_step` on all ranks: at once, in query blocks, or in candidate blocks."""
    visits: list[int] = []
    real = query_blocks._number_of_blocks

    def counted(*given: Any) -> int:
        visits.append(1 if blocks == "candidates" else real(*given))
        return visits[-1]

    with (
        patch.object(query_blocks, "_number_of_blocks", counted),
        patch.object(query_blocks, "numbers_at_once", lambda n, _: 1 if blocks == "queries" else n),
        patch.dict(query_blocks._NUMBERS, {"cpu": 50}),
        patch.object(query_blocks, "_FEWEST_QUERIES", 1),
        patch.object(candidate_layout, "numbers_at_once", lambda n, _: 300 if blocks == "candidates" else n),
        patch.object(candidate_layout, "_NARROWEST", 2),
    ):
        found = run_on_threads(world, one_step, config=config)
    assert (max(visits) > 1) == (blocks == "queries")
    return found


@pytest.mark.parametrize(
    ("regime", "loss", "world", "move", "blocks"),
    all_pairs(REGIMES, ["softmax", "softplus", "self_adversarial"], [1, 3], MOVES, BLOCKS),
)
def test_on_any_number_of_ranks_in_blocks_or_not_a_step_is_that_of_the_formula(
    regime: str, loss: str, world: int, move: str, blocks: str
) -> None:
    config = config_of(loss, regime, move=move)
    job = toy_job(config, Ranks(), Path("/nonexistent"), GRAPH)
    assert isinstance(job.method, Med)
    naive, u = NaiveModel(job.method.student), job.method.u.detach().clone().requires_grad_(True)
    torch.testing.assert_close(job.method.w.detach(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    how = job.method.settings
    expected = naive_terms(naive, spelled_out(job.input_builder, 0), how, bounded(how, u), loss)
    sum(expected.values()).backward()
    assert naive.entity.grad is not None and u.grad is not None
    found = step_on(world, config, blocks)
    for name, value in expected.items():
        assert found[0]["losses"][name] == pytest.approx(float(value.detach()), rel=1e-9)
    entity = torch.cat([one["entity"] for one in found])
    torch.testing.assert_close(entity, naive.entity.grad, rtol=1e-9, atol=1e-11)
    for one in found:
        torch.testing.assert_close(one["relation"], naive.relation.grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(one["u"], u.grad, rtol=1e-9, atol=1e-11)


def assert_close_in_float32(found: list[dict[str, Any]], exact: dict[str, Any]) -> None:
    assert found[0]["losses"] == pytest.approx(exact["losses"], rel=1e-5)
    entity = torch.cat([one["entity"] for one in found])
    torch.testing.assert_close(entity.double(), exact["entity"], rtol=1e-3, atol=1e-4)
    for name in ("relation", "u"):
        torch.testing.assert_close(found[-1][name].double(), exact[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "switched_off", "loss", "blocks", "move", "world"),
    all_pairs(["batch", "all"], SWITCHES, ["softmax", "softplus", "bce"], BLOCKS, MOVES, [1, 3]),
)
def test_products_that_are_never_made_have_the_losses_and_gradients_of_those_that_are(
    kind: str, switched_off: str, loss: str, blocks: str, move: str, world: int
) -> None:
    if not nested_products.available(torch.zeros(1, 1)):
        pytest.skip("no C++ compiler here")
    exact = config_of(loss, kind, switched_off, move=move)
    exact["student"]["distill"]["dims"] = [2, 4, 6, 8]  # of equal width
    if loss == "softmax":
        exact["student"]["distill"] |= {"sharpness": 0.6}
    made = step_on(1, exact, "whole")[0]
    with patch.object(nested_products, "_call", wraps=nested_products._call) as calls:
        unmade = step_on(world, exact | {"dtype": "float32"}, blocks)
    assert calls.call_count >= 3
    assert_close_in_float32(unmade, made)


@pytest.mark.parametrize(
    ("regime", "switched_off", "loss", "blocks"),
    all_pairs(REGIMES, SWITCHES, ["softmax", "softplus", "bce"], BLOCKS),
)
def test_the_kernel_does_in_float32_what_plain_torch_does_in_float64(
    regime: str, switched_off: str, loss: str, blocks: str
) -> None:
    exact = config_of(loss, regime, switched_off, scorer="transe", margin=3.0)
    if loss == "softmax":
        exact["student"]["distill"] |= {"sharpness": 0.6}
    if not nested.available(torch.zeros(1, 1, 1)):
        pytest.skip("no C++ compiler here")
    with patch.object(nested, "available", lambda b: False):
        slow = step_on(1, exact, blocks)[0]
    with patch.object(nested, "_call", wraps=nested._call) as calls:
        fast = step_on(1, exact | {"dtype": "float32"}, blocks)
    assert calls.call_count >= 2
    assert_close_in_float32(fast, slow)


@pytest.mark.parametrize("mutual", [True, False])
def test_nothing_of_a_block_is_kept_when_its_losses_have_asked(mutual: bool) -> None:
    model = toy_model(GRAPH, "complex", 8)
    method = Med(model, settings(), [], options(mutual=mutual), toy_setup(GRAPH))
    sums, block = _Sums(method, method.w), torch.rand(3, 5, 7, dtype=torch.float64)
    asked = {**sums.evolution(block), **(sums.mutual(block) if mutual else {})}
    assert set(asked) == ({"lse", "gap", "count"} if mutual else {"lse"})
    gone = weakref.ref(block)
    del block, asked
    assert gone() is None


def test_sharper_logits_are_of_a_softmax() -> None:
    stage: dict[str, Any] = {"dim": 8, "method": "med", "loss": {"name": "softplus"}}
    with pytest.raises(ConfigError, match=r"distill\.sharpness: 0\.5 is of loss softmax, not of softplus; set it to 0"):
        parse_config({"student": stage | {"distill": {"sharpness": 0.5}}}, "test")


def test_weights_are_one_for_each_sub_model_and_not_dynamic() -> None:
    stage: dict[str, Any] = {"dim": 8, "method": "med"}
    with pytest.raises(ConfigError, match=r"weights replace the dynamic ones; set dynamic: false"):
        parse_config({"student": stage | {"distill": {"dims": [4, 8], "weights": [1, 2]}}}, "test")
    with pytest.raises(ConfigError, match=r"distill\.weights has 3 numbers; it must have one for each of 2 dims"):
        parse_config({"student": stage | {"distill": {"dims": [4, 8], "dynamic": False, "weights": [1, 2, 3]}}}, "test")
