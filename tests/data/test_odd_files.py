"""Files and folders as people have them become the graph that a dozen lines of Python read, or are refused by name."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distkgd.data import Graph, load_graph
from distkgd.data.reading.folders import read_files
from distkgd.data.reading.formats import How
from distkgd.data.split import split_file
from distkgd.errors import DataError
from tests.odd_files import RDF, SPLITS, Case, Triple, odd_folders, odd_openke, odd_single_files

# Files of which a part could be taken for something else: name -> bytes, and the triples that are meant.
MEANT: dict[str, tuple[str, bytes, list[Triple]]] = {
    "names that are words of headers": ("g.tsv", b"h\tr\tt\nt\tr\th\nh\tr\ta\n", [("h", "r", "t"), ("t", "r", "h"),
        ("h", "r", "a")]),
    "quotes that hold a blank": ("g.csv", b'"a ",r,b\na,r,b\n', [("a ", "r", "b"), ("a", "r", "b")]),
    "quotes that hold needless blanks": ("g.csv", b'"a ",r," z"\nb,r,c\n', [("a", "r", "z"), ("b", "r", "c")]),
    "quotes that belong to names": ("g.tsv", b'"a"\tr\t"b"\n"c"\tr\td\n', [('"a"', "r", '"b"'), ('"c"', "r", "d")]),
    "quoted words and bare numbers": ("g.tsv", b'1\t"r"\t"b"\n2\t"r"\t"d"\n', [("1", "r", "b"), ("2", "r", "d")]),
    "an empty column behind quotes": ("g.tsv", b'"a"\t"r"\t"b"\t\n"c"\t"r"\t"d"\t\n', [("a", "r", "b"), ("c", "r",
        "d")]),
    "quotes in quotes": ("g.csv", b'"a ""b""",r,c\nc,r,d\n', [('a "b"', "r", "c"), ("c", "r", "d")]),
    "commas with TABs": ("g.txt", b"a,\tr,\tb\nc,\tr,\td\n", [("a", "r", "b"), ("c", "r", "d")]),
    "commas in names between semicolons": (
        "g.csv", b"a, x;r;b, y\nc;r;d\n", [("a, x", "r", "b, y"), ("c", "r", "d")]
    ),
    "semicolons in names between commas": ("g.csv", b"a;x,r,b;y\nc,r,d\n", [("a;x", "r", "b;y"), ("c", "r", "d")]),
    "a column of numbers in front": ("g.csv", b",head,relation,tail\n0,a,r,b\n1,c,r,d\n", [("a", "r", "b"), ("c",
        "r", "d")]),
    "a header in every file of a joined one": ("g.tsv",
        b"head\trelation\ttail\na\tr\tb\nhead\trelation\ttail\nc\tr\td\n",
                                               [("a", "r", "b"), ("c", "r", "d")]),
    "a first name that begins with #": ("g.tsv", b"#a\tr\tb\nc\tr\t#a\n", [("#a", "r", "b"), ("c", "r", "#a")]),
    "numbers alone": ("g.txt", b"3\t1\t2\n1\t1\t3\n", [("3", "1", "2"), ("1", "1", "3")]),
    "numbers between commas": ("g.csv", b"3,1,2\n1,1,3\n", [("3", "1", "2"), ("1", "1", "3")]),
    "words of missing values": ("g.csv", b"NA,null,NaN\nnan,null,None\n", [("NA", "null", "NaN"), ("nan", "null",
        "None")]),
    "the next line of EBCDIC": ("g.tsv", "a\tr\tb\u0085\nc\tr\td\n".encode(), [("a", "r", "b"), ("c", "r", "d")]),
    "one line": ("g.tsv", b"a\tr\tb", [("a", "r", "b")]),
    "statements without a line end": ("g.nt", b"<x:a> <x:r> <x:b> .", [("x:a", "x:r", "x:b")]),
    "statements with line ends of old": ("g.nt", b"<x:a> <x:r> <x:b> .\r<x:a> <x:r> <x:c> .\r", [("x:a", "x:r",
        "x:b"), ("x:a", "x:r", "x:c")]),
    "nodes without a label": (
        "g.ttl", b"@prefix x: <http://x/> .\nx:a x:r [ x:s _:b1 ] .\n_:b1 x:s [] .",
        [("[] 1 of g.ttl", "http://x/s", "_:b1"), ("http://x/a", "http://x/r", "[] 1 of g.ttl"), ("_:b1",
        "http://x/s", "[] 2 of g.ttl")],
    ),
}  # fmt: skip
TEXT = (".txt", ".tsv", ".csv", ".txt.gz", ".tsv.gz", ".csv.gz")
TRIPLES = (*RDF, *(ending + ".gz" for ending in RDF))
FOLDERS: dict[str, Callable[[], Iterator[Case]]] = {
    "text": lambda: odd_folders("text", TEXT, 80),
    "parquet": lambda: odd_folders("parquet", (".parquet",), 20),
    "rdf": lambda: odd_folders("rdf", TRIPLES, 30, rdf=True),
    "mixed": lambda: odd_folders("mixed", (*TEXT, ".parquet", *TRIPLES), 40, rdf=True),
    "openke": lambda: odd_openke(20),
}
FILES: dict[str, Callable[[], Iterator[Case]]] = {
    "text": lambda: odd_single_files("one text", TEXT, 50),
    "parquet": lambda: odd_single_files("one parquet", (".parquet",), 15),
    "rdf": lambda: odd_single_files("one rdf", TRIPLES, 25, rdf=True),
}


