"""Score rows: sharded and blocked reductions against one dense matrix of scores."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE, CandidateLayout, PairScores, valid_mask
from distkgd.distributed.reductions.loss_requests import reduce
from distkgd.distributed.reductions.partials import LogSumExp, SoftmaxMean, Sum
from tests.jobs import PARTIALS, RowsCase, closeness, dot, every_partial, reduce_on_ranks
from tests.ranks import run_on_threads

WIDTH = 4


def rows_case(queries: int, candidates: int, *, exclude: str = "some", seed: int = 0) -> RowsCase:
    """exclude: "none", "some" pairs (repeats among them), or "some" and all of query 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left_out = torch.rand(queries, candidates, generator=generator) < (0.0 if exclude == "none" else 0.3)
    if exclude == "all of one":
        left_out[0] = True
    pairs = left_out.nonzero()
    pairs = torch.cat([pairs, pairs[::3]])  # a pair that is left out twice is left out
    weights = draw(queries, len(PARTIALS))
    weights[left_out.all(1), PARTIALS.index("mean.lse") :] = 0.0  # nothing can be said about an empty list
    return RowsCase(draw(queries, WIDTH), draw(candidates, WIDTH), draw(queries), weights, pairs)


def dense(case: RowsCase) -> dict[str, Tensor]:
    """The same partials and gradients, one query after the other, over explicit lists of candidates."""
    queries, rows, thresholds = (x.clone().requires_grad_() for x in (case.queries, case.candidates, case.thresholds))
    never = {tuple(pair) for pair in case.pairs.tolist()}
    values = []
    for i in range(len(queries)):
        kept = [j for j in range(len(rows)) if (i, j) not in never]
        z = torch.stack([sum(queries[i] * rows[j]) for j in kept]) if kept else queries[i, :0]
        other = torch.stack([1.0 - sum((queries[i] - rows[j]) ** 2) for j in kept]) if kept else z
        odds = torch.exp(0.7 * z)
        nothing = torch.tensor(-math.inf, dtype=torch.float64)
        found = {
            "sum": torch.log1p(torch.exp(z - thresholds[i])).sum(),
            "count": (z > thresholds[i]).sum().double(),
            "mean": (odds * (z - other) ** 2).sum() / odds.sum() if kept else z.sum(),
            "mean.lse": torch.log(odds.sum()) if kept else nothing,
            "lse": torch.log(torch.exp(1.3 * other).sum()) if kept else nothing,
        }
        values.append(torch.stack([found[name] for name in PARTIALS]))
    stacked = torch.stack(values) if values else torch.zeros(0, len(PARTIALS), dtype=torch.float64)
    (torch.where(case.weights == 0, 0.0, stacked * case.weights).sum() + thresholds.square().sum()).backward()
    gradients = {"queries": queries, "thresholds": thresholds, "rows": rows}
    return {"values": stacked.detach()} | {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in gradients.items()
    }


