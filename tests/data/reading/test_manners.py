"""Triples as people have them: whatever way a file is written, alone or in a folder it is the same graph, and said."""

import gzip
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pytest

from distkgd.data import Graph, load_graph
from distkgd.data.reading.folders import read_files
from distkgd.data.reading.formats import AS_THEY_ARE, ENDINGS, How
from distkgd.data.split import copy_folder, split_file
from distkgd.errors import ConfigError, DataError
from distkgd.kernels import names as compiled
from distkgd.pipeline.autoconfig.command import write_split

Rows = list[tuple[str, str, str]]
# Thirty entities and three relations, as a made graph has them; every word comes again.
ROWS: Rows = [(f"e{i % 30}", f"r{i % 3}", f"e{(7 * i + 4 * (i // 30)) % 30}") for i in range(120)]


def lines(rows: Iterable[Iterable[str]], mark: str = "\t") -> str:
    return "".join(mark.join(row) + "\n" for row in rows)


def rows_of(graph: Graph, split: str = "train") -> Rows:
    found = getattr(graph, split).tolist()
    return [(graph.entities.name(h), graph.relations.name(r), graph.entities.name(t)) for h, r, t in found]


def read(
    path: Path, content: str | bytes, ending: str = ".tsv", how: How = AS_THEY_ARE, compile: bool = True
) -> tuple[Rows, list[str]]:
    """Triples and notes of a file, which are the same in a folder, and without a compiler."""
    data = content if isinstance(content, bytes) else content.encode()
    (path / "folder").mkdir(exist_ok=True, parents=True)
    (path / "folder" / f"train{ending}").write_bytes(data)
    found = read_files({"train": path / "folder" / f"train{ending}"}, how)
    rows = [(found.entities[h], found.relations[r], found.entities[t]) for h, r, t in found.rows["train"].tolist()]
    graph = load_graph(path / "folder", how)
    assert rows_of(graph) == list(dict.fromkeys(rows)), "a file alone and in a folder differ"
    assert [note for note in graph.warnings if note in found.notes] == found.notes
    if compile:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "library", lambda name: None)
            assert read(path, data, ending, how, compile=False) == (rows, found.notes)
    return rows, found.notes


def quoted(rows: Rows, mark: str = "\t") -> str:
    return lines([[f'"{word}"' for word in row] for row in rows], mark)


# -- white space ------------------------------------------------------------------------------------------------------

SPACED = {
    "a blank behind every comma": (lines(ROWS, ", "), ".csv", 240),
    "a blank behind every second tail": (
        lines((h, r, t + " " * (i % 2)) for i, (h, r, t) in enumerate(ROWS)),
        ".tsv",
        60,
    ),
    "blanks all around": (lines([f" {word}  " for word in row] for row in ROWS), ".txt", 360),
    "no-break and wide blanks": (lines((f"\u00a0{h}", r, f"{t}\u3000") for h, r, t in ROWS), ".tsv", 240),
    "blanks before commas": (lines(ROWS, " , "), ".csv", 360),
}


@pytest.mark.parametrize("kind", SPACED)
def test_white_space_at_the_ends_of_fields_goes_and_is_counted(tmp_path: Path, kind: str) -> None:
    text, ending, count = SPACED[kind]
    rows, notes = read(tmp_path, text, ending)
    assert rows == ROWS
    assert f"train{ending}: white space at the ends of {count:,} fields was dropped" in notes


def test_names_that_differ_in_outer_white_space_alone_are_reported(tmp_path: Path) -> None:
    _, notes = read(tmp_path, lines([*ROWS, ("e3 ", "r1", "e4")]))
    assert (
        "1 names of entities are written with and without outer white space, such as 'e3 ' and 'e3'; they are taken as "
        "one" in notes
    )


def test_white_space_within_quotes_stays_where_a_name_needs_it(tmp_path: Path) -> None:
    rows, notes = read(tmp_path, '"a","r","b"\n" a","r","b"\n"c ","r", d\n', ".csv")
    assert rows == [("a", "r", "b"), (" a", "r", "b"), ("c", "r", "d")]
    assert any("' a' and 'a'; quotes hold it, so they are kept apart" in note for note in notes)
    assert "train.csv: white space at the ends of 2 fields was dropped" in notes


