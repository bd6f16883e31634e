"""Direct training: the hard loss and its regulariser, and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.common.random import Stream
from distkgd.distributed.ranks import Ranks
from distkgd.methods import MethodSettings, TaskLoss
from distkgd.methods.scratch import Scratch
from distkgd.scorers.rescal import Rescal
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.invariants.test_world_size import assert_same
from tests.jobs import NaiveModel, assert_same_gradients, spelled_out, toy_inputs, toy_model, toy_setup
from tests.methods.steps import Naive, Sharding, assert_step_is, plain_sgd
from tests.ranks import run_on_threads
from tests.toys import toy_graph, toy_job, train_some

GRAPH = toy_graph(entities=15, relations=3, triples=130)
STEP = 1


def settings(**more: Any) -> TaskLoss:
    plain = dict(loss="bce", temperature=1.0, margin=1.0, label_smoothing=0.0, regulariser="none", weight=0.0)
    plain |= dict(relation_weight=None, dropout=0.0, relation_dropout=0.0, bf16=False)
    return TaskLoss(**(plain | more))


@pytest.mark.parametrize("regulariser", ["none", "n2"])
def test_the_only_update_is_the_students_on_the_hard_loss_and_the_regulariser(regulariser: str) -> None:
    model = toy_model(GRAPH)
    naive = NaiveModel(model)
    input_builder = toy_inputs(GRAPH, kind="batch", filtered=True)
    method = Scratch(model, settings(regulariser=regulariser, weight=0.1), [], MethodSettings(), toy_setup(GRAPH))
    (update,) = method.updates(input_builder.inputs(*input_builder.parts(STEP, 1)))
    hard, penalty = [], []
    for query in spelled_out(input_builder, STEP):
        h, t = naive.head_tail(query, [query.answer])
        positive, negatives = torch.sigmoid(naive.own(query)), torch.sigmoid(naive.others(query))
        hard.append(-torch.log(positive) - torch.log(1.0 - negatives).sum())
        penalty.append(0.1 * (h.square().sum() + t.square().sum() + naive.relation_row(query).square().sum()))
    expected = {"hard": torch.stack(hard).mean()}
    if regulariser != "none":
        expected["n2"] = torch.stack(penalty).mean()
    assert update.groups == {"student"} and update.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(update.terms[name], value)
    sum(update.terms.values()).backward()
    sum(expected.values()).backward()
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("option", ["dropout", "relation_dropout", "bf16"])
def test_each_option_of_the_view_changes_the_loss(option: str) -> None:
    input_builder = toy_inputs(GRAPH, kind="all")
    inputs = input_builder.inputs(*input_builder.parts(STEP, 1))
    values = []
    for more in ({}, {option: True if option == "bf16" else 0.4}):
        (update,) = Scratch(toy_model(GRAPH), settings(**more), [], MethodSettings(), toy_setup(GRAPH)).updates(inputs)
        values.append(float(update.terms["hard"].detach()))
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.5)


def test_dropout_keeps_the_mean_of_a_row_and_changes_with_the_step() -> None:
    input_builder = toy_inputs(GRAPH, kind="all", batch_size=90)
    method = Scratch(toy_model(GRAPH, dim=64), settings(dropout=0.25), [], MethodSettings(), toy_setup(GRAPH))
    masks = []
    for step in (0, 1):
        view = method.task.view(method.student, input_builder.inputs(*input_builder.parts(step, 1)), grad=True)
        factor = view.negatives.queries.reshape(180, 32, 2).square().sum(-1).sqrt()
        masks.append((factor == 0).double())
    # Both parts of a complex coordinate vanish together by chance only.
    assert masks[0].mean() == pytest.approx(0.25**2, abs=0.02)
    assert not torch.equal(*masks)
    silent = method.task.view(method.student, input_builder.inputs(*input_builder.parts(0, 1)), grad=False)
    assert (silent.negatives.queries != 0).all()


def test_training_lowers_the_loss(tmp_path: Any) -> None:
    student = {"dim": 8, "batch_size": 32, "negatives": {"kind": "all"}, "optimizer": {"name": "adagrad", "lr": 0.3}}
    job = toy_job({"student": student}, Ranks(), tmp_path, GRAPH)
    losses = [train_step(job, Progress(step=step), 0)[0]["hard"] for step in range(60)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


REGIMES: dict[str, dict[str, Any]] = {
    "all": {"kind": "all"},
    "batch": {"kind": "batch", "num": 2},
    "chunk": {"kind": "chunk", "num": 5, "chunk": 2, "filtered": True},
    "triple": {"kind": "triple", "num": 5, "filtered": True},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_a_rank_without_triples_or_candidates_of_its_own_trains_along(regime: str) -> None:
    student = {"dim": 4, "batch_size": 2, "negatives": REGIMES[regime], "loss": {"name": "softmax"}}
    config = {"dtype": "float64", "student": student}
    alone = train_some(Ranks(), config=config, steps=4)
    parts = run_on_threads(3, train_some, config=config, steps=4)
    rows = torch.cat([part["tables"]["student"] for part in parts])
    torch.testing.assert_close(rows, alone["tables"]["student"], rtol=0, atol=1e-9)
    torch.testing.assert_close(parts[0]["tensors"]["student.relation"], alone["tensors"]["student.relation"])


@pytest.mark.parametrize("sharding", [(1, "rows", None), (1, "rows", 20), (2, "rows", None), (3, "rows", None)])
@pytest.mark.parametrize("anchors", [1, 3, 6])
def test_drawn_anchors_meet_their_part_of_the_candidates(anchors: int, sharding: Sharding) -> None:
    config = plain_sgd("scratch", {}, "triple", loss={"name": "bce"})
    config["student"]["negatives"] = {"kind": "triple", "num": 6, "anchors": anchors}

    def formula(naive: Naive) -> dict[str, Tensor]:
        student, sampler = naive.models["student"], naive.job.input_builder.sampler

        def loss(place: int) -> Tensor:
            query = naive.asked[place]
            drawn = sampler.negatives(naive.step, anchors, place, 1, stream=Stream.NEGATIVE_ANCHORS)[0].tolist()
            candidates = sampler.negatives(naive.step, 6, place, 1)[0].split(6 // anchors)
            pairs = zip(drawn, candidates, strict=True)
            z = [student.scores(replace(query, anchor=anchor), part.tolist()) for anchor, part in pairs]
            return F.softplus(-student.own(query)) + F.softplus(torch.cat(z)).sum()

        return {"hard": torch.stack([loss(place) for place in range(len(naive.asked))]).mean()}

    assert_step_is(config, formula, sharding)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("penalty", ["dura", "n3"])
def test_steps_by_listed_relations_are_those_by_copies(
    bits: int, penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage: dict[str, Any] = {"scorer": "rescal", "reciprocal": True, "dim": 4, "batch_size": 48, "dropout": 0.1}
    stage |= {"regulariser": {"name": penalty, "weight": 0.1}, "negatives": {"kind": "all"}, "bits": bits}
    stage |= {"loss": {"name": "softmax"}, "optimizer": {"name": "adagrad", "lr": 0.1}, "relation_bits": bits}
    config = {"dtype": "float64", "student": stage}
    listed = train_some(Ranks(), config, steps=4)
    (two, other) = run_on_threads(2, train_some, config=config, steps=4)
    monkeypatch.setattr(Rescal, "lists_relations", False)
    copied = train_some(Ranks(), config, steps=4)
    assert_same([copied], [listed], rows=1e-9, losses=1e-9)
    assert_same([copied], [two, other], rows=1e-9, losses=1e-9)