def words(graph: Graph, split: str) -> list[Triple]:
    rows = getattr(graph, split).tolist()
    return [(graph.entities.name(h), graph.relations.name(r), graph.entities.name(t)) for h, r, t in rows]


def compared(graph: Graph, expected: dict[str, list[Triple]]) -> None:
    for split in SPLITS:
        assert words(graph, split) == list(dict.fromkeys(expected[split])), split
    every = [triple for split in SPLITS for triple in expected[split]]
    assert graph.entities.names.to_list() == sorted({name for head, _, tail in every for name in (head, tail)})
    assert graph.relations.names.to_list() == sorted({relation for _, relation, _ in every})


@pytest.mark.parametrize("kind", FOLDERS)
def test_an_odd_folder_becomes_the_graph_that_a_plain_reader_reads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, seen = [], set()
    for number, case in enumerate(FOLDERS[kind]()):
        seen.add(tuple(sorted(case.files.items())))
        place = case.write(tmp_path / str(number) / case.folder)
        monkeypatch.chdir(place.parent)
        try:
            compared(load_graph(str(place) if number % 2 else Path(case.folder)), case.expected)
        except (AssertionError, DataError) as error:
            wrong.append(f"{kind} {number}, {sorted(case.files)}: {str(error)[:400]}")
    assert not wrong, "\n".join([f"{len(wrong)} folders", *wrong])
    assert len(seen) == number + 1, "some are drawn twice"


@pytest.mark.parametrize("kind", FILES)
def test_an_odd_file_is_split_into_the_triples_that_a_plain_reader_reads(kind: str, tmp_path: Path) -> None:
    wrong = []
    for number, case in enumerate(FILES[kind]()):
        (name,) = case.files
        path = case.write(tmp_path / str(number) / case.folder) / name
        try:
            found = split_file(path, "mine", seed=number, allow_unseen=True, how=How(columns=case.columns))
            parts = {split: words(found.graph, split) for split in SPLITS}
            assert sorted(itertools.chain(*parts.values())) == sorted(set(case.expected["train"]))
            for split in SPLITS:
                assert "".join("\t".join(row) + "\n" for row in parts[split]).encode() == found.files[split]
        except (AssertionError, DataError) as error:
            wrong.append(f"{kind} {number}, {name}, {case.columns}: {str(error)[:400]}")
    assert not wrong, "\n".join([f"{len(wrong)} files", *wrong])


@pytest.mark.parametrize("name", MEANT)
def test_what_could_be_taken_for_something_else_is_read_as_it_was_meant(name: str, tmp_path: Path) -> None:
    file, data, expected = MEANT[name]
    (tmp_path / file).write_bytes(data)
    for _ in range(2):  # alike at every reading
        found = read_files({"train": tmp_path / file})
        rows = found.rows["train"].tolist()
        assert [(found.entities[h], found.relations[r], found.entities[t]) for h, r, t in rows] == expected


def test_where_commas_and_semicolons_are_as_good_it_is_said_which_was_taken(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_bytes(b"Paris, F;in;Europe, W\nRome, I;in;Europe, S\n")
    notes = read_files({"train": tmp_path / "g.csv"}).notes
    assert any("commas and semicolons could both" in note for note in notes)


def test_of_two_files_that_differ_in_capitals_one_is_read_and_the_other_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(b"a\tr\tb\n")
    (tmp_path / "Train.TSV").write_bytes(b"c\tr\td\n")
    graph = load_graph(tmp_path)
    assert words(graph, "train") == [("a", "r", "b")]
    assert any("Train.TSV: not read" in warning for warning in graph.warnings)