def test_blanks_in_valid_alone_make_no_unseen_entities(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(lines(ROWS[:100]))
    (tmp_path / "valid.tsv").write_text(lines((h, r, t + " ") for h, r, t in ROWS[100:]))
    graph = load_graph(tmp_path)
    assert graph.num_entities == 30 and rows_of(graph, "valid") == ROWS[100:]
    assert not any("train lacks" in warning for warning in graph.warnings)


# -- quotes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (quoted(ROWS), ".tsv"),
        (quoted(ROWS, ","), ".csv"),
        (quoted(ROWS, ", "), ".csv"),
        (quoted(ROWS, " , "), ".csv"),
        (quoted(ROWS, ";"), ".csv"),
        (quoted(ROWS).replace("\n", " \r\n"), ".txt"),
        (quoted(ROWS).replace("\n", " \t\n"), ".txt"),
        ("\ufeff" + quoted(ROWS, ","), ".csv"),
        ('"head"\t"relation"\t"tail"\n' + quoted(ROWS), ".tsv"),
        ("head\trelation\ttail\n" + quoted(ROWS), ".tsv"),
        (quoted(ROWS[:1], ",") + lines(ROWS[1:], ","), ".csv"),
        (lines(ROWS[:1], ",") + quoted(ROWS[1:], ","), ".csv"),
    ],
)
def test_quotes_around_fields_are_no_part_of_names(tmp_path: Path, text: str, ending: str) -> None:
    assert read(tmp_path, text, ending)[0] == ROWS


def test_numbers_may_stand_without_quotes_where_words_have_them(tmp_path: Path) -> None:
    rows = [(h, r[1:], t) for h, r, t in ROWS]
    assert read(tmp_path, lines((f'"{h}"', r, f'"{t}"') for h, r, t in rows))[0] == rows


def test_quotes_in_the_middle_of_names_and_of_some_names_stay(tmp_path: Path) -> None:
    rows = [('5" disk', "made_of", '"steel"'), ("x", "label", '"X"@en'), ("x", "made_of", "steel")]
    found, notes = read(tmp_path, lines(rows))
    assert found == rows
    assert any("""such as '"steel"' and 'steel'; they are kept apart""" in note for note in notes)
    assert read(tmp_path / "csv", '5" disk,made_of,steel\n', ".csv")[0] == [('5" disk', "made_of", "steel")]


