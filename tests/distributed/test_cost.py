"""What a rehearsal says that a step sends, against the payloads that were handed to collectives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from distkgd.config.stage import LossConfig
from distkgd.distributed.cost import HeldModel, StepShape, human, memory
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import candidate_layout
from distkgd.methods import METHODS
from distkgd.training import communication
from distkgd.training.communication import choose_communication, count_needs, expected_traffic
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_stage, train_step
from tests.covering import all_pairs
from tests.ranks import run_on_threads
from tests.toys import toy_graph, toy_job

REGIMES: dict[str, dict[str, Any]] = {
    "triple": {"kind": "triple", "num": 12, "sides": "bernoulli", "filtered": True},
    "chunk": {"kind": "chunk", "num": 36, "chunk": 6, "sides": "uniform"},
    "batch": {"kind": "batch", "num": 60},
    "all": {"kind": "all"},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "scratch": [{}],
    "bkd": [{}, {"divergence": "reverse_kl"}, {"divergence": "js"}],
    "dualde": [
        {"stage_two": None},
        {"stage_one": False},
        {"stage_one": False, "structure": False, "soft": "kl"},
    ],
    "mulde": [{}, {"contrast_attention": False, "hard_weight": 0.0}, {"relation_scaling": False}],
    "dml": [{}, {"peer_dim": 24, "hard_weight": 0.0}],
    "rkd": [{}, {"vectors": "query"}],
    "iterde": [{}, {"soft": "kl"}, {"schedule": "two_phase"}],
    "med": [{}, {"mutual": False}, {"evolution": False, "dynamic": False}, {"dims": [4, 16]}],
    "metasd": [
        {"prune": {"rate": 0.5}},
        {"reverse_kl": 0.5, "quiz": 0.1, "quiz_batch": 40, "relation_weight": 1.0},
        {"kl": 0.0, "reverse_kl": 0.5, "teacher_kl": 0.0},
        {"meta": False, "alpha": 1.0},
    ],
}
LOSSES = {"scratch": LossConfig.model_fields["name"].annotation.__args__}
LOSSES |= {"dualde": ("softmax", "self_adversarial"), "med": ("softmax", "bce")}
TRIPLES = 72


@pytest.fixture
def unannounced() -> Iterator[None]:
    """Jobs do not say what each move would send, which takes a rehearsal for each."""
    with patch.object(communication, "forecast", lambda *_: {}):
        yield


def count_on_ranks(ranks: Ranks, cases: list[dict[str, Any]]) -> list[dict[str, dict[str, float]]]:
    """Of each config's second step: what this rank sent, and what the rehearsal says."""
    graph = toy_graph(entities=300, triples=2000)
    found = []
    for config in cases:
        job = toy_job(config, ranks, Path("/nonexistent"), graph)
        inputs, move, progress = job.input_builder, job.input_builder.move, Progress()
        train_step(job, progress, 0)
        ranks.traffic.clear()
        expected = expected_traffic(inputs, job.method, job.config, move, step=1)
        assert not ranks.traffic
        # Ids travel a step ahead, but for those of further step inputs.
        now, later = (count_needs(inputs, step, job.config.accumulate).rows(move) for step in (1, 2))
        expected["ids"] += 8 * (later - now)
        progress.step = 1
        train_step(job, progress, 0)
        found.append({"sent": dict(ranks.traffic), "expected": expected})
        job.prefetcher.drop()
    return found


def config_of(method: str, options: dict[str, Any], loss: str, regime: str, move: str, **more: Any) -> dict[str, Any]:
    stage = {"dim": 16, "batch_size": TRIPLES, "method": method, "distill": options, "negatives": REGIMES[regime]}
    return {"student": stage | {"loss": {"name": loss}, "move": move} | more}


