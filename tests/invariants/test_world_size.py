"""Invariants 1 and 4: one, two, three and 64 ranks train the same model, whatever travels, in blocks, or in parts.

Three ranks imply two where numbers are exact enough; some of two, and some of ranks that are processes, stand beside.
"""

from typing import Any

import pytest
import torch

from distkgd.config.stage import OptimizerConfig
from distkgd.methods import METHODS
from distkgd.scorers import SCORERS
from tests.covering import all_pairs
from tests.ranks import run_on_ranks, run_on_threads
from tests.toys import in_blocks, train_some

STEPS = 9  # DualDE begins its second stage with the seventh, and all a second epoch

SAMPLED = {"kind": "triple", "num": 7, "sides": "bernoulli", "filtered": True}
CHUNKED = {"kind": "chunk", "num": 9, "chunk": 4, "sides": "uniform"}
SHARED = {"kind": "batch", "num": 20}
EVERY = {"kind": "all"}
REGIMES = {"triple": SAMPLED, "chunk": CHUNKED, "batch": SHARED, "all": EVERY}
METHOD_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "scratch": [{}],
    "bkd": [{"temperature": 2.0}, {"temperature": 2.0, "divergence": "js"}],
    "dualde": [
        {"stage_two": {"start": 2, "epochs": 9}},
        {"stage_two": {"start": 2, "epochs": 9}, "soft": "kl", "stop_opposite": True},
    ],
    "med": [{"evaluator_lr": 0.1}, {"dims": [2, 8], "positives": "score", "mutual_delta": 0.3}],
    "metasd": [
        {"prune": {"rate": 0.5, "every": 4}, "reverse_kl": 0.5, "meta_lr": 1.0, "meta_optimizer": "sgd"},
        {"prune": {"rate": 0.5, "scope": "column"}, "relation_weight": 0.5, "meta": False},
        {"prune": {"rate": 0.5, "scope": "row", "ramp": 1}, "teacher_reverse_kl": 0.5, "meta_lr": 0.1},
    ],
    "mulde": [{"temperature": 2.0}, {"relation_scaling": False, "contrast_attention": False}],
    "dml": [{"temperature": 2.0, "peer_dim": 12}],
    "rkd": [{"group": 4}, {"group": 4, "vectors": "query", "angle_weight": 0.5}],
    "iterde": [
        {"schedule": "constant", "k": 0.5},
        {"p": 0.5, "soft": "kl"},
        {"schedule": "two_phase", "k": 0.5},
    ],
}


def student(method: str, options: dict[str, Any], regime: dict[str, Any], **more: Any) -> dict[str, Any]:
    loss = {"name": "softmax" if regime["kind"] in ("all", "batch") else "self_adversarial"}
    base = {"scorer": "complex", "dim": 8, "batch_size": 48, "loss": loss, "dropout": 0.1}
    base |= {"optimizer": {"name": "adagrad", "lr": 0.1, "clip": 3.0}, "regulariser": {"name": "n3", "weight": 0.01}}
    return base | {"method": method, "distill": options, "negatives": regime} | more