def test_a_folder_may_have_quotes_in_one_file_and_none_in_another(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(quoted(ROWS[:100]))
    (tmp_path / "valid.tsv").write_text(lines(ROWS[100:]))
    graph = load_graph(tmp_path)
    assert rows_of(graph) + rows_of(graph, "valid") == ROWS


# -- headers, comments, lines that are no triples ---------------------------------------------------------------------

HEADERS = [
    "head\trelation\ttail", "HEAD\tRelation\tTail", "h\tr\tt", "s\tp\to", "subject\tpredicate\tobject",
    "source\ttype\ttarget", "from\tedge type\tto", "node1\tlabel\tnode2", "?s\t?p\t?o", ":START_ID\t:TYPE\t:END_ID",
    "# head\trelation\ttail", " head \t relation\ttail", "head_id\trelation_id\ttail_id",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("number", [2, 120])
def test_a_header_is_recognised_whatever_the_length_of_its_file(tmp_path: Path, header: str, number: int) -> None:
    rows, notes = read(tmp_path, f"{header}\n" + lines(ROWS[:number]))
    assert rows == ROWS[:number]
    assert notes[0].startswith("train.tsv: line 1 is taken as a header: ")


def test_a_header_may_be_in_one_split_alone_and_order_columns(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(lines(ROWS[:100]))
    (tmp_path / "valid.csv").write_text("tail,relation,head\n" + lines((row[::-1] for row in ROWS[100:110]), ","))
    (tmp_path / "test.tsv").write_text("h\tr\tt\tweight\n" + lines((*row, "0.5") for row in ROWS[110:]))
    graph = load_graph(tmp_path)
    assert rows_of(graph) + rows_of(graph, "valid") + rows_of(graph, "test") == ROWS
    assert graph.warnings == (
        "valid.csv: line 1 is taken as a header: tail, relation, head",
        "test.tsv: line 1 is taken as a header: h, r, t; not used: weight",
    )


def test_a_header_that_comes_again_is_left_out_each_time(tmp_path: Path) -> None:
    header = "head\trelation\ttail\n"
    rows, notes = read(tmp_path, header + lines(ROWS[:60]) + header + lines(ROWS[60:]))
    assert rows == ROWS and "train.tsv: 1 more lines like the header were skipped" in notes


def test_names_that_are_those_of_columns_are_a_triple_where_they_come_again(tmp_path: Path) -> None:
    rows = [("s", "r", "o"), ("o", "r", "t"), ("t", "r", "s")]
    assert read(tmp_path, lines(rows)) == (rows, [])


def test_a_first_line_of_words_that_come_nowhere_else_is_reported_and_kept(tmp_path: Path) -> None:
    first = ("von", "wie", "zu")
    rows, notes = read(tmp_path, lines([first, *ROWS[:12]]))
    assert rows == [first, *ROWS[:12]]
    (note,) = notes
    assert "train.tsv, line 1 ('von', 'wie', 'zu') is taken as a triple" in note and "if it is a header" in note


def test_a_strange_first_line_of_valid_is_refused_with_the_hint_that_it_may_be_a_header(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:100]), ("valid", ROWS[100:])):
        (tmp_path / f"{split}.tsv").write_text(lines([("von", "wie" + split, "zu"), *rows]))
    with pytest.raises(DataError, match=r"valid\.tsv, line 1: .*if this line is a header, remove it"):
        load_graph(tmp_path)


def test_lines_that_are_no_triples_are_skipped_and_counted(tmp_path: Path) -> None:
    text = "# made by hand\n" + lines(ROWS[:50]) + "\n  \n#\n# more, and more\n\t\t\n" + lines(ROWS[50:])
    rows, notes = read(tmp_path, text)
    assert rows == ROWS
    assert notes == [
        "train.tsv: 3 blank lines were skipped",
        "train.tsv: 3 lines that begin with # and hold no triple were skipped",
    ]
    assert read(tmp_path / "names", "#a\tr\tb\n#b\tr\t#a\n")[0] == [("#a", "r", "b"), ("#b", "r", "#a")]


def test_what_was_left_out_is_told_in_one_order(tmp_path: Path) -> None:
    header = "head\trelation\ttail\n"
    empty = "".join(f"{line}\t\n" for line in lines(ROWS[60:]).splitlines())
    rows, notes = read(tmp_path, header + lines(ROWS[:60]) + header + "# more\n\n" + empty)
    assert rows == ROWS
    assert [note.partition(": ")[2] for note in notes[1:]] == [
        "1 blank lines were skipped",
        "1 lines that begin with # and hold no triple were skipped",
        "1 more lines like the header were skipped",
        "60 lines had empty fields behind the last column, which were dropped",
    ]


@pytest.mark.parametrize(("mark", "ending"), [("\t", ".tsv"), (",", ".csv")])
def test_empty_fields_behind_the_last_column_are_dropped_and_counted(tmp_path: Path, mark: str, ending: str) -> None:
    rows, notes = read(
        tmp_path,
        lines([*row, "", ""][: 3 + i % 3] for i, row in enumerate(ROWS))
        if mark == "\t"
        else lines(([*row, "", ""][: 3 + i % 3] for i, row in enumerate(ROWS)), mark),
        ending,
    )
    assert rows == ROWS
    assert notes == [f"train{ending}: 80 lines had empty fields behind the last column, which were dropped"]


def test_line_numbers_count_what_was_skipped(tmp_path: Path) -> None:
    for text, where in (
        ("\nh\tr\tt\n\na\tr\tb\n\na\tr\n", "line 6: 2 columns"),
        ("# note\na\tr\tb\n\na\t \tb\n", "line 4: the relation is empty"),
        ("h\tr\tt\na\tr\tb\n \tr\tb\n", "line 3: the head is empty"),
    ):
        with pytest.raises(DataError) as error:
            read(tmp_path, text)
        assert where in str(error.value)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_that_differ_in_unicode_normalisation_alone_are_reported(tmp_path: Path) -> None:
    rows = [("caf\u00e9", "r", "a"), ("cafe\u0301", "r", "b"), ("na\u00efve", "r\u00e9", "a"), ("a", "re\u0301", "b")]
    found, notes = read(tmp_path, lines(rows))
    assert found == rows
    for what, name, other in (("entities", "cafe\\u0301", "caf\\xe9"), ("relations", "re\\u0301", "r\\xe9")):
        assert (
            f"1 names of {what} differ from another in Unicode normalisation alone, such as '{name}' and '{other}'; "
            "they are kept apart" in notes
        )


def test_an_odd_order_of_columns_is_questioned_and_can_be_said(tmp_path: Path) -> None:
    text = lines(((h, t, r) for h, r, t in ROWS), ",")
    rows, notes = read(tmp_path, text, ".csv")
    assert rows == [(h, t, r) for h, r, t in ROWS]
    (note,) = notes
    assert "30 of 30 relation names are names of entities too: are the columns head, relation, tail?" in note
    assert "The last one has the fewest names (3)." in note and note.endswith("--columns head,tail,relation")
    assert read(tmp_path / "said", text, ".csv", How(("head", "tail", "relation"))) == (ROWS, [])
    assert read(tmp_path / "header", "head,tail,relation\n" + text, ".csv")[0] == ROWS
    turned = lines((r, h, t) for h, r, t in ROWS)
    assert read(tmp_path / "turned", turned, ".tsv", How(("relation", "head", "tail"))) == (ROWS, [])
    weighted = lines((str(i), *row) for i, row in enumerate(ROWS))
    assert read(tmp_path / "weighted", weighted, ".tsv", How(("-", "head", "relation", "tail"))) == (ROWS, [])


def test_ids_are_no_reason_to_question_the_order_unless_another_column_has_fewer(tmp_path: Path) -> None:
    ids = [(h[1:], r[1:], t[1:]) for h, r, t in ROWS]
    assert read(tmp_path, lines(ids)) == (ids, [])
    assert "are the columns head" in read(tmp_path / "htr", lines((h, t, r) for h, r, t in ids))[1][0]


def test_columns_that_cannot_be_meant_are_refused() -> None:
    for columns in (("head", "tail"), ("head", "head", "relation", "tail"), ("h", "r", "t")):
        with pytest.raises(ConfigError, match="head, relation and tail once each"):
            How(columns)


# -- names of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val.txt", "dev.tsv", "validation.csv", "Val.TSV", "dev.tsv.gz", "val.parquet"])
def test_other_names_of_valid_are_read_and_it_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.tsv").write_text(lines(ROWS[:100]))
    text = lines(ROWS[100:]).encode()
    if name.endswith(".parquet"):
        pl.DataFrame(ROWS[100:], schema=["h", "r", "t"], orient="row").write_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    graph = load_graph(tmp_path)
    assert rows_of(graph, "valid") == ROWS[100:] and f"{name} is read as valid" in graph.warnings


def test_the_usual_name_goes_before_others_and_it_is_said(tmp_path: Path) -> None:
    for name, rows in (("train.tsv", ROWS[:100]), ("valid.tsv", ROWS[100:]), ("dev.tsv", ROWS), ("TRAIN.txt", ROWS)):
        (tmp_path / name).write_text(lines(rows))
    graph = load_graph(tmp_path)
    assert rows_of(graph) == ROWS[:100] and rows_of(graph, "valid") == ROWS[100:]
    assert "dev.tsv: not read, for valid.tsv is valid" in graph.warnings
    assert "TRAIN.txt: not read, for train.tsv is train" in graph.warnings
    (tmp_path / "valid.tsv").unlink()
    (tmp_path / "val.csv").write_text(lines(ROWS, ","))
    with pytest.raises(DataError, match=r"holds dev\.tsv and val\.csv, and only one can be meant"):
        load_graph(tmp_path)


@pytest.mark.parametrize("ending", [".parquet", ".tsv.gz", ".TSV", ".CSV.GZ", ".Parquet"])
def test_folders_may_be_of_any_kind_that_one_file_may(tmp_path: Path, ending: str) -> None:
    for split, rows in (("train", ROWS[:100]), ("valid", ROWS[100:])):
        path = tmp_path / (split + ending)
        text = lines(rows, "," if "csv" in ending.lower() else "\t").encode()
        if ending.lower() == ".parquet":
            pl.DataFrame([row[::-1] for row in rows], schema=["o", "p", "s"], orient="row").write_parquet(path)
        else:
            path.write_bytes(gzip.compress(text) if ending.lower().endswith(".gz") else text)
    graph = load_graph(tmp_path)
    assert rows_of(graph) + rows_of(graph, "valid") == ROWS
    assert rows_of(split_file(tmp_path / ("train" + ending), "mine").graph)


@pytest.mark.parametrize("ending", [".zip", ".bz2", ".tsv.bz2", ".jsonl", ".xlsx", "", ".feather", ".parquet.gz"])
def test_any_other_ending_is_refused_in_a_line_that_names_those_that_are_read(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"valid{ending}").write_text(lines(ROWS))
    with pytest.raises(DataError) as error:
        split_file(tmp_path / f"valid{ending}", "mine")
    assert " ".join(ENDINGS) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "train.tsv").write_text(lines(ROWS))
    with pytest.raises(DataError) as error:
        load_graph(tmp_path)
    assert str(tmp_path / f"valid{ending}") in str(error.value) and " ".join(ENDINGS) in str(error.value)


