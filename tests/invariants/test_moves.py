"""What may travel, and when: ids ahead of their step, nothing, or equally much between any two ranks.

That rows or queries may travel and train the same rows is in test_world_size.py.
"""

import gc
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.data.sampling import Balanced
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.stages import Stage, check_stage
from tests.covering import all_pairs
from tests.invariants.test_world_size import REGIMES, assert_same, student
from tests.ranks import run_on_threads
from tests.toys import toy_graph, toy_job, train_some


def test_the_next_ids_travel_while_a_step_is_computed_and_change_nothing() -> None:
    """Steps taken with look-ahead are those of step inputs planned one by one."""
    config = {"student": student("bkd", {}, REGIMES["triple"], accumulate=2)}
    for found in run_on_threads(2, inputs_ahead_and_afresh, config=config):
        for ahead, afresh in found:
            assert torch.equal(ahead, afresh)


def inputs_ahead_and_afresh(ranks: Ranks, config: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    job = toy_job(config, ranks, Path("/nonexistent"))
    out = []
    for step, part in [(0, 0), (0, 1), (1, 0), (7, 1), (8, 0), (8, 1)]:
        ahead = job.prefetcher.inputs(step, part)
        job.prefetcher.advance()
        afresh = job.input_builder.inputs(job.input_builder.parts(step, 2)[part])
        out.append((ahead.route.inverse, afresh.route.inverse))
        out.append((ahead.route.touched, afresh.route.touched))
        out.append((ahead.batch.triples, afresh.batch.triples))
    job.prefetcher.drop()
    return out


def test_inputs_that_were_begun_and_dropped_are_kept_by_nobody() -> None:
    ahead = toy_job({"student": student("bkd", {}, REGIMES["triple"])}, Ranks(), Path("/nonexistent")).prefetcher
    ahead.inputs(0, 0)
    while ahead._inputs is None:
        ahead.advance()
    begun = weakref.ref(ahead._inputs)
    ahead.drop()
    gc.collect()
    assert begun() is None


# -- candidates from the own shard ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch", "chunk", "triple"])
def test_nothing_travels_but_the_positives_when_candidates_come_from_the_own_shard(kind: str) -> None:
    config = {"student": student("bkd", {}, {"kind": kind, "num": 9, "chunk": 4}, move="nothing")}
    for rank, (lo, hi, ids, sent) in enumerate(run_on_threads(3, own_candidates, config=config)):
        assert ((ids >= lo) & (ids < hi)).all() and len(ids.unique()) > 3, rank
        assert "queries" not in sent and "partials" not in sent
    assert "move: nothing" in str(refusal({"move": "nothing", "negatives": {"kind": "all"}}))


def own_candidates(ranks: Ranks, config: dict[str, Any]) -> tuple[int, int, torch.Tensor, dict[str, int]]:
    job = toy_job(config, ranks, Path("/nonexistent"))
    inputs = job.input_builder.inputs(job.input_builder.parts(0, 1)[0])
    ranks.traffic.clear()
    for _ in job.method.updates(inputs):
        pass
    table = job.rows["student"].table
    assert inputs.route.candidates is not None
    return table.lo, table.hi, inputs.route.touched[inputs.route.candidates] + table.lo, dict(ranks.traffic)


def test_one_rank_has_the_same_candidates_with_nothing_travelling() -> None:
    for kind in ("batch", "chunk", "triple"):
        regime = {"kind": kind, "num": 9, "chunk": 4}
        found = [
            train_some(Ranks(), {"dtype": "float64", "student": student("bkd", {}, regime, move=move)}, 5)
            for move in ("nothing", "rows")
        ]
        assert_same([found[0]], [found[1]], rows=1e-9, losses=1e-9)


# -- balanced batches -----------------------------------------------------------------------------------------------


def test_balanced_batches_hold_equally_many_triples_of_every_pair_of_shards() -> None:
    graph, world = toy_graph(entities=40, triples=900), 3
    cuts = Ranks(0, world).bounds(40)
    balanced = Balanced(graph.train, cuts, 36, 2, seed=5)
    for step in (0, 1, 40):
        rows_of_step = balanced.rows(step)
        assert len(rows_of_step) == 36
        shard = torch.bucketize(graph.train[rows_of_step][:, [0, 2]], torch.tensor(cuts[1:-1]), right=True)
        for part in range(2):
            mine = shard[part * 18 : (part + 1) * 18]
            for rank in range(world):
                # Each rank's consecutive share: its own heads, and the tails of every shard in order.
                share = mine[rank * 6 : (rank + 1) * 6]
                assert (share[:, 0] == rank).all() and share[:, 1].tolist() == [0, 0, 1, 1, 2, 2]


def test_balanced_batches_visit_every_triple_of_a_pair_before_one_of_it_comes_again() -> None:
    graph = toy_graph(entities=40, triples=900)
    balanced = Balanced(graph.train, [0, 20, 40], 16, 1, seed=5)
    seen = Counter(torch.cat([balanced.rows(step) for step in range(max(balanced.sizes) // 4 + 2)]).tolist())
    assert set(seen) == set(range(len(graph.train)))
    rare = balanced.sizes.index(min(balanced.sizes))
    shard = (graph.train[:, [0, 2]] >= 20).long()
    pair = shard[:, 0] * 2 + shard[:, 1]
    for i in range(4):
        counts = [seen[j] for j in (pair == i).nonzero().flatten().tolist()]
        assert max(counts) - min(counts) <= 1, (i, rare)


@pytest.mark.parametrize(
    ("kind", "sides", "move", "world"),
    all_pairs(["all", "batch", "chunk", "triple"], ["both", "uniform"], ["rows", "queries"], [2, 3]),
)
def test_balanced_look_ups_bring_the_rows_that_were_asked_for(kind: str, sides: str, move: str, world: int) -> None:
    regime = {"kind": kind, "num": 6, "chunk": 2, "sides": sides}
    more = {"batch_size": 36, "balanced": True, "move": move}
    config = {"dtype": "float64", "student": student("bkd", {}, regime, **more)}
    graph = toy_graph(entities=40, triples=900)
    ranks = run_on_threads(world, balanced_rows, config=config, graph=graph)
    whole = torch.cat([weight for weight, _ in ranks])
    for _, found in ranks:
        for ids, brought in found["looked_up"]:
            assert torch.equal(whole[ids], brought)
        assert not found["fixed"] or len(set(found["asked"])) <= 2, "every other rank is asked for as many rows"
        sizes = Counter(found["negatives"])
        assert not sizes or len(sizes) == 1


def balanced_rows(ranks: Ranks, config: dict[str, Any], graph: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    job = toy_job(config, ranks, Path("/nonexistent"), graph)
    model = job.method.student
    inputs = job.input_builder.inputs(job.input_builder.parts(3, 1)[0])
    opened = model.entity.open(inputs.route, grad=False)
    queries = inputs.batch.queries
    ids = [queries.anchor, queries.answer]
    negatives: list[int] = []
    drawn = job.input_builder.drawn(inputs.batch)
    if inputs.looked_up and drawn is None:
        ids.append(torch.arange(model.entity.total))
    elif inputs.looked_up and drawn is not None:
        ids.append(drawn.reshape(-1))
        if job.input_builder.grouped:
            negatives = [int(((drawn >= lo) & (drawn < hi)).sum()) for lo, hi in pairwise(job.input_builder.cuts)]
    looked_up = list(zip(ids, opened.lookup([len(x) for x in ids]), strict=True))
    fixed = job.input_builder.grouped or not inputs.looked_up
    assert not fixed or inputs.route.send == inputs.route.receive
    found = {"looked_up": looked_up, "asked": inputs.route.send, "negatives": negatives, "fixed": fixed}
    return model.entity.weight, found


def refusal(stage: dict[str, Any], world: int = 2) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config = parse_config({"student": stage}, "test").student
        check_stage(Stage("student", config, ()), toy_graph(), world)
    return caught.value


def test_a_balanced_batch_that_does_not_come_out_even_is_refused() -> None:
    assert "must be a multiple of 4" in str(refusal({"balanced": True, "batch_size": 30}))
    triple = {"kind": "triple", "num": 7}
    assert "num 7 must be a multiple of 2" in str(refusal({"balanced": True, "batch_size": 32, "negatives": triple}))
    chunk = {"kind": "chunk", "num": 8, "chunk": 32}
    assert "multiple of negatives.chunk 32" in str(refusal({"balanced": True, "batch_size": 32, "negatives": chunk}))
    train = torch.tensor([[0, 0, 1], [1, 0, 0]])
    with pytest.raises(ConfigError, match="no training triple has its head on rank 0 and its tail on rank 1"):
        Balanced(train, [0, 2, 4], 4, 1, seed=0)
