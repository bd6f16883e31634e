"""Mutual learning against its formulas, spelled out for one query at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.methods.dml import Dml
from distkgd.pipeline.config import parse_config
from distkgd.training.job import Progress, restore, write
from distkgd.training.loop import train_step
from tests.jobs import NaiveModel
from tests.methods.steps import (
    GRAPH,
    REGIMES,
    Naive,
    Sharding,
    assert_step_is,
    cross_entropy,
    kl,
    learned,
    over_shardings,
    plain_sgd,
)
from tests.toys import toy_job


def one_side(naive: Naive, own: NaiveModel, other: NaiveModel, options: dict[str, Any]) -> dict[str, Tensor]:
    """DML[student] with own = student, DML[peer] with own = peer; the other's scores are given."""

    def soft(query: Any) -> Tensor:
        everyone = [query.answer, *query.negatives]
        theirs = other.scores(query, everyone).detach()
        return kl(theirs, own.scores(query, everyone), options.get("temperature", 1.0))

    out = {"soft": options.get("weight", 1.0) * naive.mean(soft)}
    if options.get("hard_weight", 1.0):
        out["hard"] = options.get("hard_weight", 1.0) * naive.mean(lambda query: cross_entropy(own, query))
    return out


def terms(naive: Naive, options: dict[str, Any]) -> dict[str, Tensor]:
    student, peer = naive.models["student"], naive.models["peer"]
    sides = [("", one_side(naive, student, peer, options)), ("peer_", one_side(naive, peer, student, options))]
    return {f"{tag}{name}": value for tag, side in sides for name, value in side.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighed": {"weight": 0.7, "hard_weight": 0.3, "temperature": 2.0, "peer_dim": 10},
    "soft alone": {"hard_weight": 0.0},
}


@over_shardings("variant regime", VARIANTS, REGIMES)
def test_each_model_learns_the_labels_and_the_others_distribution(
    variant: str, regime: str, sharding: Sharding
) -> None:
    options = VARIANTS[variant]
    assert_step_is(plain_sgd("dml", options, regime), lambda naive: terms(naive, options), sharding)


def test_the_peer_has_its_own_dim_and_starts_from_numbers_of_its_own(tmp_path: Any) -> None:
    same = toy_job(plain_sgd("dml", {}, "all"), Ranks(), tmp_path, GRAPH).method
    wide = toy_job(plain_sgd("dml", {"peer_dim": 10}, "all"), Ranks(), tmp_path, GRAPH).method
    assert isinstance(same, Dml) and isinstance(wide, Dml)
    assert same.peer.entity.dim == 6 and wide.peer.entity.dim == 10
    assert not torch.isclose(same.peer.entity.weight, same.student.entity.weight).any()
    assert not torch.isclose(same.peer.relation, same.student.relation).any()
    assert wide.output_model is wide.student


def test_a_checkpoint_holds_the_peer_and_its_optimiser(tmp_path: Any) -> None:
    config = plain_sgd("dml", {"peer_dim": 10}, "all", optimizer={"name": "adam", "lr": 0.05})

    def steps(job: Any, start: int, stop: int) -> dict[str, Tensor]:
        for step in range(start, stop):
            train_step(job, Progress(step=step), 0)
        job.prefetcher.drop()
        return learned(job)

    whole = steps(toy_job(config, Ranks(), tmp_path / "whole", GRAPH), 0, 6)
    first = toy_job(config, Ranks(), tmp_path / "cut", GRAPH)
    steps(first, 0, 3)
    with first.writer:
        write(first, Progress(step=3))
        first.writer.wait()
    second = toy_job(config, Ranks(), tmp_path / "cut", GRAPH)
    assert restore(second).step == 3
    rest = steps(second, 3, 6)
    assert {"peer.entity", "peer.relation"} <= rest.keys() == whole.keys()
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())


def test_a_teacher_and_an_impossible_peer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.method is dml, which has none"):
        parse_config({"teacher": "somewhere", "student": {"method": "dml"}}, "test")
    with pytest.raises(ConfigError, match=r"distill\.peer_dim: complex: dim=7"):
        parse_config({"student": {"method": "dml", "distill": {"peer_dim": 7}}}, "test")
