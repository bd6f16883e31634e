"""A file becomes a data set: the same for the same seed, no unseen words in what is held out, leaks are told."""

import random
from pathlib import Path

import polars as pl
import pytest
import torch

from distkgd.data import Graph, leaks
from distkgd.data.leaks import SAMPLED, find_leaks
from distkgd.data.reading.folders import read_folder
from distkgd.data.split import Split, split_file
from distkgd.errors import DataError
from distkgd.pipeline.autoconfig.command import write_split
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


def test_triples_that_moved_to_another_split_make_another_graph(tmp_path: Path) -> None:
    lines, ends = [f"a{i}\tr\tb{i % 3}\n" for i in range(12)], ((8, 10), (9, 10))
    found = []
    for number, (valid, test) in enumerate(ends):
        (tmp_path / str(number)).mkdir()
        for name, part in zip(SPLITS, (lines[:valid], lines[valid:test], lines[test:]), strict=True):
            (tmp_path / str(number) / f"{name}.tsv").write_text("".join(part), encoding="utf-8")
        found.append(read_folder(tmp_path / str(number)))
    one, other = found
    assert one.is_of(one.summary()) and not one.is_of(other.summary()) and one.identity != other.identity


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
    twins = leaks._twin_shares([triples], 5, range(5))
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
    nothing, names = torch.empty(0, 3).long(), pl.Series([f"r{i}" for i in range(5)])
    for valid, test in ((held, nothing), (held[:9], held[9:])):
        found = find_leaks({"train": train, "valid": valid, "test": test}, names)
        at = len(valid)
        assert found.counts == {"valid": (sum(naive[:at]), at), "test": (sum(naive[at:]), len(test))}
        assert {(twin.relation, twin.of, twin.turned) for twin in found.twins} == {
            (f"r{a}", f"r{b}", turned) for a, b, turned in twins
        }
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


def test_a_folder_tells_the_leaks_that_one_file_of_the_same_triples_tells(
    tmp_path: Path, triples: list[tuple[str, str, str]]
) -> None:
    doubled = [*triples, *((t, "back", h) for h, r, t in triples if r == "r00")]
    found = split(tmp_path, doubled)
    (note,) = [note for note in found.notes if note.startswith("leakage")]
    write_split(found, tmp_path / "folder")
    assert [one for one in read_folder(tmp_path / "folder").warnings if one.startswith("leakage")] == [note]
    assert not any(one.startswith("leakage") for one in found.graph.warnings)  # it is told once


def test_a_large_relation_is_judged_by_a_sample_and_only_held_out_triples_make_it_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.unique(torch.randint(100, 4000, (5 * SAMPLED, 2), generator=generator), dim=0)
    turned = pairs[: int(0.9 * len(pairs))]
    rows = [
        torch.stack([a[:, i], torch.full((len(a),), r), a[:, 1 - i]], 1) for r, a, i in ((0, pairs, 0), (1, turned, 1))
    ]
    share = leaks._twin_shares([torch.cat(rows)], 2, range(2))[0, 1, True]
    assert share != 0.9 and abs(share - 0.9) < 0.03
    asked: list[int] = []
    monkeypatch.setattr(leaks, "_twin_shares", lambda *_: asked.append(1) or {})
    names = pl.Series(["a", "b"])
    find_leaks({"train": torch.cat(rows), "valid": torch.tensor([[1, 0, 2]]), "test": torch.zeros(0, 3).long()}, names)
    assert not asked  # no held-out pair is in train, so relations are not looked at
    find_leaks({"train": torch.cat(rows), "valid": rows[1][:1], "test": torch.zeros(0, 3).long()}, names)
    assert asked


@pytest.mark.parametrize(
    ("valid", "test", "warned"),
    [
        ("a r b\nc r d\n", "c r d\na r b\n", "test: its 2 triples are those of valid; figures of test are of what"),
        ("a r b\nc r d\n", "c r d\nb r a\n", "test: 1 of 2 triples are in valid too; they are kept"),
        ("a r c\nc r d\n", "b r a\n", "valid: 1 of 2 triples are in train too; they are kept"),
    ],
)
def test_held_out_splits_that_overlap_are_told_with_counts(tmp_path: Path, valid: str, test: str, warned: str) -> None:
    parts = {"train": "a r c\nb r d\nd r c\n", "valid": valid, "test": test}
    for name, text in parts.items():
        (tmp_path / f"{name}.tsv").write_text(text.replace(" ", "\t"), encoding="utf-8")
    (found,) = [one for one in read_folder(tmp_path).warnings if "leakage" not in one]
    assert found.startswith(warned)