def even(candidates: int, world: int) -> list[int]:
    return [rank * candidates // world for rank in range(world + 1)]


def assert_dense(case: RowsCase, parts: list[dict[str, Tensor]]) -> None:
    expected = dense(case)
    for name, value in expected.items():
        found = torch.cat([part[name] for part in parts])
        if name == "values":
            # "Nothing" is a very low number here: it has to stay one that no score reaches.
            found = torch.where(found < MASKED_SCORE / 4, -math.inf, found)
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


SIZES = [(7, 13), (5, 2), (2, 9), (9, 6)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("queries", "candidates"), SIZES)
@pytest.mark.parametrize("exclude", ["none", "some", "all of one"])
def test_partials_and_gradients_are_those_of_one_dense_matrix(
    world: int, queries: int, candidates: int, exclude: str
) -> None:
    case = rows_case(queries, candidates, exclude=exclude)
    assert_dense(case, run_on_threads(world, reduce_on_ranks, case=case, cuts=even(candidates, world)))


@pytest.mark.parametrize("cuts", [[0, 0, 8], [0, 8, 8], [0, 3, 3, 8], [0, 0, 0, 8]], ids=str)
def test_a_rank_may_have_no_candidates(cuts: list[int]) -> None:
    case = rows_case(5, 8, exclude="all of one")
    assert_dense(case, run_on_threads(len(cuts) - 1, reduce_on_ranks, case=case, cuts=cuts, block_numbers=None))


@pytest.mark.parametrize("only", ["sum", "mean", "lse"])
def test_a_rank_without_candidates_takes_part_in_backward_whichever_partial_is_asked_for(only: str) -> None:
    """Were it to miss one exchange of gradients, the others would wait for it."""
    case = rows_case(5, 8, exclude="none")
    case.weights[:, [name.split(".")[0] != only for name in PARTIALS]] = 0.0
    parts = run_on_threads(2, reduce_on_ranks, case=case, cuts=[0, 8, 8], only=only)
    expected = dense(case)
    for name in ("queries", "rows"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected[name])


@pytest.mark.parametrize("queries", [1, 2])
def test_a_rank_may_have_no_queries(queries: int) -> None:
    case = rows_case(queries, 7)
    assert_dense(case, run_on_threads(3, reduce_on_ranks, case=case, cuts=even(7, 3), block_numbers=None))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("block_numbers", [1, 14, 35])
def test_blocks_that_are_recomputed_change_no_value_and_no_gradient(world: int, block_numbers: int) -> None:
    case = rows_case(7, 12, exclude="all of one")
    parts = run_on_threads(world, reduce_on_ranks, case=case, cuts=even(12, world), block_numbers=block_numbers)
    assert all(int(part["blocks"]) > 1 for part in parts) or (world, block_numbers) == (3, 35)
    assert_dense(case, parts)
    whole = run_on_threads(world, reduce_on_ranks, case=case, cuts=even(12, world))
    for one, other in zip(parts, whole, strict=True):
        assert int(other["blocks"]) == 1
        for name in ("queries", "thresholds", "rows"):
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("cuts", [[0, 6, 13], [0, 2, 9], [0, 0, 5], [0, 2, 3, 9]], ids=str)
def test_ranks_may_cut_their_candidates_into_different_numbers_of_blocks(cuts: list[int]) -> None:
    case = rows_case(7, cuts[-1])
    parts = run_on_threads(len(cuts) - 1, reduce_on_ranks, case=case, cuts=cuts, block_numbers=14)
    assert len({int(part["blocks"]) for part in parts}) > 1
    assert_dense(case, parts)


# -- one kind at a time ---------------------------------------------------------------------------------------------

ALONE = {
    "sum": lambda z: {"x": Sum(torch.relu(z))},
    "logsumexp": lambda z: {"x": LogSumExp(z)},
    "softmax mean": lambda z: {"x": SoftmaxMean(z, z * valid_mask(z.detach()))},
}


def alone(kind: str, case: RowsCase, block_numbers: int | None) -> tuple[Tensor, Tensor, Tensor]:
    queries, rows = case.queries.clone().requires_grad_(), case.candidates.clone().requires_grad_()
    pairs = case.pairs[torch.sort(case.pairs[:, 1], stable=True).indices]
    layout = CandidateLayout(
        Ranks(),
        counts=[len(queries)],
        num_candidates=len(rows),
        excluded=(pairs[:, 0].contiguous(), pairs[:, 1].contiguous()),
        block_numbers=block_numbers,
    )
    got = reduce(ALONE[kind], PairScores(layout, dot, queries, rows))["x"]
    return got, *torch.autograd.grad(got.sum(), (queries, rows))


@pytest.mark.parametrize("kind", ALONE)
def test_the_second_derivative_is_the_same_in_blocks(kind: str) -> None:
    case = rows_case(6, 11)

    def second(block_numbers: int | None) -> tuple[Tensor, ...]:
        queries, rows = case.queries.clone().requires_grad_(), case.candidates.clone().requires_grad_()
        layout = CandidateLayout(Ranks(), counts=[len(queries)], num_candidates=len(rows), block_numbers=block_numbers)
        got = reduce(ALONE[kind], PairScores(layout, dot, queries, rows))["x"]
        first = torch.autograd.grad(got.square().sum(), (queries, rows), create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), (queries, rows))

    for whole, blocked in zip(second(None), second(13), strict=True):
        torch.testing.assert_close(whole, blocked)
        assert whole.abs().max() > 0


@pytest.mark.parametrize("kind", ALONE)
def test_each_kind_of_partial_alone_is_the_same_in_blocks(kind: str) -> None:
    case = rows_case(6, 11)
    for whole, blocked in zip(alone(kind, case, None), alone(kind, case, 13), strict=True):
        torch.testing.assert_close(whole, blocked)


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("block_numbers", [None, 13])
def test_one_answer_a_query_is_left_out_as_the_pairs_are_that_name_it(kind: str, block_numbers: int | None) -> None:
    case, answers = rows_case(6, 11), torch.tensor([3, 10, 0, 3, -2, 11])  # of the last two no candidate
    pairs = torch.tensor([(i, j) for i, j in enumerate(answers.tolist()) if 0 <= j < 11])
    expected = alone(kind, RowsCase(case.queries, case.candidates, case.thresholds, case.weights, pairs), block_numbers)
    # Where ranks ask each other, an answer may be elsewhere; alone a rank has them all.
    ranks = Ranks()
    ranks.world = 2
    layout = CandidateLayout(ranks, num_candidates=11, answers=answers, block_numbers=block_numbers)
    alike = [layout, CandidateLayout(Ranks(), num_candidates=11, answers=answers[:4], block_numbers=block_numbers)]
    for one, n in zip(alike, (6, 4), strict=True):
        got = reduce(ALONE[kind], PairScores(one, dot, case.queries[:n], case.candidates))["x"]
        torch.testing.assert_close(got, expected[0][:n])
        if kind == "logsumexp" and block_numbers is None:
            cut, met = one.query_blocks(2, n)[1]
            got = reduce(ALONE[kind], PairScores(cut, dot, case.queries[met], case.candidates))["x"]
            torch.testing.assert_close(got, expected[0][met])


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("block_numbers", [None, 12])
def test_a_pair_that_does_not_count_has_no_gradient(kind: str, block_numbers: int | None) -> None:
    case = rows_case(6, 11, exclude="none")
    # Candidate 4 counts for nobody, and query 2 meets candidate 7 only.
    never = [(i, 4) for i in range(6)] + [(2, j) for j in range(11) if j != 7]
    case = RowsCase(case.queries, case.candidates.abs(), case.thresholds, case.weights, torch.tensor(never))
    value, queries, rows = alone(kind, case, block_numbers)
    assert rows[4].abs().max() == 0 and (rows[7] != 0).any()
    score = (case.queries[2] * case.candidates[7]).sum()
    torch.testing.assert_close(value[2], score.clamp(min=0.0) if kind == "sum" else score)
    expected = case.candidates[7] * float(score > 0 or kind != "sum")
    torch.testing.assert_close(queries[2], expected)


