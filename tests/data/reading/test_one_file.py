"""One file of triples as people have them: what is understood, what is said, what is refused and how."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from distkgd.data.reading.folders import read_files
from distkgd.data.reading.formats import AS_THEY_ARE, How, check_file
from distkgd.errors import DataError

ROWS = [("paris", "capital_of", "france"), ("rome", "capital_of", "italy")]


def read_triples(path: Path, how: How = AS_THEY_ARE) -> tuple[list[tuple[str, str, str]], list[str]]:
    check_file(path)
    found = read_files({"train": path}, how)
    rows = [(found.entities[h], found.relations[r], found.entities[t]) for h, r, t in found.rows["train"].tolist()]
    return rows, found.notes


def read(
    tmp_path: Path, text: str | bytes, name: str = "mine.tsv", how: How = AS_THEY_ARE
) -> tuple[list[tuple[str, str, str]], list[str]]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_triples(path, how)


def refused(tmp_path: Path, text: str | bytes, *words: str, name: str = "mine.tsv") -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError) as error:
        read(tmp_path, text, name)
    for word in (name, *words):
        assert word in str(error.value)
    assert set(tmp_path.iterdir()) - before <= {tmp_path / name}


PLAIN = "paris\tcapital_of\tfrance\nrome\tcapital_of\titaly\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (PLAIN, "mine.tsv"),
        (PLAIN, "mine.txt"),
        (PLAIN.replace("\n", "\r\n"), "mine.tsv"),
        ("\ufeff" + PLAIN.rstrip("\n"), "mine.tsv"),
        (PLAIN.replace("\t", ","), "mine.csv"),
        (PLAIN.replace("\t", ","), "mine.txt"),
        (gzip.compress(PLAIN.encode(), mtime=0), "mine.tsv.gz"),
        ('"paris"\t"capital_of"\t"france"\n"rome"\t"capital_of"\t"italy"\n', "mine.tsv"),
        ('paris,"capital_of",france\nrome,capital_of,"italy"\n', "mine.csv"),
    ],
)
def test_every_usual_way_to_write_triples_is_read(tmp_path: Path, text: str | bytes, name: str) -> None:
    assert read(tmp_path, text, name) == (ROWS, [])


def test_quotes_that_belong_to_a_name_stay(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, 'paris\tlabel\t"Paris"@fr\nrome\tlabel\t"Roma"\n')
    assert rows == [("paris", "label", '"Paris"@fr'), ("rome", "label", '"Roma"')]


def test_a_quoted_csv_may_have_commas_and_quotes_in_names(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, 'a,r,"Paris, France"\n"say ""b""",r,c\n', "mine.csv")
    assert rows == [("a", "r", "Paris, France"), ('say "b"', "r", "c")]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    rows, notes = read(tmp_path, "\n" + PLAIN.replace("\n", "\n \t \n\n", 1))
    assert rows == ROWS and notes == ["mine.tsv: 3 blank lines were skipped"]


@pytest.mark.parametrize(
    "header", ["head\trelation\ttail", "Subject\tPREDICATE\tobject", "h\tr\tt", "source\ttype\ttarget"]
)
def test_a_header_is_skipped_and_said(tmp_path: Path, header: str) -> None:
    rows, notes = read(tmp_path, f"{header}\n{PLAIN}")
    assert rows == ROWS
    (note,) = notes
    assert note.startswith("mine.tsv: line 1 is taken as a header")


def test_a_header_orders_columns_and_names_those_that_are_not_used(tmp_path: Path) -> None:
    text = "weight,object,predicate,subject\n0.5,france,capital_of,paris\n0.7,italy,capital_of,rome\n"
    rows, notes = read(tmp_path, text, "mine.csv")
    assert rows == ROWS and "not used: weight" in notes[0]


def test_an_unknown_header_is_pointed_out(tmp_path: Path) -> None:
    body = "".join(f"a{i % 5}\tr\tb{i % 7}\n" for i in range(30))
    rows, notes = read(tmp_path, f"entity one\twhat\tentity two\n{body}")
    assert len(rows) == 31
    assert "if it is a header, remove it" in notes[0]
    assert read(tmp_path, body)[1] == []


def test_parquet_is_read_by_names_or_by_order(tmp_path: Path) -> None:
    frame = pl.DataFrame(ROWS, schema=["subject", "predicate", "object"], orient="row")
    frame.select("object", pl.lit(1).alias("weight"), "subject", "predicate").write_parquet(tmp_path / "named.parquet")
    assert read_triples(tmp_path / "named.parquet")[0] == ROWS
    frame.rename({"subject": "x", "predicate": "y", "object": "z"}).write_parquet(tmp_path / "order.parquet")
    assert read_triples(tmp_path / "order.parquet")[0] == ROWS
    numbers = pl.DataFrame({"head": [1, 2], "relation": ["r", "r"], "tail": [3, 4]})
    numbers.write_parquet(tmp_path / "numbers.parquet")
    assert read_triples(tmp_path / "numbers.parquet")[0] == [("1", "r", "3"), ("2", "r", "4")]


def test_what_parquet_cannot_mean_is_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame(ROWS, schema=["x", "y", "z"], orient="row")
    for wrong, words in (
        (frame.with_columns(pl.lit(1).alias("w")), "x, y, z, w"),
        (frame.with_columns(pl.lit(None, pl.String).alias("z")), "row 1: the tail is empty"),
        (frame.with_columns(pl.lit("a\tb").alias("x")), "row 1: a tab"),
        (frame.head(0), "no triple"),
    ):
        wrong.write_parquet(tmp_path / "wrong.parquet")
        with pytest.raises(DataError, match=words):
            read_triples(tmp_path / "wrong.parquet")
    (tmp_path / "wrong.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_triples(tmp_path / "wrong.parquet")


def test_a_wrong_line_is_named_with_its_own_number(tmp_path: Path) -> None:
    refused(tmp_path, "a\tr\tb\n\na\tr\n", "line 3", "2 columns", "expected 3")
    refused(tmp_path, "head\trelation\ttail\na\tr\tb\tc\n", "line 2", "4 columns")
    refused(tmp_path, "a\tr\tb\n\n\na\t \tb\n", "line 4", "the relation is empty")
    refused(tmp_path, 'a,"r",b\na,"r\n', "line", "close the quotes", name="mine.csv")
    refused(tmp_path, 'a,"r\tq",b\n', "line 1", "a tab", name="mine.csv")
    refused(tmp_path, "a b c\nd e f\n", "line 1", "1 column", "2 lines are like this")
    refused(tmp_path, "a\tr\tb\t1\nc\tr\td\t1\n", "4 columns", "name three")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "é\tr\tb\n".encode("latin-1"), "line 1", "not UTF-8")
    refused(tmp_path, b"", "empty")
    refused(tmp_path, "\n \n", "no triple")
    refused(tmp_path, "head\trelation\ttail\n", "no triple")
    refused(tmp_path, gzip.compress(PLAIN.encode()), "let its name end in .gz")
    refused(tmp_path, gzip.compress(PLAIN.encode())[:-9], "cut off", name="mine.tsv.gz")


def test_other_files_are_refused_by_their_names(tmp_path: Path) -> None:
    refused(tmp_path, PLAIN, ".tsv", ".parquet", name="mine.json")
    with pytest.raises(DataError, match="no such file"):
        read_triples(tmp_path / "missing.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match="not a file"):
        read_triples(tmp_path / "folder.tsv")
