"""Query block by query block: the same losses, gradients and bytes as all queries at once, with fewer scores alive."""

from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import query_blocks
from distkgd.distributed.reductions.candidate_layout import LANES, CandidateLayout, PairScores
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.distributed.reductions.partials import Sum
from distkgd.kernels.candidates import Candidates, plain
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.ranks import run_on_ranks
from tests.toys import toy_graph, toy_job

GRAPH = toy_graph(entities=29, relations=3, triples=150)
ALL = {"kind": "all", "filtered": True}
BATCH = {"kind": "batch", "num": 20}


def stage(loss: dict[str, Any], negatives: dict[str, Any], **more: Any) -> dict[str, Any]:
    plain = {"scorer": "complex", "dim": 6, "batch_size": 11, "init_scale": 0.8, "loss": loss, "negatives": negatives}
    # A rank may send its queries to the candidates, or look these up and keep them.
    return plain | {"optimizer": {"name": "sgd", "lr": 1.0}} | more


def distilled(divergence: str) -> dict[str, Any]:
    return {"method": "bkd", "distill": {"divergence": divergence, "temperature": 2.0, "hard_weight": 0.3}}


CASES = {
    **{name: stage({"name": name}, ALL) for name in ("softmax", "bce", "softplus", "self_adversarial", "margin")},
    "label smoothing": stage({"name": "softmax", "label_smoothing": 0.2}, ALL),
    "k-vs-all": stage({"name": "bce"}, {"kind": "all", "labels": "known"}),
    "batch-shared": stage({"name": "softmax"}, BATCH),
    "coordinates": stage({"name": "softmax"}, ALL, scorer="transe"),
    "in two parts": stage({"name": "softmax"}, ALL, batch_size=12, accumulate=2),
    **{name: stage({"name": "softmax"}, ALL, **distilled(name)) for name in ("kl", "reverse_kl", "js")},
    "k-vs-all kl": stage({"name": "softmax"}, {"kind": "all", "labels": "known"}, **distilled("kl")),
}


def step(ranks: Ranks, config: dict[str, Any], block: int | None, dtype: str = "float64") -> dict[str, Any]:
    """Losses, gradients and traffic of step 0 with `block` scores at once, and how often a pass was answered."""
    job = toy_job({"dtype": dtype, "student": config}, ranks, Path("/nonexistent"), GRAPH)
    student = job.method.student
    before = [x.detach().clone() for x in (student.entity.weight, student.relation)]
    ranks.traffic = Counter()
    with ExitStack() as changed:
        if block is not None:
            changed.enter_context(patch.object(query_blocks, "numbers_at_once", lambda numbers, device: 1))
            changed.enter_context(patch.dict(query_blocks._NUMBERS, {"cpu": block}))
            changed.enter_context(patch.object(query_blocks, "_FEWEST_QUERIES", 1))
        answer = changed.enter_context(
            patch.object(query_blocks, "reduce_over_candidates", wraps=query_blocks.reduce_over_candidates)
        )
        losses = train_step(job, Progress(), 0)[0]
    job.prefetcher.drop()
    sent = {kind: n for kind, n in ranks.traffic.items() if kind != "ids"}
    entity, relation = (
        was - now.detach() for was, now in zip(before, (student.entity.weight, student.relation), strict=True)
    )
    return {"losses": losses, "entity": entity, "relation": relation, "sent": sent, "passes": answer.call_count}


@pytest.mark.parametrize("move", ["queries", "rows"])
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_bytes_are_those_of_all_queries_at_once(name: str, move: str) -> None:
    config = CASES[name] | {"move": move}
    for world in (1, 3):
        whole = run_on_ranks(world, step, config=config, block=None)
        parts = run_on_ranks(world, step, config=config, block=100)
        for one, other in zip(whole, parts, strict=True):
            assert other["passes"] > one["passes"]
            assert other["losses"] == pytest.approx(one["losses"], rel=1e-12)
            assert other["sent"] == one["sent"]
            for table in ("entity", "relation"):
                assert one[table].abs().max() > 1e-4
                torch.testing.assert_close(other[table], one[table], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "kl", "reverse_kl", "js", "batch-shared", "k-vs-all kl", "coordinates"])
