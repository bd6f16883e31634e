"""The compiled way of reading text and the way of polars: the same graphs, the same messages."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distkgd.data import Graph, triples
from distkgd.data.reading import folders
from distkgd.data.reading.folders import read_folder
from distkgd.errors import DataError
from distkgd.kernels import names
from distkgd.kernels.build import library
from tests.data.reading.test_malformed_folders import KINDS, Folder, draw_folder

pytestmark = pytest.mark.skipif(library("names") is None, reason="no C++ compiler")


def outcome(read: Callable[[], Graph]) -> object:
    """Everything that a reader gives, or its message."""
    try:
        graph = read()
    except DataError as error:
        return str(error)
    vocabularies = [
        (vocabulary.names.to_list(), None if vocabulary.labels is None else vocabulary.labels.to_list())
        for vocabulary in (graph.entities, graph.relations)
    ]
    rows = [getattr(graph, split).tolist() for split in ("train", "valid", "test")]
    assert all(getattr(graph, split).dtype == torch.int64 for split in ("train", "valid", "test"))
    return rows, vocabularies, graph.sha256, graph.warnings


def both_ways(path: Path) -> tuple[object, object]:
    compiled = outcome(lambda: read_folder(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "library", lambda name: None)
        return compiled, outcome(lambda: read_folder(path))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_both_ways_refuse_a_damaged_folder_in_the_same_words(
    tmp_path: Path, kind: Callable[[Folder], object], seed: int
) -> None:
    folder = draw_folder(f"ways {kind.__name__} {seed}")
    kind(folder)
    folder.write(tmp_path / "data")
    compiled, plain = both_ways(tmp_path / "data")
    assert isinstance(plain, str)
    assert compiled == plain


@pytest.mark.parametrize("seed", range(10))
def test_both_ways_read_the_same_graph(tmp_path: Path, seed: int) -> None:
    folder = draw_folder(f"ways {seed}")
    folder.raw["names.tsv"] = b"name\tlabel\n" + "entité1\tEntité\n".encode()
    for split in ("valid", "test"):
        folder.lines[split] += folder.lines["train"][:2] + folder.lines["train"][:1] + [b"new\tlikes\tnewer"]
    folder.write(tmp_path / "data")
    compiled, plain = both_ways(tmp_path / "data")
    assert not isinstance(plain, str)
    assert compiled == plain


PIECES = [
    b"a\tr\tb\n", b"b\tr\ta\n", b'"a,",r,b\n', b"a,r,b\n", b"a", b"b", b"\t", b"\n", b"\r", b"\r\n", b"\0", b",", b'"',
    b" ", b"\xc2\xa0", b"\x1c", b"\xc3\xa9", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xff",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES[:4]) | st.sampled_from(PIECES), min_size=1, max_size=8).map(b"".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=TEXT, valid=TEXT, ending=st.sampled_from([".tsv", ".csv"]))
def test_both_ways_make_the_same_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, train: bytes, valid: bytes, ending: str
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / f"train{ending}").write_bytes(train)
    (folder / f"valid{ending}").write_bytes(valid)
    compiled, plain = both_ways(folder)
    assert compiled == plain


def test_what_is_in_order_goes_the_compiled_way_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "clean_text", None)
    (tmp_path / "train.csv").write_bytes("\ufeffa,r,é\r\né,r,a\r\n".encode())
    (tmp_path / "valid.tsv").write_bytes(b"b\tr\ta\n")
    graph = read_folder(tmp_path)
    assert graph.entities.names.to_list() == ["a", "b", "é"]
    assert graph.train.tolist() == [[0, 0, 2], [2, 0, 0]]
    assert graph.valid.tolist() == [[1, 0, 0]]


def test_a_home_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(names, "library", refused)
    (tmp_path / "train.tsv").write_bytes(b"b\tr\ta\n")
    assert read_folder(tmp_path).train.tolist() == [[1, 0, 0]]


def test_quoted_and_plain_files_share_their_names(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b'"b, c",r,"a ""x"""\n')
    (tmp_path / "valid.tsv").write_bytes(b'a "x"\tr\tb, c\n\xef\xbb\xbfz\tr\ta "x"\n')
    compiled, plain = both_ways(tmp_path)
    assert compiled == plain
    graph = read_folder(tmp_path)
    assert graph.entities.names.to_list() == ['a "x"', "b, c", "\ufeffz"]
    assert graph.valid.tolist() == [[0, 0, 1], [2, 0, 0]]


def test_a_name_may_begin_with_a_byte_order_mark_and_be_the_first(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes("\uffff\tr\t\ufeffz\n".encode())
    assert read_folder(tmp_path).entities.names.to_list() == ["\ufeffz", "\uffff"]


def test_both_ways_drop_a_second_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(2 * b"\xef\xbb\xbf" + b"a\tr\tb\n")
    compiled, plain = both_ways(tmp_path)
    assert compiled == plain
    assert read_folder(tmp_path).entities.names.to_list() == ["a", "b"]


def test_triples_too_many_for_one_number_each_are_told_apart() -> None:
    rows = torch.tensor([[0, 0, 0], [2**31, 0, 0]])  # 2^31 * 2 * 2^32 = 0 modulo 2^64
    assert triples._keys(rows, 2**32, 2).n_unique() == 2


@pytest.mark.parametrize("most", [0, triples._MOST_KEYS])
def test_repeats_and_leaks_are_counted_whether_or_not_a_number_tells_all_triples_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(triples, "_MOST_KEYS", most)
    (tmp_path / "train.tsv").write_bytes(b"b\tr\ta\na\tr\tb\nb\tr\ta\na\ts\tb\na\tr\tb\n")
    (tmp_path / "valid.tsv").write_bytes(b"a\tr\tb\nz\tr\ta\na\tr\tb\n")
    graph = read_folder(tmp_path)
    assert graph.train.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    assert graph.train.is_contiguous()
    assert graph.valid.tolist() == [[0, 0, 1], [2, 0, 0]]
    assert graph.warnings == (
        "test: no such file in " + str(tmp_path) + "; the split is empty",
        "train: 2 of 5 triples were there twice; the repeats were dropped",
        "valid: 1 of 3 triples were there twice; the repeats were dropped",
        "valid: 1 of 2 triples hold an entity that train lacks; they are kept",
        "valid: 1 of 2 triples are in train too; they are kept",
    )
