"""DDP and DeepSpeed train the same model, at any ZeRO stage and number of ranks, and resume each other's runs."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.config.run_options import EngineConfig
from distkgd.errors import ConfigError
from distkgd.methods import METHODS
from distkgd.pipeline.config import parse_config
from tests.invariants.test_resume import stop_only, train_with_stops
from tests.invariants.test_resume import student as resumable
from tests.invariants.test_world_size import METHOD_OPTIONS, REGIMES, assert_same, merged, student
from tests.ranks import run_on_ranks
from tests.toys import train_some

pytest.importorskip("deepspeed", reason="pip install 'distkgd[deepspeed]'")

STAGES = [EngineConfig(name="deepspeed", zero=zero).model_dump() for zero in range(4)]


def of_stage(engine: dict[str, Any]) -> str:
    return f"zero {engine['zero']}" if engine["name"] == "deepspeed" else "ddp"


@pytest.mark.parametrize("engine", STAGES, ids=of_stage)
@pytest.mark.parametrize("method", METHODS)
def test_deepspeed_has_the_losses_and_rows_of_ddp(method: str, engine: dict[str, Any]) -> None:
    for config, ddp in by_ddp(method):
        many = run_on_ranks(2, train_some, config=config | {"engine": engine}, steps=14)
        assert_same([ddp], many, 1e-3, 1e-4)


@cache
def by_ddp(method: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Configs of a method, and what two ranks of DDP make of each."""
    configs = [{"student": student(method, options, REGIMES["triple"])} for options in METHOD_OPTIONS[method]]
    return [(config, merged(run_on_ranks(2, train_some, config=config, steps=14))) for config in configs]


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("engine", STAGES, ids=of_stage)
def test_every_optimiser_of_deepspeed_is_ours(name: str, engine: dict[str, Any]) -> None:
    more = {"optimizer": {"name": name, "lr": 0.05, "relation_lr": 0.02}}
    config = {"student": student("bkd", {}, REGIMES["batch"], **more)}
    ddp = run_on_ranks(2, train_some, config=config, steps=14)
    assert_same([merged(ddp)], run_on_ranks(2, train_some, config=config | {"engine": engine}, steps=14), 1e-3, 1e-4)


@pytest.mark.parametrize("regime", REGIMES)
def test_deepspeed_trains_the_same_on_one_two_and_three_ranks(regime: str) -> None:
    config = {"student": student("dualde", METHOD_OPTIONS["dualde"][0], REGIMES[regime])}
    one = run_on_ranks(1, train_some, config=config, steps=14)
    for world in (1, 2, 3):
        many = run_on_ranks(world, train_some, config=config | {"engine": STAGES[2]}, steps=14)
        assert_same(one, many, rows=1e-3, losses=1e-4)


def test_a_batch_in_four_parts_is_the_whole_batch_under_deepspeed() -> None:
    whole = {"student": student("bkd", {}, REGIMES["chunk"], batch_size=48), "engine": STAGES[2]}
    parts = {"student": student("bkd", {}, REGIMES["chunk"], batch_size=48, accumulate=4), "engine": STAGES[2]}
    one = run_on_ranks(2, train_some, config=whole, steps=10)
    assert_same([merged(one)], run_on_ranks(2, train_some, config=parts, steps=10), rows=1e-4, losses=1e-4)


@pytest.mark.parametrize("zero", range(4))
def test_stop_and_resume_is_uninterrupted_bit_for_bit_under_deepspeed(zero: int, tmp_path: Path) -> None:
    config = resumable("dualde", "triple") | {"engine": STAGES[zero]}
    whole = run_on_ranks(2, train_with_stops, config=config, folder=str(tmp_path / "whole"))
    stopped = run_on_ranks(2, train_with_stops, config=config, folder=str(tmp_path / "stopped"), stops=(7, 29))
    for one, other in zip(whole, stopped, strict=True):
        assert torch.equal(one["rows"], other["rows"]) and torch.equal(one["relation"], other["relation"])


@pytest.mark.parametrize(
    ("first", "then"),
    [((1, None), (3, 3)), ((3, 2), (2, None)), ((2, 3), (1, 1)), ((2, 0), (3, 2))],
    ids=lambda side: f"{side[0]} ranks {'ddp' if side[1] is None else f'zero {side[1]}'}",
)
def test_a_run_goes_on_under_another_engine_on_another_number_of_ranks(
    first: tuple[int, int | None], then: tuple[int, int | None], tmp_path: Path
) -> None:
    def config(zero: int | None) -> dict[str, Any]:
        return resumable("bkd", "all") | ({} if zero is None else {"engine": STAGES[zero]})

    (whole,) = run_on_ranks(1, train_with_stops, config=config(None), folder=str(tmp_path / "whole"))
    folder = str(tmp_path / "changed")
    run_on_ranks(first[0], stop_only, config=config(first[1]), folder=folder, stop=22)
    many = run_on_ranks(then[0], train_with_stops, config=config(then[1]), folder=folder)
    torch.testing.assert_close(torch.cat([rank["rows"] for rank in many]), whole["rows"], rtol=0, atol=1e-3)
    assert many[0]["valid"] == pytest.approx(whole["valid"], abs=2e-3, rel=2e-3)


def test_an_engine_may_be_named_alone_and_zero_belongs_to_deepspeed() -> None:
    assert parse_config({"engine": "deepspeed"}, "test").engine == EngineConfig(name="deepspeed")
    with pytest.raises(ConfigError, match=r"zero: 2 is a stage of DeepSpeed; use name: deepspeed"):
        parse_config({"engine": {"zero": 2}}, "test")