def test_in_single_precision_compiled_code_takes_the_same_step(name: str) -> None:
    for config in (CASES[name], CASES[name] | {"scorer": "complex", "loss": {"name": "bce"}}):
        for world in (1, 2):
            exact = run_on_ranks(world, step, config=config, block=None)
            found = run_on_ranks(world, step, config=config, block=100, dtype="float32")
            for one, other in zip(exact, found, strict=True):
                assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
                for table in ("entity", "relation"):
                    torch.testing.assert_close(other[table].double(), one[table], rtol=1e-4, atol=1e-5)


def dot(queries: Tensor, candidates: Candidates) -> Tensor:
    return queries @ plain(candidates).mT


def ask(queries: int, candidates: int, seen: list[int]) -> tuple[LossRequest, Tensor]:
    """An ask that notes how many scores it is shown at once, and the queries."""
    source = torch.randn(queries, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(candidates, 4, dtype=torch.float64, requires_grad=True)
    field = PairScores(CandidateLayout(Ranks(), counts=[queries], num_candidates=candidates), dot, source, rows)

    def partials(z: Tensor) -> dict[str, Any]:
        seen.append(z.numel())
        return {"sum": Sum(z.square())}

    return LossRequest(partials, [field], lambda got: got["sum"]), source


def test_a_large_batch_is_cut_so_that_few_scores_exist_at_once() -> None:
    seen: list[int] = []
    with patch.object(query_blocks, "numbers_at_once", lambda numbers, device: min(numbers, 1000)):
        big, source = ask(600, 100_000, seen)
        query_blocks.answer_means({"x": (2.0, big)}, 600)["x"].backward()
    assert max(seen) <= query_blocks._NUMBERS["cpu"] and sum(seen) == 600 * 100_000
    assert source.grad is not None


def test_a_small_batch_and_one_of_too_many_candidates_are_not_cut() -> None:
    for queries, candidates in ((10, 100), (40, 1_000_000)):
        big, _ = ask(queries, candidates, [])
        assert query_blocks._number_of_blocks(big.fields[0], 1) == 1


def test_fields_share_the_memory_of_a_block_and_queries_fill_vectors() -> None:
    with patch.object(query_blocks, "numbers_at_once", lambda numbers, device: 1):
        big, _ = ask(2048, 40_000, [])
        layout = big.fields[0].layout
        for fields in (1, 2, 3):
            cuts = layout.block_cuts(2048, query_blocks._number_of_blocks(big.fields[0], fields))
            sizes = [b - a for a, b in pairwise(cuts)]
            assert all(size % LANES == 0 for size in sizes[:-1]) and sum(sizes) == 2048 and min(sizes) > 0
            assert max(sizes) * 40_000 <= query_blocks._NUMBERS["cpu"]
            assert max(sizes) * 40_000 * fields <= max(query_blocks._NUMBERS["cpu"], query_blocks._TOGETHER["cpu"])


def test_terms_that_are_weighted_differently_afterwards_are_refused() -> None:
    with (
        patch.object(query_blocks, "numbers_at_once", lambda numbers, device: 1),
        patch.dict(query_blocks._NUMBERS, {"cpu": 50}),
        patch.object(query_blocks, "_FEWEST_QUERIES", 1),
    ):
        first, source = ask(20, 10, [])
        second = LossRequest(first.partials, first.fields, lambda got: got["sum"].sqrt())
        terms = query_blocks.answer_means({"a": (1.0, first), "b": (1.0, second)}, 20)
        (3.0 * (terms["a"] + terms["b"])).backward()
        assert source.grad is not None
        terms = query_blocks.answer_means({"a": (1.0, first), "b": (1.0, second)}, 20)
        with pytest.raises(AssertionError, match="added up"):
            (terms["a"] + 2.0 * terms["b"]).backward()
