"""Data once per node: who builds, who maps, what stays behind, and that errors reach everyone."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import polars as pl
import pytest
import torch
from torch import Tensor

from distkgd.data import Graph, Vocabulary, sharing
from distkgd.data.filters import KnownAnswers, both_sides
from distkgd.data.sharing import shared_answers, shared_graph
from distkgd.data.triples import SPLITS
from distkgd.distributed import node_sharing
from distkgd.distributed.node_sharing import node_ranks, share_tensors, together
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from tests.launches import distil, kill_all, rank_process, small_config, small_data, start, steps_saved, wait_for
from tests.ranks import run_on_ranks
from tests.toys import labels_of, toy_graph

WORLDS = pytest.mark.parametrize("world", [2, 3])


def some_tensors() -> dict[str, Tensor]:
    return {
        "int64": torch.arange(30_000).reshape(-1, 3),
        "int32": torch.arange(-5, 5, dtype=torch.int32),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "float64": torch.linspace(0, 1, 12, dtype=torch.float64).reshape(2, 2, 3),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3, dtype=torch.int64),
    }


def never() -> NoReturn:
    raise AssertionError("this rank has nothing to build")


def mapped(process: int | str = "self") -> set[str]:
    """The shared files that a process maps, by inode."""
    lines = Path(f"/proc/{process}/maps").read_text(encoding="utf-8").splitlines()
    return {line.split()[4] for line in lines if "memfd:distkgd" in line}


def opened() -> int:
    """How many shared files this process holds open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except FileNotFoundError:
            continue  # the one that was used to list them
    return sum("memfd:distkgd" in link for link in links)


def raised(work: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of the error of `work`."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("no error came")


def share_some(ranks: Ranks) -> dict[str, Any]:
    before = mapped()
    tensors = share_tensors(ranks, some_tensors if ranks.first else never)
    held, files = mapped() - before, opened()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    del tensors
    return {"tensors": kept, "held": held, "files": files, "stays": mapped() - before}


@WORLDS
def test_the_first_rank_builds_and_all_have_the_same_tensors_in_the_same_memory(world: int) -> None:
    found = run_on_ranks(world, share_some)
    for rank in found:
        assert list(rank["tensors"]) == list(some_tensors())
        for name, tensor in some_tensors().items():
            mine = rank["tensors"][name]
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape) and torch.equal(mine, tensor)
        # A file of the kernel has no name: when nobody maps it any more and nobody has it open it is gone.
        assert rank["held"] == found[0]["held"] and len(rank["held"]) == len(some_tensors()) - 1
        assert (rank["files"], rank["stays"]) == (0, set())


def test_one_rank_alone_just_builds() -> None:
    tensors, graph = some_tensors(), toy_graph()
    with mock.patch.object(node_sharing, "together", never):
        assert share_tensors(Ranks(), lambda: tensors) is tensors
        assert shared_graph(Ranks(), lambda: graph) is graph


def write_some(ranks: Ranks) -> list[float]:
    tensors = share_tensors(ranks, some_tensors)
    ranks.barrier()
    if ranks.rank == 1:
        tensors["int32"].zero_()
    ranks.barrier()
    return [float(tensors["int32"].abs().sum()), float(tensors["float64"].sum())]


def test_what_a_rank_writes_by_mistake_stays_with_it() -> None:
    assert run_on_ranks(3, write_some) == [[25, 6], [0, 6], [25, 6]]


def share_failing(ranks: Ranks, error: Exception) -> tuple[str, str]:
    def build() -> dict[str, Tensor]:
        raise error

    found = raised(lambda: share_tensors(ranks, build if ranks.first else never))
    assert len(ranks.gather_objects(ranks.rank)) == ranks.world  # the ranks are still in step
    return found


@WORLDS
@pytest.mark.parametrize(
    "error", [DataError("a.tsv, line 3: bad"), ConfigError("no such option")], ids=["data", "config"]
)
def test_a_users_error_is_raised_on_every_rank_as_it_is(world: int, error: Exception) -> None:
    assert run_on_ranks(world, share_failing, error=error) == [(type(error).__name__, str(error))] * world


def test_an_unforeseen_error_is_raised_where_it_happened_and_told_to_the_others() -> None:
    found = run_on_ranks(3, share_failing, error=KeyError("x"))
    assert found == [("KeyError", "'x'"), *[("RuntimeError", "rank 0: KeyError('x')")] * 2]