@pytest.mark.parametrize("name", ["g[1]", "g*", "g?", "~g", "g 1", "g%20", "{a,b}", "~"])
def test_a_path_is_a_path_and_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    other = pl.DataFrame([("x", "y", "z")], schema=["h", "r", "t"], orient="row")
    for decoy in ("g1", "gg", "g", "a", "b"):
        other.write_parquet(tmp_path / f"{decoy}.parquet")
    with (tmp_path / f"{name}.parquet").open("wb") as file:
        pl.DataFrame(ROWS, schema=["h", "r", "t"], orient="row").write_parquet(file)
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.parquet").write_bytes((tmp_path / f"{name}.parquet").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(split_file(Path(f"{name}.parquet"), "mine").graph.entities) == 30
    assert rows_of(load_graph(Path(name))) == ROWS


# -- OpenKE -----------------------------------------------------------------------------------------------------------


def openke(folder: Path, mark: str = " ", names: bool = True) -> Path:
    """ROWS as OpenKE has them: ids in an order that is not that of the names."""
    folder.mkdir()
    entities, relations = [f"e{i}" for i in range(29, -1, -1)], ["r1", "r0", "r2"]
    for split, rows in (("train", ROWS[:100]), ("valid", ROWS[100:110]), ("test", ROWS[110:])):
        ids = [(str(entities.index(h)), str(entities.index(t)), str(relations.index(r))) for h, r, t in rows]
        (folder / f"{split}2id.txt").write_text(f"{len(rows)}\n" + lines(ids, mark))
    for kind, listed in (("entity", entities), ("relation", relations)):
        if names:
            text = "".join(f"{name}\t{i}\n" for i, name in enumerate(listed))
            (folder / f"{kind}2id.txt").write_text(f"{len(listed)}\n" + text)
    return folder


