"""DDP and DeepSpeed train the same model, at any ZeRO stage and number of ranks, and resume each other's runs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.config.run_options import EngineConfig
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.methods import METHODS
from distkgd.pipeline.config import parse_config
from tests.invariants.test_resume import stop_in, train_stopped, train_with_stops
from tests.invariants.test_resume import student as resumable
from tests.invariants.test_world_size import (
    METHOD_OPTIONS,
    REGIMES,
    STEPS,
    VARIANTS,
    Variant,
    assert_same,
    merged,
    student,
    variant_name,
)
from tests.ranks import run_on_ranks, run_on_threads
from tests.toys import train_some

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install 'distkgd[deepspeed]'")

STAGES = [EngineConfig(name="deepspeed", zero=zero).model_dump() for zero in range(4)]
# Every method with all its options and two stages of ZeRO or more, every stage with four of these or more. How the
# engine steps, with every optimiser in every stage, is in tests/distributed/optim/test_dense.py.
CASES = [(variant, i % 4) for i, variant in enumerate(VARIANTS)]
CASES += [(variant, (zero + 2) % 4) for variant, zero in CASES if len(METHOD_OPTIONS[variant[0]]) == 1]


def test_every_method_is_trained_in_two_stages_or_more() -> None:
    assert all(len({zero for variant, zero in CASES if variant[0] == method}) > 1 for method in METHODS)


@pytest.mark.parametrize(("variant", "zero"), CASES, ids=variant_name)
def test_deepspeed_has_the_losses_and_rows_of_ddp(variant: Variant, zero: int) -> None:
    # Of more triples in a batch, float32 rounds more.
    config = {"student": student(*variant, REGIMES["triple"], batch_size=24)}
    ddp = merged(run_on_threads(2, train_some, config=config, steps=STEPS))
    many = run_on_ranks(2, train_some, config=config | {"engine": STAGES[zero]}, steps=STEPS)
    assert_same([ddp], many, 1e-3, 1e-4)


@pytest.mark.parametrize(("name", "zero"), [("sgd", 0), ("adagrad", 1), ("adam", 2), ("adam", 3)])
def test_every_optimiser_of_deepspeed_is_ours(name: str, zero: int) -> None:
    more = {"optimizer": {"name": name, "lr": 0.05, "relation_lr": 0.02}}
    config = {"student": student("bkd", {}, REGIMES["batch"], **more)}
    ddp = merged(run_on_threads(2, train_some, config=config, steps=6))
    many = run_on_ranks(2, train_some, config=config | {"engine": STAGES[zero]}, steps=6)
    assert_same([ddp], many, 1e-3, 1e-4)


@pytest.mark.parametrize(("regime", "world"), [("triple", 3), ("chunk", 1), ("batch", 3), ("all", 1)])
def test_deepspeed_trains_the_same_on_any_number_of_ranks(regime: str, world: int) -> None:
    config = {"student": student("dualde", METHOD_OPTIONS["dualde"][0], REGIMES[regime])}
    one = run_on_threads(1, train_some, config=config, steps=STEPS)
    many = run_on_ranks(world, train_some, config=config | {"engine": STAGES[2]}, steps=STEPS)
    assert_same(one, many, rows=1e-3, losses=1e-4)


def test_a_batch_in_four_parts_is_the_whole_batch_under_deepspeed() -> None:
    whole = {"student": student("bkd", {}, REGIMES["chunk"], batch_size=48), "engine": STAGES[2]}
    parts = {"student": student("bkd", {}, REGIMES["chunk"], batch_size=48, accumulate=4), "engine": STAGES[2]}
    one = run_on_ranks(2, train_some, config=whole, steps=4)
    assert_same([merged(one)], run_on_ranks(2, train_some, config=parts, steps=4), rows=1e-4, losses=1e-4)


@pytest.mark.parametrize("zero", range(4))
def test_stop_and_resume_is_uninterrupted_bit_for_bit_under_deepspeed(zero: int, tmp_path: Path) -> None:
    more = {"epochs": 1, "distill": {"stage_two": {"start": 1, "epochs": 1}}}
    config = resumable("dualde", "triple", **more) | {"engine": STAGES[zero]}
    whole, stopped = (
        run_on_ranks(2, train_stopped, config=config, folder=str(tmp_path / str(stops)), stops=stops, rank=0)
        for stops in ((), (7, 16))
    )
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
        return resumable("bkd", "all", epochs=2) | ({} if zero is None else {"engine": STAGES[zero]})

    whole = train_with_stops(Ranks(), config(None), str(tmp_path / "whole"))
    folder = str(tmp_path / "changed")
    run_on_ranks(first[0], stop_in, config=config(first[1]), folder=folder, step=13)
    many = run_on_ranks(then[0], train_with_stops, config=config(then[1]), folder=folder)
    torch.testing.assert_close(torch.cat([rank["rows"] for rank in many]), whole["rows"], rtol=0, atol=1e-3)
    assert many[0]["valid"] == pytest.approx(whole["valid"], abs=2e-3, rel=2e-3)


def test_an_engine_may_be_named_alone_and_zero_belongs_to_deepspeed() -> None:
    assert parse_config({"engine": "deepspeed"}, "test").engine == EngineConfig(name="deepspeed")
    with pytest.raises(ConfigError, match=r"zero: 2 is a stage of DeepSpeed; use name: deepspeed"):
        parse_config({"engine": {"zero": 2}}, "test")