def fail_apart(ranks: Ranks) -> tuple[str, str]:
    def work() -> int:
        if ranks.rank:
            raise DataError(f"of rank {ranks.rank}")
        return 3

    return raised(lambda: together(ranks, work))


def test_of_several_errors_each_rank_raises_one() -> None:
    assert run_on_ranks(3, fail_apart)[0] == ("DataError", "of rank 1")


def wait_long(ranks: Ranks) -> int:
    met = 0
    real = ranks.gather_objects

    def count(value: Any) -> list[Any]:
        nonlocal met
        met += 1
        return real(value)

    with mock.patch.object(node_sharing, "BEAT", 0.1), mock.patch.object(ranks, "gather_objects", count):
        assert together(ranks, lambda: time.sleep(1.0) if ranks.first else None) is None
    return met


def test_ranks_that_wait_hear_from_the_one_that_works_all_the_while() -> None:
    """A collective gives up after 45 seconds, and a big data set takes longer."""
    assert all(5 <= met <= 11 for met in run_on_ranks(2, wait_long))


def on_places(ranks: Ranks, places: list[str | None]) -> dict[str, Any]:
    built = []

    def build() -> dict[str, Tensor]:
        built.append(ranks.rank)
        return {"rank": torch.full((5,), ranks.rank)}

    place = places[ranks.rank]
    with mock.patch.object(node_sharing, "machine", side_effect=[place or OSError] * 9):
        local = node_ranks(ranks)
        before = mapped()
        found = share_tensors(ranks, build)["rank"]
        return {"local": local, "built": built, "found": found.tolist(), "held": len(mapped() - before)}


@pytest.mark.parametrize(
    ("places", "leaders"),
    [(["a", "a", "a"], [0, 0, 0]), (["a", "b", "b"], [0, 1, 1]), (["b", "a", "b"], [0, 1, 0]), ([None] * 3, [0, 1, 2])],
    ids=["one node", "two nodes", "two nodes in turn", "a system that cannot share"],
)
def test_the_lowest_rank_of_each_node_builds_for_the_node(places: list[str | None], leaders: list[int]) -> None:
    for rank, found in enumerate(run_on_ranks(3, on_places, places=places)):
        assert found["local"] == [other for other in range(3) if leaders[other] == leaders[rank]]
        assert found["built"] == ([rank] if leaders[rank] == rank else [])
        assert found["found"] == [leaders[rank]] * 5
        assert found["held"] == (1 if len(found["local"]) > 1 else 0)


def real_places(ranks: Ranks) -> list[int]:
    return node_ranks(ranks)


def test_processes_of_this_machine_are_one_node() -> None:
    assert run_on_ranks(3, real_places) == [[0, 1, 2]] * 3


# -- graphs -------------------------------------------------------------------------------------------------------


def labelled_graph() -> Graph:
    graph = toy_graph()
    labels = labels_of(graph.num_entities, {0: "an umlaut ü", 3: "two\nlines", 7: ""})
    names = graph.relations.names.reverse()
    return Graph(
        "set ü", graph.train, graph.valid, graph.test[:0], Vocabulary(graph.entities.names, labels),
        Vocabulary(names), "5" * 64, ("one warning", "and another"),
    )  # fmt: skip


def share_graph(ranks: Ranks) -> dict[str, Any]:
    before = mapped()
    with mock.patch.object(Vocabulary, "__init__", never if ranks.rank else Vocabulary.__init__):
        graph = shared_graph(ranks, labelled_graph if ranks.first else never)
        sizes = graph.summary()
        unread = "_columns" not in vars(graph.entities) and "_columns" not in vars(graph.relations)
        return {
            "summary": sizes,
            "warnings": graph.warnings,
            "unread": unread,
            "triples": [getattr(graph, split).clone() for split in SPLITS],
            "names": [graph.entities.names.to_list(), graph.relations.names.to_list()],
            "labels": [None if v.labels is None else v.labels.to_list() for v in (graph.entities, graph.relations)],
            "ids": [graph.entities.id("e004"), graph.entities.id("an umlaut ü"), graph.relations.id("r001")],
            "held": len(mapped() - before),
        }