@pytest.mark.parametrize("mark", [" ", "\t", "  "])
def test_the_layout_of_openke_is_read_as_the_graph_it_is(tmp_path: Path, mark: str) -> None:
    graph = load_graph(openke(tmp_path / "ke", mark))
    assert [row for split in ("train", "valid", "test") for row in rows_of(graph, split)] == ROWS
    assert graph.warnings == ()
    assert rows_of(load_graph(openke(tmp_path / "ids", mark, names=False)))[0] == ("29", "1", "29")
    file = tmp_path / "ke" / "train2id.txt"
    found = read_files({"train": file})
    assert found.entities[int(found.rows["train"][0, 0])] == "e0"


def libkge(folder: Path) -> Path:
    """ROWS as `kge`'s preprocess.py writes them, with what else it writes beside."""
    folder.mkdir()
    entities, relations = [f"e {i}" for i in range(29, -1, -1)], ["r1", "r0", "r2"]
    for split, rows in (("train", ROWS[:100]), ("valid", ROWS[100:110]), ("test", ROWS[110:])):
        ids = [(entities.index(f"e {h[1:]}"), relations.index(r), entities.index(f"e {t[1:]}")) for h, r, t in rows]
        text = "".join(f"{h}\t{r}\t{t}\n" for h, r, t in ids)
        (folder / f"{split}.del").write_text(text)
        (folder / f"{split}_{'sample' if split == 'train' else 'without_unseen'}.del").write_text(
            text[: len(text) // 2]
        )
    for kind, listed in (("entity", entities), ("relation", relations)):
        (folder / f"{kind}_ids.del").write_text("".join(f"{i}\t{name}\n" for i, name in enumerate(listed)))
    (folder / "entity_strings.del").write_text("e 3\tthe third\n")
    (folder / "dataset.yaml").write_text("dataset:\n  files.train.filename: train.del\n  num_entities: 30\n")
    return folder


def test_a_folder_of_libkge_is_read_as_the_graph_it_is(tmp_path: Path) -> None:
    graph = load_graph(libkge(tmp_path / "kge"))
    found = [row for split in ("train", "valid", "test") for row in rows_of(graph, split)]
    assert found == [(f"e {h[1:]}", r, f"e {t[1:]}") for h, r, t in ROWS]
    assert graph.warnings == () and graph.name == "kge"
    assert graph.entities.label(graph.entities.row_of_name("e 3")) == "the third"
    (tmp_path / "kge/entity_ids.del").unlink()
    without = load_graph(tmp_path / "kge")
    assert {name for row in rows_of(without) for name in (row[0], row[2])} <= {str(i) for i in range(30)}
    assert any("no entity_ids.del beside it" in note for note in without.warnings)
    (tmp_path / "kge/train.txt").write_text("a\tr1\tb\na\tr0\tb\nb\tr2\ta\n")  # names go first
    assert rows_of(load_graph(tmp_path / "kge"))[0] == ("a", "r1", "b")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.del", "0\t0\t77\n", "train.del, line 1: the tail 77 is not in entity_ids.del; add it"),
        ("train.del", "0\t0\n", "train.del, line 1: .*expected three ids: head, relation and tail"),
        ("valid.del", "0\tr1\t1\n", "valid.del, line 1: .*expected three ids"),
        ("valid.del", "", "valid.del: the file is empty"),
        ("entity_ids.del", "e 1\t0\n", "entity_ids.del, line 1: 'e 1.*expected an id, a TAB and its name"),
        ("entity_ids.del", "0\ta\n0\tb\n", "entity_ids.del: the id 0 stands there twice"),
        ("relation_ids.del", "0\tr\n1\tr\n", "relation_ids.del: the name 'r' stands there twice"),
        ("relation_ids.del", "0\t\n", "relation_ids.del, line 1: .*expected an id, a TAB and its name"),
    ],
)
def test_what_is_wrong_with_a_folder_of_libkge_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    folder = libkge(tmp_path / "kge")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_graph(folder)