def assert_as_expected(world: int, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What the first rank has sent in each case."""
    ranks = run_on_threads(world, count_on_ranks, cases=cases)
    for i, config in enumerate(cases):
        where = f"{world} ranks, {config['student']}"
        expected = ranks[0][i]["expected"]
        sent = {k: sum(r[i]["sent"].get(k, 0.0) for r in ranks) / world for k in expected}
        assert set().union(*(r[i]["sent"] for r in ranks)) <= set(expected), where
        assert sum(sent.values()) == pytest.approx(sum(expected.values()), rel=0.05), where
        for kind, value in expected.items():
            # Each kind by itself, so that one error cannot hide another; the ids of a batch in parts are those of two
            # batches, and bytes of whole numbers are rounded.
            guessed = kind == "ids" and "accumulate" in config["student"]
            close = {"rel": 0.02, "abs": 100} if guessed else {"rel": 1e-6, "abs": 4}
            assert sent[kind] == pytest.approx(value, **close), (kind, where)
    return [found["sent"] for found in ranks[0]]


@pytest.mark.usefixtures("unannounced")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_sends_what_was_rehearsed(method: str) -> None:
    losses = LOSSES.get(method, ("softmax",))
    cases = all_pairs(OPTIONS[method], losses, REGIMES, ["rows", "queries"])
    if method == "scratch":
        cases += [({}, *case, "nothing") for case in all_pairs(losses, ["triple", "chunk", "batch"])]
    assert_as_expected(2, [config_of(method, *case) for case in cases])


@pytest.mark.usefixtures("unannounced")
def test_several_teachers_send_what_was_rehearsed() -> None:
    places = [("all", "queries"), ("triple", "rows"), ("chunk", "rows")]
    turns = zip(OPTIONS["dualde"], places, strict=True)
    assert_as_expected(3, [{"two": True} | config_of("dualde", way, "softplus", *place) for way, place in turns])


@pytest.mark.usefixtures("unannounced")
@pytest.mark.parametrize(("world", "at_once"), [(2, 1 << 30), (3, 1000)])
def test_queries_travel_once_however_many_passes_and_blocks_meet_them(world: int, at_once: int) -> None:
    """The second pass of js takes nothing along but what the first one brought home."""
    js = {"divergence": "js"}
    cases = [config_of("bkd", options, "softmax", "all", "queries") for options in ({}, js, js | {"hard_weight": 0.0})]
    cases += [config_of("bkd", js, loss, "batch", "queries", accumulate=3) for loss in ("softmax", "margin")]
    with patch.object(candidate_layout, "numbers_at_once", lambda _numbers, _device: at_once):
        sent = assert_as_expected(world, cases)
    queries = 2 * TRIPLES // world
    assert sent[1]["queries"] - sent[0]["queries"] == 3 * 4 * (world - 1) * queries
    assert sent[1]["partials"] == sent[0]["partials"]


@pytest.mark.usefixtures("unannounced")
def test_smoothing_clipping_parts_and_balance_send_what_was_rehearsed() -> None:
    smoothed = config_of("scratch", {}, "softmax", "batch", "queries")
    smoothed["student"]["loss"]["label_smoothing"] = 0.1
    cases = [
        smoothed,
        config_of("bkd", {}, "softmax", "all", "queries", optimizer={"name": "adam", "clip": 1.0}),
        config_of("bkd", {}, "softmax", "chunk", "rows", accumulate=3),
        config_of("bkd", {}, "softmax", "batch", "queries", accumulate=3),
        config_of("bkd", {}, "softmax", "batch", "rows", bits=2, regulariser={"name": "n3", "weight": 0.1}),
        config_of("bkd", {}, "softmax", "chunk", "rows", balanced=True, accumulate=2),
        config_of("bkd", {}, "softmax", "all", "queries", balanced=True),
        config_of("scratch", {}, "softmax", "all", "queries", scorer="pairre"),
        config_of("scratch", {}, "softmax", "all", "queries", scorer="roth"),
        config_of("dualde", {"stage_one": False}, "softplus", "triple", "queries", scorer="rote"),
        config_of("scratch", {}, "softmax", "triple", "rows", row_dtype="bfloat16"),
    ]
    assert_as_expected(3, cases)


def rehearse_on_ranks(ranks: Ranks, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each config: what is rehearsed, and whether anything of the job has changed by it."""
    found = []
    for config in cases:
        job = toy_job(config, ranks, Path("/nonexistent"), toy_graph(entities=300, triples=2000))
        train_step(job, Progress(), 0)
        before, random, kept, sent = tensors_of(job), torch.get_rng_state(), job.method.state(), dict(ranks.traffic)
        expected = [expected_traffic(job.input_builder, job.method, job.config, move) for move in ("rows", "queries")]
        after, now = tensors_of(job), job.method.state()
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        same += [torch.equal(random, torch.get_rng_state()), sent == dict(ranks.traffic), kept.values == now.values]
        same += [torch.equal(kept.tensors[name], now.tensors[name]) for name in kept.tensors]
        found.append({"expected": expected, "same": same})
        job.prefetcher.drop()
    return found


def tensors_of(job: Job) -> list[torch.Tensor]:
    models = [job.method.student, *job.method.teachers]
    tables = [table for model in models for table in (model.entity.weight, model.relation)]
    return [x.detach().clone() for x in (*tables, *(t for one in job.dense.values() for t in one.tensors.values()))]


@pytest.mark.usefixtures("unannounced")
def test_a_rehearsal_is_the_same_on_all_ranks_and_changes_nothing() -> None:
    cases = [config_of(method, options[0], "softmax", "batch", "queries") for method, options in OPTIONS.items()]
    cases += [config_of("metasd", {"prune": {"rate": 0.5}, "quiz_batch": 31}, "softmax", "chunk", "queries")]
    first, *others = run_on_threads(3, rehearse_on_ranks, cases=cases)
    for i, one in enumerate(first):
        assert all(one["same"]), cases[i]
        assert all(other[i] == one for other in others), cases[i]


def in_both_phases(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What DualDE is expected to send before and after its change of stage, and begun in stage two; what is said."""
    graph, options = toy_graph(entities=300, triples=2000), {"stage_two": {"start": 1, "epochs": 1}}
    sent = []
    for more in (options, options | {"stage_one": False}):
        job = toy_job(config_of("dualde", more, "softplus", "chunk", "queries"), ranks, folder / "sent", graph)
        sent += [expected_traffic(job.input_builder, job.method, job.config, "queries")]
        if job.method.advance(1, 2, False):
            sent += [expected_traffic(job.input_builder, job.method, job.config, "queries")]
    job = toy_job(config_of("dualde", options, "softplus", "chunk", "queries", epochs=2), ranks, folder, graph)
    said: list[str] = []
    with patch.object(job.display, "line", said.append):
        train_stage(job)
    return {"sent": sent, "said": said}


def test_a_new_phase_is_rehearsed_and_announced_anew(tmp_path: Path) -> None:
    first, second = run_on_threads(2, in_both_phases, folder=tmp_path)
    before, after, begun_there = first["sent"]
    assert after == begun_there and after["queries"] > before["queries"] and after["dense"] > before["dense"]
    place = next(i for i, line in enumerate(first["said"]) if "next phase" in line)
    announced = first["said"][place + 1]
    assert announced.startswith("student: queries travel (as configured; ") and announced in second["said"]


def test_every_method_is_counted() -> None:
    assert OPTIONS.keys() == METHODS.keys()


@pytest.mark.usefixtures("unannounced")
def test_nothing_that_is_sent_grows_with_queries_times_candidates() -> None:
    """Ten times the candidates: the same bytes where queries travel, ten times the rows where rows do."""
    graph_sizes = {}
    for num in (60, 600):
        regime = REGIMES["batch"] | {"num": num}
        config = config_of("bkd", {}, "softmax", "batch", "queries", negatives=regime)
        (graph_sizes[num],) = assert_as_expected(2, [config])
    assert graph_sizes[60] == graph_sizes[600]


# -- the choice -----------------------------------------------------------------------------------------------------


def test_the_cheaper_move_is_taken_unless_one_is_named() -> None:
    for kind, num, expected in (("triple", 1, "rows"), ("batch", 3, "rows"), ("all", 0, "queries")):
        config = config_of("scratch", {}, "softmax", "all", "auto", negatives={"kind": kind, "num": max(num, 1)})
        assert set(run_on_threads(2, chosen_on_ranks, config=config)) == {expected}, kind
        config["student"]["move"] = "queries" if expected == "rows" else "rows"
        assert set(run_on_threads(2, chosen_on_ranks, config=config)) == {config["student"]["move"]}


def chosen_on_ranks(ranks: Ranks, config: dict[str, Any]) -> str:
    job = toy_job(config, ranks, Path("/nonexistent"), toy_graph(entities=2000, triples=2000))
    return job.input_builder.move


def test_the_announcement_names_the_move_its_bytes_and_the_memory() -> None:
    (one,) = run_on_threads(1, announced_on_ranks, config=config_of("bkd", {}, "softmax", "all", "auto"))
    assert one.startswith("one rank, nothing travels; memory per rank ") and "tables" in one and "scores" in one
    two = run_on_threads(2, announced_on_ranks, config=config_of("bkd", {}, "softmax", "all", "auto"))
    assert two[0] == two[1] and two[0].startswith("queries travel (chosen; with rows it would be ")
    assert " per step and rank (ids " in two[0] and "partials" in two[0]
    forced = run_on_threads(2, announced_on_ranks, config=config_of("bkd", {}, "softmax", "all", "rows"))[0]
    assert forced.startswith("candidate rows travel (as configured; with queries it would be ")


def announced_on_ranks(ranks: Ranks, config: dict[str, Any]) -> str:
    job = toy_job(config, ranks, Path("/nonexistent"), toy_graph(entities=300, triples=2000))
    return choose_communication(job.input_builder, job.method, job.config)


def test_memory_is_the_shards_and_one_block_of_scores() -> None:
    model = HeldModel(dim=64, row_bytes=4, state_numbers=64, learns=True)
    given = {"world": 4, "entities": 1_000_000, "queries": 1024.0, "touched": 900.0, "models": [model]}
    all_entities = StepShape(**given, candidates=1_000_000, number_bytes=4)
    held = memory(all_entities, "queries", lambda numbers: min(numbers, 1000.0))
    assert held["tables"] == held["state"] == held["gradients"] == 250_000 * 64 * 4
    assert held["scores"] == 6 * 1000 * 4
    few = StepShape(**given, candidates=512, number_bytes=4)
    assert memory(few, "rows", lambda numbers: numbers)["gradients"] == 2 * 900 * 64 * 4


@pytest.mark.parametrize(("given", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (5e12, "5000.0 GB")])
def test_bytes_are_written_for_people(given: float, text: str) -> None:
    assert human(given) == text