def assert_same(one: list[dict[str, Any]], many: list[dict[str, Any]], rows: float, losses: float) -> None:
    for rank in many:
        for mine, theirs in zip(rank["losses"], one[0]["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=losses, abs=losses)
        for name, tensor in rank["tensors"].items():
            torch.testing.assert_close(tensor, one[0]["tensors"][name], rtol=0, atol=rows)
    for group, table in one[0]["tables"].items():
        torch.testing.assert_close(torch.cat([r["tables"][group] for r in many]), table, rtol=0, atol=rows)


Variant = tuple[str, dict[str, Any]]  # a method and its options
VARIANTS: list[Variant] = [(method, options) for method, variants in METHOD_OPTIONS.items() for options in variants]


def variant_name(value: Any) -> str | None:
    """The name of one of `VARIANTS`: its method, and which of the method's options."""
    if value not in VARIANTS:
        return None
    method, options = value
    return f"{method}-{METHOD_OPTIONS[method].index(options)}"


@pytest.mark.parametrize(
    ("variant", "regime", "move", "at_once", "one_too"),
    all_pairs(VARIANTS, REGIMES, ["rows", "queries"], [None, 150], [True, False]),
    ids=variant_name,
)
def test_any_number_of_ranks_whatever_travels_in_blocks_or_not_trains_the_same_rows_in_float64(
    variant: Variant, regime: str, move: str, at_once: int | None, one_too: bool
) -> None:
    config = {"dtype": "float64", "student": student(*variant, REGIMES[regime])}
    one = run_on_threads(1, train_some, config=config, steps=STEPS)
    assert one[0]["epoch"] > 0, "what grows with the epochs has not begun to"
    moved = config | {"student": config["student"] | {"move": move}}
    with in_blocks(at_once):
        for world in (1, 3) if one_too else (3,):
            assert_same(one, run_on_threads(world, train_some, config=moved, steps=STEPS), rows=1e-9, losses=1e-9)


@pytest.mark.parametrize(("method", "regime", "world"), all_pairs(METHODS, ["triple", "all"], [2, 3]))
def test_any_number_of_ranks_has_the_same_losses_in_float32(method: str, regime: str, world: int) -> None:
    # Of more triples in a batch, float32 rounds more.
    config = {"student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime], batch_size=24)}
    one = run_on_threads(1, train_some, config=config, steps=STEPS)
    many = run_on_threads(world, train_some, config=config, steps=STEPS)
    assert_same(one, many, rows=1e-3, losses=1e-4)
    for rank in many:
        assert rank["valid"] == pytest.approx(one[0]["valid"], abs=2e-3, rel=2e-3)


@pytest.mark.parametrize(
    ("method", "regime", "world"),
    [("dualde", "triple", 2), ("metasd", "chunk", 2), ("med", "batch", 3), ("rkd", "all", 3)],
)
def test_ranks_that_are_processes_train_the_same_rows(method: str, regime: str, world: int) -> None:
    config = {"dtype": "float64", "student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime])}
    one = run_on_threads(1, train_some, config=config, steps=STEPS)
    assert_same(one, run_on_ranks(world, train_some, config=config, steps=STEPS), rows=1e-9, losses=1e-9)


@pytest.mark.parametrize(
    ("method", "regime", "move"),
    [
        ("scratch", "triple", "rows"),
        ("bkd", "all", "queries"),
        ("dualde", "batch", "rows"),
        ("metasd", "chunk", "rows"),
    ],
)
def test_sixty_four_ranks_of_which_some_hold_nothing_train_the_same_rows(method: str, regime: str, move: str) -> None:
    config = {"dtype": "float64", "student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime])}
    one = run_on_threads(1, train_some, config=config, steps=1)
    moved = config | {"student": config["student"] | {"move": move}}
    many = run_on_threads(64, train_some, config=moved, steps=1)
    assert sum(not len(rank["tables"]["student"]) for rank in many) == 64 - len(one[0]["tables"]["student"])
    assert_same(one, many, rows=1e-9, losses=1e-9)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_trains_the_same_on_three_ranks(scorer: str) -> None:
    reciprocal = SCORERS[scorer].tails_only
    config = {"dtype": "float64", "student": student("scratch", {}, SHARED, scorer=scorer, reciprocal=reciprocal)}
    one = run_on_threads(1, train_some, config=config, steps=4)
    assert_same(one, run_on_threads(3, train_some, config=config, steps=4), rows=1e-9, losses=1e-9)


@pytest.mark.parametrize("name", OptimizerConfig.model_fields["name"].annotation.__args__)
def test_every_optimiser_trains_the_same_on_two_ranks(name: str) -> None:
    more = {"optimizer": {"name": name, "lr": 0.05, "relation_lr": 0.02}}
    config = {"dtype": "float64", "student": student("scratch", {}, SAMPLED, **more)}
    one = run_on_threads(1, train_some, config=config, steps=6)
    assert_same(one, run_on_threads(2, train_some, config=config, steps=6), rows=1e-8, losses=1e-8)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_batch_in_four_parts_trains_like_the_whole_batch(regime: str) -> None:
    whole = {"dtype": "float64", "student": student("bkd", {}, REGIMES[regime], batch_size=48)}
    parts = {"dtype": "float64", "student": student("bkd", {}, REGIMES[regime], batch_size=48, accumulate=4)}
    one = run_on_threads(1, train_some, config=whole, steps=4)
    for world in (1, 2):
        assert_same(one, run_on_threads(world, train_some, config=parts, steps=4), rows=1e-9, losses=1e-9)


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    tables = {g: torch.cat([r["tables"][g] for r in ranks]) for g in ranks[0]["tables"]}
    return ranks[0] | {"tables": tables}


def test_every_method_is_in_this_test() -> None:
    assert METHOD_OPTIONS.keys() == METHODS.keys()