def test_what_is_wrong_with_the_layout_of_openke_is_named(tmp_path: Path) -> None:
    for number, (name, old, new, words) in enumerate(
        (
            ("train2id.txt", "100\n", "101\n", "train2id.txt, line 1: it says 101 triples, and 100 lines follow"),
            ("train2id.txt", "100\n", "99\n", "it says 99 triples, and 100 lines follow"),
            ("test2id.txt", "10\n", "11\n77 1 0\n", "test2id.txt, line 2: the head 77 is not in entity2id.txt"),
            ("valid2id.txt", "10\n", "11\n1 0\n", "valid2id.txt"),
            ("entity2id.txt", "e3\t26\n", "e3\n", "entity2id.txt, line 28: 'e3', expected a name, a TAB and its id"),
            ("entity2id.txt", "e3\t26\n", "e3\t25\n", "the id 25 stands there twice"),
            ("relation2id.txt", "r0\t", "r1\t", "the name 'r1' stands there twice"),
        )
    ):
        folder = openke(tmp_path / str(number))
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
        with pytest.raises(DataError) as error:
            load_graph(folder)
        assert words in str(error.value)


def test_openke_beside_an_ordinary_train_is_not_read(tmp_path: Path) -> None:
    folder = openke(tmp_path / "both")
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(lines(ROWS))
    graph = load_graph(folder)
    assert rows_of(graph) == ROWS
    assert "train2id.txt: not read, for train.txt is train" in graph.warnings


# -- RDF --------------------------------------------------------------------------------------------------------------