def test_scores_that_do_not_count_make_no_nan_even_where_nothing_is_left() -> None:
    case = rows_case(3, 5, exclude="none")
    everything = torch.tensor([(i, j) for i in range(3) for j in range(5)])
    case = RowsCase(case.queries, case.candidates, case.thresholds, case.weights, everything)
    for kind in ALONE:
        for found in alone(kind, case, None):
            assert found.isfinite().all()
    assert alone("sum", case, None)[0].tolist() == [0.0] * 3
    assert (alone("logsumexp", case, None)[0] < MASKED_SCORE / 2).all()


def test_no_candidates_at_all_give_empty_sums() -> None:
    case = rows_case(3, 0, exclude="none")
    got = {kind: alone(kind, case, None)[0] for kind in ALONE}
    assert got["sum"].tolist() == [0.0] * 3 and got["softmax mean"].tolist() == [0.0] * 3
    assert (got["logsumexp"] <= MASKED_SCORE).all()


# -- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_each_group_of_queries_meets_its_own_candidates(masked: bool) -> None:
    groups, per_group, number = 3, 2, 5
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(groups * per_group, WIDTH, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, number, WIDTH, generator=generator, dtype=torch.float64)
    thresholds = torch.randn(groups * per_group, generator=generator, dtype=torch.float64)
    mask = torch.rand(groups, per_group, number, generator=generator) < 0.3 if masked else None
    leaves = [x.clone().requires_grad_() for x in (queries, rows, thresholds)]
    layout = CandidateLayout(Ranks(), groups=groups, num_candidates=number, mask=mask, block_numbers=1)
    fields = [
        PairScores(layout, score_candidates, leaves[0], leaves[1]) for score_candidates in (_grouped_dot, closeness)
    ]
    got = reduce(every_partial, *fields, per_query=(leaves[2],))
    values = torch.stack([got[name] for name in PARTIALS], 1)
    weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    ((values * weights).sum() + leaves[2].square().sum()).backward()
    for group in range(groups):
        mine = slice(group * per_group, (group + 1) * per_group)
        pairs = torch.zeros(0, 2).long() if mask is None else mask[group].nonzero()
        expected = dense(RowsCase(queries[mine], rows[group], thresholds[mine], weights[mine], pairs))
        torch.testing.assert_close(values[mine].detach(), expected["values"])
        torch.testing.assert_close(leaves[0].grad[mine], expected["queries"])
        torch.testing.assert_close(leaves[1].grad[group], expected["rows"])
        torch.testing.assert_close(leaves[2].grad[mine], expected["thresholds"])


def test_a_rank_may_have_no_group() -> None:
    layout = CandidateLayout(Ranks(), groups=0, num_candidates=5)
    queries = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(0, 5, WIDTH, dtype=torch.float64)
    fields = [PairScores(layout, score_candidates, queries, rows) for score_candidates in (_grouped_dot, closeness)]
    got = reduce(every_partial, *fields, per_query=(torch.zeros(0, dtype=torch.float64),))
    assert all(found.shape == (0,) for found in got.values())


def _grouped_dot(queries: Tensor, rows: Tensor) -> Tensor:
    return queries @ rows.transpose(-1, -2)


# -- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "block_numbers", "queries"), [(10, 30, 7), (11, 7, 7), (3, 1, 100), (0, 5, 3)])
def test_blocks_follow_each_other_and_stay_within_their_budget(number: int, block_numbers: int, queries: int) -> None:
    layout = CandidateLayout(Ranks(), counts=[queries], num_candidates=number, block_numbers=block_numbers)
    blocks = layout.blocks(queries)
    assert [j for start, stop in blocks for j in range(start, stop)] == list(range(number))
    assert all((stop - start) * queries <= block_numbers or stop - start == 1 for start, stop in blocks if number)


def test_scores_of_a_field_are_computed_once_however_many_reductions_use_them() -> None:
    calls: list[Any] = []

    def score_candidates(queries: Tensor, rows: Tensor) -> Tensor:
        calls.append(1)
        return dot(queries, rows)

    case = rows_case(3, 5)
    layout = CandidateLayout(Ranks(), counts=[3], num_candidates=5)
    field = PairScores(layout, score_candidates, case.queries, case.candidates)
    for fn in ALONE.values():
        reduce(fn, field)
    assert len(calls) == 1
