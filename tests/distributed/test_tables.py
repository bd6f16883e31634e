"""Looking rows up across ranks: values, gradients, and gradients of gradients, against one dense table."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distkgd.distributed import tables
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import Asked, Route, ShardedTable, _distinct_padded, foresee, plan_route, run_to_end
from tests.jobs import look_up_on_ranks
from tests.ranks import run_on_threads

TOTAL, DIM = 11, 3
WEIGHT = torch.randn(TOTAL, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

# For each of up to three ranks, the entities it asks for.
REQUESTS: dict[str, list[list[int]]] = {
    "spread": [[0, 5, 10], [3, 9, 1, 2], [7, 4]],
    "duplicates": [[4, 4, 9, 4, 0, 9], [9, 9], [4, 10, 9]],
    "all on the first rank": [[0, 1, 2], [2, 1, 1], [0]],
    "all on the last rank": [[10, 9], [10, 10], [9, 8]],
    "nothing asked by one": [[2, 8, 2], [], [8]],
    "nothing asked by the first": [[], [3, 10], [1]],
    "nothing asked at all": [[], [], []],
}
CANDIDATES = {"every row": None, "some rows": [0, 1, 4, 9, 10], "no rows": []}


def factors(ids: list[list[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(len(mine), DIM, generator=generator, dtype=torch.float64) for mine in ids]


def dense(ids: list[int], factor: Tensor) -> dict[str, Tensor]:
    table = WEIGHT.clone().requires_grad_()
    rows = table[torch.tensor(ids, dtype=torch.int64)]
    (first,) = torch.autograd.grad((factor * rows.sin()).sum(), table, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), table)
    return {"rows": rows.detach(), "first": first.detach(), "second": second}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("candidates", CANDIDATES)
def test_rows_and_their_first_and_second_gradients_are_those_of_one_dense_table(
    world: int, request_name: str, candidates: str
) -> None:
    ids = REQUESTS[request_name][:world]
    given = factors(ids)
    chosen = CANDIDATES[candidates]
    parts = run_on_threads(world, look_up_on_ranks, weight=WEIGHT, ids=ids, factors=given, candidates=chosen)
    everything = [entity for mine in ids for entity in mine]
    expected = dense(everything, torch.cat(given))
    if everything:
        assert expected["first"].abs().max() > 0 and expected["second"].abs().max() > 0
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(
        torch.cat([p["candidates"] for p in parts]), WEIGHT if chosen is None else WEIGHT[chosen]
    )
    touched = torch.cat([part["touched"] for part in parts]).tolist()
    assert touched == sorted(set(everything) | set(chosen or []))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("padded", [False, True])
def test_what_all_ranks_look_up_is_foreseen_as_they_would_have_told_it(
    world: int, request_name: str, padded: bool
) -> None:
    ids = REQUESTS[request_name][:world]
    for route, (foreseen, also) in run_on_threads(world, asked_and_foreseen, ids=ids, padded=padded):
        assert foreseen.receive == route.receive and foreseen.send == route.send
        assert route.requested is not None
        assert foreseen.requested.tolist() == route.touched[route.requested].tolist()
        assert also == [7, 5]


def asked_and_foreseen(ranks: Ranks, ids: list[list[int]], padded: bool) -> tuple[Route, tuple[Asked, list[int]]]:
    mine = torch.tensor(ids[ranks.rank], dtype=torch.int64)
    everyone = torch.tensor([rank * TOTAL + one for rank, some in enumerate(ids) for one in some], dtype=torch.int64)
    route = plan_route(mine, None, TOTAL, ranks)
    # As an accelerator has it, whose host does not know how many are distinct; nothing is exchanged meanwhile.
    distinct = _distinct_padded if padded and len(everyone) else tables.distinct
    with patch.object(tables, "distinct", distinct):
        return route, run_to_end(foresee(everyone, TOTAL, ranks, torch.tensor([7, 5])))


def test_the_first_gradient_adds_up_over_duplicates_like_index_add() -> None:
    ids = REQUESTS["duplicates"][:2]
    given = factors(ids)
    parts = run_on_threads(2, look_up_on_ranks, weight=WEIGHT, ids=ids, factors=given, candidates=[])
    everything = torch.tensor([entity for mine in ids for entity in mine])
    expected = torch.zeros(TOTAL, DIM, dtype=torch.float64)
    expected.index_add_(0, everything, torch.cat(given) * WEIGHT[everything].cos())
    torch.testing.assert_close(torch.cat([part["first"] for part in parts]), expected)


def test_rows_that_are_candidates_and_looked_up_collect_both_gradients() -> None:
    table = ShardedTable(WEIGHT.clone(), TOTAL, Ranks())
    opened = table.open(plan_route(torch.tensor([4, 2, 4]), torch.tensor([4, 9]), TOTAL, Ranks()), grad=True)
    (opened.lookup([3])[0].sum() + 10.0 * opened.candidates().sum()).backward()
    assert opened.route.touched is not None and opened.route.touched.tolist() == [2, 4, 9]
    assert opened.leaf.grad is not None and opened.leaf.grad[:, 0].tolist() == [1.0, 12.0, 10.0]


def test_a_shard_of_candidates_adds_the_gradient_of_its_looked_up_rows_once() -> None:
    table = ShardedTable(WEIGHT.clone(), TOTAL, Ranks())
    opened = table.open(plan_route(torch.tensor([4, 2, 4]), None, TOTAL, Ranks()), grad=True)
    (opened.lookup([3])[0].sum() + 10.0 * opened.candidates().sum()).backward()
    expected = torch.full((TOTAL,), 10.0, dtype=WEIGHT.dtype)
    expected[[2, 4]] += torch.tensor([1.0, 2.0], dtype=WEIGHT.dtype)
    for _ in range(2):  # asking again changes nothing
        found = opened.gradient()
        assert found is not None and found[0] is None
        assert torch.equal(found[1][:, 0], expected)


def test_slices_of_a_look_up_are_slices_of_the_ids() -> None:
    ids = torch.tensor([5, 0, 5, 8])
    opened = ShardedTable(WEIGHT.clone(), TOTAL, Ranks()).open(plan_route(ids, None, TOTAL, Ranks()), grad=False)
    for sizes in ([4], [1, 2, 1], [2, 0, 2]):
        for part, found in zip(ids.split(sizes), opened.lookup(sizes), strict=True):
            assert torch.equal(found, WEIGHT[part])


@pytest.mark.parametrize("candidates", [None, torch.tensor([1, 2])])
def test_a_table_opened_without_gradient_takes_none_and_is_not_remembered(candidates: Tensor | None) -> None:
    table = ShardedTable(WEIGHT.clone(), TOTAL, Ranks())
    opened = table.open(plan_route(torch.tensor([1]), candidates, TOTAL, Ranks()), grad=False)
    assert not opened.lookup([1])[0].requires_grad and not opened.candidates().requires_grad
    assert table.opened == []
    table.open(plan_route(torch.tensor([1]), candidates, TOTAL, Ranks()), grad=True)
    assert len(table.opened) == 1 and not table.weight.requires_grad


def test_a_shard_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"11 rows, its range 0\.\.12"):
        ShardedTable(WEIGHT, TOTAL + 1, Ranks())


def test_shares_are_contiguous_cover_everything_and_differ_by_one_at_most() -> None:
    for world in (1, 2, 3, 7):
        for total in (0, 1, 5, 20, 23):
            shares = [Ranks(rank, world).share(total) for rank in range(world)]
            assert [i for lo, hi in shares for i in range(lo, hi)] == list(range(total))
            sizes = [hi - lo for lo, hi in shares]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ids", [[4, 4, 9, 4, 0, 9], [3], [10, 9, 8], [7, 7, 7], list(range(11)) * 2])
@pytest.mark.parametrize("below", [11, 1000])  # few and many rows that could have been asked for
def test_without_knowing_how_many_ids_are_distinct_the_last_of_them_is_repeated(ids: list[int], below: int) -> None:
    rows, place = _distinct_padded(torch.tensor(ids), below)
    expected, inverse = torch.unique(torch.tensor(ids), return_inverse=True)
    assert torch.equal(place, inverse) and len(rows) == min(len(ids), below)
    assert rows.tolist() == expected.tolist() + [int(expected[-1])] * (len(rows) - len(expected))