def test_the_second_rank_reads_nothing_and_has_the_same_graph() -> None:
    graph = labelled_graph()
    for found in run_on_ranks(2, share_graph):
        assert (found["summary"], found["warnings"]) == (graph.summary(), graph.warnings)
        assert found["unread"] and found["held"] > 0
        for split, triples in zip(SPLITS, found["triples"], strict=True):
            assert torch.equal(triples, getattr(graph, split)) and triples.dtype == torch.int64
        assert found["names"] == [graph.entities.names.to_list(), graph.relations.names.to_list()]
        assert graph.entities.labels is not None
        assert found["labels"] == [graph.entities.labels.to_list(), None]
        assert found["ids"] == [4, 0, 3]


def graph_of_other_nodes(ranks: Ranks) -> tuple[str, str]:
    with mock.patch.object(node_sharing, "machine", lambda: f"node {ranks.rank // 2}"):
        return raised(lambda: shared_graph(ranks, lambda: toy_graph(seed=ranks.rank)))


def test_nodes_with_different_data_are_refused_on_every_rank() -> None:
    (kind, message), *others = run_on_ranks(3, graph_of_other_nodes)
    assert kind == "DataError" and others == [(kind, message)] * 2
    assert "the node of rank 2 has other data" in message and "give every node the same files" in message


def test_a_vocabulary_survives_packing_whatever_its_names_are() -> None:
    names = ["", "a", "ü" * 40, '"quoted"', "\ufeffmark", "z,;|"]
    for vocabulary in (
        Vocabulary(pl.Series(names)),
        Vocabulary(pl.Series(names[::-1])),
        Vocabulary(pl.Series([], dtype=pl.String)),
    ):
        again = Vocabulary.unpack(vocabulary.pack(), len(vocabulary))
        assert len(again) == len(vocabulary) and again.names.equals(vocabulary.names) and again.labels is None
        assert [again.id(name) for name in vocabulary.names] == list(range(len(vocabulary)))


@pytest.mark.parametrize("names", [["a", "b", "b"], ["b", "a", "b"], ["a", None]], ids=["sorted", "unsorted", "null"])
def test_a_doubled_or_missing_name_is_refused_in_any_order(names: list[str | None]) -> None:
    with pytest.raises(DataError, match="doubled or empty"):
        Vocabulary(pl.Series(names, dtype=pl.String))


def test_two_ranks_report_a_mistake_in_the_data_once(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    with (data / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("only\ttwo\n")
    code, output = distil([small_config(tmp_path / "c.yaml", data), "--out", tmp_path / "run"], tmp_path, world=2)
    # What follows the line is torchrun's own, which sums up what ended each rank.
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0 and output.startswith(said) and "2 columns in" in said
    assert "(exitcode: 2)" in output and "Traceback" not in output.partition("(exitcode")[0]


def test_a_run_on_two_ranks_has_its_data_in_memory_once(tmp_path: Path) -> None:
    config = small_config(tmp_path / "c.yaml", small_data(tmp_path / "data"), student={"epochs": 1000})
    process = start([config, "--out", tmp_path / "run"], tmp_path, world=2)
    wait_for(process, tmp_path, lambda: steps_saved(tmp_path / "run" / "stages" / "student"))
    one, two = (mapped(rank_process(process, rank).pid) for rank in (0, 1))
    kill_all(process)
    # Train, valid, test, both vocabularies; and keys and answers of what train and all of them know.
    assert one == two and len(one) >= 9


# -- known answers ------------------------------------------------------------------------------------------------


def share_answers(ranks: Ranks) -> tuple[int, list[list[int]], set[str]]:
    graph, before = toy_graph(), mapped()
    splits = [graph.train, graph.valid, graph.test]
    with mock.patch.object(sharing, "KnownAnswers", wraps=KnownAnswers) as made:
        made.from_tensors = KnownAnswers.from_tensors
        answers = shared_answers(ranks, splits, graph.num_entities)
    found = answers.pairs(both_sides(graph.test))
    return made.call_count, [part.tolist() for part in found], mapped() - before


def test_known_answers_are_sorted_once_per_node() -> None:
    graph = toy_graph()
    everything = torch.cat([graph.train, graph.valid, graph.test])
    expected = [part.tolist() for part in KnownAnswers(everything, graph.num_entities).pairs(both_sides(graph.test))]
    found = run_on_ranks(3, share_answers)
    assert [calls for calls, _, _ in found] == [1, 0, 0]
    for _, pairs, held in found:
        assert pairs == expected
        assert held == found[0][2] and len(held) == 2
