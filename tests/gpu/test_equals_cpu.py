"""Three training steps and a validation on the pretend GPU are those on the CPU, whatever is trained and however."""

from typing import Any

import pytest

from distkgd.config.stage import LossConfig, OptimizerConfig, RegulariserConfig
from distkgd.config.tree import merge
from distkgd.methods import METHODS
from distkgd.scorers import SCORERS
from tests.covering import all_pairs
from tests.gpu.equals import both, both_shipped
from tests.gpu.shipped import shipped_stages
from tests.invariants.test_options import CASES, with_option
from tests.invariants.test_world_size import REGIMES, VARIANTS, assert_same, student, variant_name
from tests.ranks import run_on_ranks

LOSSES = LossConfig.model_fields["name"].annotation.__args__
OPTIMISERS = OptimizerConfig.model_fields["name"].annotation.__args__
REGULARISERS = set(RegulariserConfig.model_fields["name"].annotation.__args__) - {"dura"}  # refused of most scorers
# Options of the stage itself, and those values that change what runs.
OPTIONS = [
    (name, value)
    for name, case in CASES.items()
    if name.partition(".")[0] not in METHODS and name not in ("scorer", "method")
    for value in case.values
]
SHIPPED = shipped_stages()
# Where all candidates lie on one side of a query's coordinate, the gradient of a softmax over distances is 0 there, and
# with it of the relation's number: p sums to 1. Rounding leaves some 1e-17 of it (1e-9 in float32), and Adagrad's first
# step divides that by itself and 1e-10: it moves by 1e-7 (by the whole rate in float32) up or down, on any device.
ROWS = 1e-6
# Products in bfloat16 are rounded by one device after another number of them has been added up.
ROUGH = ("bf16", "row_dtype")


def assert_equal(config: dict[str, Any], rows: float = ROWS, losses: float = 1e-9) -> None:
    [(one, two)] = run_on_ranks(1, both, pretend=True, config=config)
    assert_same([one], [two], rows=rows, losses=losses)
    assert two["valid"] == pytest.approx(one["valid"], abs=losses)


@pytest.mark.parametrize(("variant", "regime"), all_pairs(VARIANTS, REGIMES), ids=variant_name)
def test_every_method_on_the_device_is_that_on_the_cpu(variant: tuple[str, dict[str, Any]], regime: str) -> None:
    assert_equal({"dtype": "float64", "student": student(*variant, REGIMES[regime])})


@pytest.mark.parametrize(
    ("scorer", "regime", "loss", "optimiser", "regulariser"),
    all_pairs(SCORERS, REGIMES, LOSSES, OPTIMISERS, sorted(REGULARISERS)),
)
def test_every_scorer_and_loss_on_the_device_is_that_on_the_cpu(
    scorer: str, regime: str, loss: str, optimiser: str, regulariser: str
) -> None:
    more = {"scorer": scorer, "loss": {"name": loss}, "optimizer": {"name": optimiser, "lr": 0.05}}
    more |= {"regulariser": {"name": regulariser, "weight": 0.01 if regulariser != "none" else 0.0}}
    assert_equal({"dtype": "float64", "student": student("scratch", {}, REGIMES[regime], **more)})


@pytest.mark.parametrize(("name", "value"), OPTIONS, ids=str)
def test_every_option_on_the_device_is_that_on_the_cpu(name: str, value: Any) -> None:
    stage = merge(with_option(CASES[name], name, value), {"epochs": 9, "validate_every": 1})
    rough = {"rows": 1e-2, "losses": 1e-2} if name in ROUGH else {}
    assert_equal({"dtype": "float64", "student": stage}, **rough)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_stage_on_the_device_is_that_on_the_cpu(name: str) -> None:
    [(one, two)] = run_on_ranks(1, both_shipped, pretend=True, **SHIPPED[name])
    assert_same([one], [two], rows=ROWS, losses=1e-9)


@pytest.mark.parametrize("scorer", ["pairre", "transe"])
def test_in_float32_the_device_moves_rows_as_the_cpu_does(scorer: str) -> None:
    more = {"scorer": scorer, "optimizer": {"name": "sgd", "lr": 0.1}}
    assert_equal({"student": student("scratch", {}, REGIMES["all"], **more)}, rows=1e-5, losses=1e-4)
