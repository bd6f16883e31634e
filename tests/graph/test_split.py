"""A file becomes a data set: the same for the same seed, no unseen words in what is held out, leaks are told."""

import random
from pathlib import Path

import pytest
import torch

from distkgd.errors import DataError
from distkgd.graph import Graph
from distkgd.graph.readers import read_folder
from distkgd.graph.split import Split, leaking, split_file, twins_of
from distkgd.own.command import write_split
from tests.own_graphs import own_triples, write_tsv

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def triples() -> list[tuple[str, str, str]]:
    return own_triples(2000, 300, 8)


def words(graph: Graph, split: str) -> set[tuple[str, str, str]]:
    names = graph.entities.names.to_list(), graph.relations.names.to_list()
    return {(names[0][h], names[1][r], names[0][t]) for h, r, t in getattr(graph, split).tolist()}


def split(tmp_path: Path, rows: list[tuple[str, str, str]], **how: object) -> Split:
    return split_file(write_tsv(tmp_path / "mine.tsv", rows), "mine", **how)  # type: ignore[arg-type]


def test_every_triple_is_in_one_split_and_held_out_words_are_in_train(
    tmp_path: Path, triples: list[tuple[str, str, str]]
) -> None:
    found = split(tmp_path, [*triples, *triples[:7]])
    graph = found.graph
    parts = [words(graph, name) for name in SPLITS]
    assert set.union(*parts) == set(triples) and sum(map(len, parts)) == len(set(triples))
    assert len(parts[1]) == len(parts[2]) == round(0.05 * len(set(triples)))
    seen = graph.train[:, [0, 2]].unique()
    for held in (graph.valid, graph.test):
        assert torch.isin(held[:, [0, 2]], seen).all() and torch.isin(held[:, 1], graph.train[:, 1]).all()
    assert any("the repeats were dropped" in note for note in found.notes)


def test_neither_the_order_of_lines_nor_repeats_change_the_split_and_the_seed_does(
    tmp_path: Path, triples: list[tuple[str, str, str]]
) -> None:
    mixed = [*triples, *triples[:50]]
    random.Random(1).shuffle(mixed)
    one, two, other = split(tmp_path, triples), split(tmp_path, mixed), split(tmp_path, triples, seed=1)
    assert one.files == two.files and one.graph.sha256 == two.graph.sha256
    assert one.files != other.files


def test_unseen_entities_are_held_out_only_if_asked_and_relations_never(tmp_path: Path) -> None:
    rows = [(f"a{i}", f"r{i % 3}", f"b{i}") for i in range(200)]
    with pytest.raises(DataError, match=r"200 distinct triples 0 can be held out.*--allow-unseen"):
        split(tmp_path, rows)
    graph = split(tmp_path, rows, allow_unseen=True).graph
    assert len(graph.test) == 10 and torch.isin(graph.test[:, 1], graph.train[:, 1]).all()
    assert any("hold an entity that train lacks" in warning for warning in graph.warnings)


def test_what_is_written_reads_as_the_same_graph(tmp_path: Path, triples: list[tuple[str, str, str]]) -> None:
    found = split(tmp_path, triples)
    write_split(found, tmp_path / "out" / "mine")
    graph = read_folder(tmp_path / "out" / "mine")
    assert graph.summary() == found.graph.summary()
    for name in SPLITS:
        assert torch.equal(getattr(graph, name), getattr(found.graph, name))
    for kind in ("entities", "relations"):
        assert getattr(graph, kind).names.equals(getattr(found.graph, kind).names)


def test_a_folder_of_another_split_is_left_alone(tmp_path: Path, triples: list[tuple[str, str, str]]) -> None:
    one, other = split(tmp_path, triples), split(tmp_path, triples, seed=1)
    write_split(one, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_split(one, tmp_path / "out")
    with pytest.raises(DataError, match="holds another split"):
        write_split(other, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("number", [2, 3, 10])
def test_tiny_graphs_are_split_or_refused_with_numbers(tmp_path: Path, number: int) -> None:
    square = [(a, "r", b) for a in "abcd" for b in "abcd"][:number]
    if number < 10:
        with pytest.raises(DataError, match=f"of {number} distinct triples"):
            split(tmp_path, square)
        return
    found = split(tmp_path, square)
    assert [len(getattr(found.graph, name)) for name in SPLITS] == [8, 1, 1]
    assert any("figures of so few" in note for note in found.notes)


def naive_twins(triples: set[tuple[int, int, int]], relations: int) -> dict[tuple[int, int, bool], float]:
    found = {}
    for a in range(relations):
        mine = [(h, t) for h, r, t in triples if r == a]
        for b in range(relations):
            for turned in (False, True):
                hits = [(h, t) for h, t in mine if h != t and ((t, b, h) if turned else (h, b, t)) in triples]
                if (turned or a != b) and len(hits) >= 5 and len(hits) / len(mine) >= 0.8:
                    found[a, b, turned] = len(hits) / len(mine)
    return found


def test_twins_and_leaks_are_those_of_the_naive_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(30, (120, 2), generator=generator).tolist()
    rows = {(a, 0, b) for a, b in pairs} | {(b, 1, a) for a, b in pairs[:100]} | {(a, 2, b) for a, b in pairs[:20]}
    rows |= {(a, 3, b) for a, b in pairs[:40]} | {(b, 3, a) for a, b in pairs[:40]} | {(5, 4, 5), (6, 4, 6)}
    triples = torch.tensor(sorted(rows))
    twins = twins_of(triples, 5)
    expected = naive_twins(rows, 5)
    assert twins == expected
    assert {(1, 0, True), (2, 0, False), (3, 3, True)} <= set(twins) and not any(a == 4 for a, _, _ in twins)
    mask = torch.rand(len(triples), generator=generator) < 0.3
    held, train = triples[mask], triples[~mask]
    known = set(map(tuple, train.tolist()))
    naive = [
        any(((t, b, h) if turned else (h, b, t)) in known for a, b, turned in twins if a == r)
        for h, r, t in held.tolist()
    ]
    assert leaking(held, train, twins).tolist() == naive
    assert any(naive) and not all(naive)


def test_leaks_are_told_with_their_relations(tmp_path: Path, triples: list[tuple[str, str, str]]) -> None:
    assert not split(tmp_path, triples).leaks["test"]
    doubled = [*triples, *((t, "back", h) for h, r, t in triples if r == "r00")]
    found = split(tmp_path, doubled)
    assert found.leaks["test"] > 0
    assert {(twin.relation, twin.of, twin.turned) for twin in found.twins} == {
        ("r00", "back", True),
        ("back", "r00", True),
    }
    (note,) = [note for note in found.notes if note.startswith("leakage")]
    assert "'r00' is 'back' turned round" in note and f"test {found.leaks['test']:,} of" in note