EX = "http://ex.org/"
NAMED = [tuple(EX + word for word in row) for row in ROWS]
PREFIX = f"@prefix ex: <{EX}> .\n"
RDF = {
    ".nt": "".join(f"<{h}> <{r}> <{t}> .\n" for h, r, t in NAMED),
    ".nq": "".join(f"<{h}> <{r}> <{t}> <{EX}g> .\n" for h, r, t in NAMED),
    ".ttl": PREFIX + "".join(f"ex:{h} ex:{r} ex:{t} .\n" for h, r, t in ROWS),
}
LITERALS = f'<{EX}e0> <{EX}r0> "E, nought"@en .\n<{EX}e1> <{EX}r0> "a\\tb\\n" .\n'


@pytest.mark.parametrize("ending", RDF)
def test_rdf_is_read_by_a_library_and_literals_are_left_out_and_counted(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("pyoxigraph")
    rows, notes = read(tmp_path, RDF[ending] + LITERALS, ending)
    assert rows == NAMED
    literals = f"train{ending}: 2 of 122 triples end in a literal and are left out; --literals keeps them"
    graphs = "train.nq: 120 of 122 statements are in named graphs; all graphs are read as one"
    assert notes == ([literals, graphs] if ending == ".nq" else [literals])
    kept, _ = read(
        tmp_path / "gz", gzip.compress((RDF[ending] + LITERALS).encode()), f"{ending}.gz", How(literals=True)
    )
    assert kept == [*NAMED, (EX + "e0", EX + "r0", '"E, nought"@en'), (EX + "e1", EX + "r0", '"a\\tb\\n"')]


def test_wrong_rdf_is_refused_by_its_line(tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph")
    for ending, text in RDF.items():
        with pytest.raises(DataError, match=rf"train\{ending}, line \d+: .*; correct it"):
            read(tmp_path, text + "<http://ex.org/e0> <http://ex.org/r0> nonsense\n", ending)
    with pytest.raises(DataError, match="no triple in it"):
        read(tmp_path, LITERALS, ".nt")


def test_without_the_library_of_rdf_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyoxigraph", None)
    with pytest.raises(Exception, match=r"pip install 'distkgd\[rdf\]'"):
        read(tmp_path, RDF[".nt"], ".nt")


# -- what is written is read again ------------------------------------------------------------------------------------


def test_odd_names_survive_the_way_through_a_split_that_was_written(tmp_path: Path) -> None:
    odd: Rows = [("head", "relation", "tail"), ('"a"', '"r"', '"b"'), (" a", '"r"', "b"), ("#x", '"r"', "\u00e9")]
    rows = [*odd, *ROWS]
    text = "".join(",".join('"{}"'.format(word.replace('"', '""')) for word in row) + "\n" for row in [ROWS[0], *rows])
    (tmp_path / "mine.csv").write_text(text + '"a","r0","b"\n')
    found = split_file(tmp_path / "mine.csv", "mine", allow_unseen=True)
    write_split(found, tmp_path / "out")
    graph = load_graph(tmp_path / "out")
    assert graph.summary() | {"name": "mine"} == found.graph.summary()
    assert [r for s in ("train", "valid", "test") for r in rows_of(graph, s)] == [
        r for s in ("train", "valid", "test") for r in rows_of(found.graph, s)
    ]
    assert {" a", '"a"', "a", "head", "#x"} <= set(graph.entities.names.to_list())


def test_a_folder_whose_reading_was_said_is_copied_as_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for split, rows in (("train", ROWS[:100]), ("dev", ROWS[100:])):
        (tmp_path / "in" / f"{split}.tsv").write_text(lines((h, t, r) for h, r, t in rows))
    (tmp_path / "in" / "names.tsv").write_text("e0\tNought\n")
    found = copy_folder(tmp_path / "in", "mine", How(("head", "tail", "relation")))
    write_split(found, tmp_path / "mine")
    graph = load_graph(tmp_path / "mine")
    assert graph.summary() == found.graph.summary()
    assert rows_of(graph) == ROWS[:100] and rows_of(graph, "valid") == ROWS[100:] and not len(graph.test)
    assert graph.entities.label(graph.entities.id("e0")) == "Nought"
    assert any("dev.tsv is read as valid" in note for note in found.notes)
