"""Read one file of triples as people have them: TSV, CSV or Parquet, with or without a header. Nothing is written.

Blank lines are skipped, a header is recognised by the names of its columns, and both are said. Everything else that is
no triple is refused by file, line and cure.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import polars as pl

from distkgd.errors import DataError
from distkgd.graph.readers import clean_text, read_bytes, read_columns
from distkgd.graph.triples import COLUMNS, shorten
from distkgd.paths import AnyPath

TEXT_ENDINGS = (".tsv", ".txt", ".csv", ".tsv.gz", ".txt.gz", ".csv.gz")
ENDINGS = (*TEXT_ENDINGS, ".parquet")
# What the columns of triples are called, in lower case.
HEADERS = {
    "head": {"head", "h", "head_id", "subject", "subj", "s", "source", "src", "from"},
    "relation": {
        "relation",
        "rel",
        "r",
        "relation_id",
        "predicate",
        "pred",
        "p",
        "property",
        "edge",
        "edge_type",
        "type",
    },
    "tail": {"tail", "t", "tail_id", "object", "obj", "o", "target", "dst", "to"},
}
_LEAST_FOR_A_DOUBT = 20  # lines from which on words of the first one that never come again are odd


def read_triples(path: AnyPath) -> tuple[pl.DataFrame, list[str]]:
    """The triples of a file as string columns head, relation, tail in its order, and what a person should know of it.

    Raises DataError naming file, line and cure.
    """
    path = Path(path)
    if not path.name.lower().endswith(ENDINGS):
        raise DataError(f"{path}: a file of triples ends in one of {' '.join(ENDINGS)}; rename or convert it")
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give a file of triples")
    unit = "row" if path.suffix.lower() == ".parquet" else "line"
    notes: list[str] = []
    cells = _parquet(path) if unit == "row" else _cells(path, notes)
    width, places = _layout(cells, path, unit, notes)
    if places is None:
        places = (0, 1, 2)
    elif unit == "line":
        cells = cells[1:]
    _check_widths(cells, width, path, unit)
    fields = [pl.col("fields").list.get(place).alias(name) for name, place in zip(COLUMNS, places, strict=True)]
    frame = cells.select("number", *fields)
    if not len(frame):
        raise DataError(f"{path}: no triple in it; one {unit} each: head, relation, tail")
    _check_words(frame, path, unit)
    if unit == "line" and cells["number"][0] == 1:
        notes += _doubts(frame)
    return frame.select(COLUMNS), notes


def _cells(path: Path, notes: list[str]) -> pl.DataFrame:
    """number: of the line, from 1; fields: its texts. Without blank lines."""
    text = clean_text(read_bytes(path), path)
    first = next((line for line in io.BytesIO(text) if line.strip()), b"")
    separator = "\t" if b"\t" in re.sub(rb'"[^"]*"', b"", first) else ","
    quoted = _wrapped(first, separator) or (separator == "," and b'"' in text)
    cells = _unquote(text, path, separator) if quoted else _cut(text, path, separator)
    total = int(cells["number"].max() or 0)  # type: ignore[arg-type]
    if not quoted and (blank := total - len(cells)):
        notes.append(f"{blank:,} blank lines were skipped")
    return cells


def _wrapped(line: bytes, separator: str) -> bool:
    # Is every field of the line in quotes? Some of them may be in any text: "foo"@en.
    fields = [field.strip() for field in line.split(separator.encode())]
    return len(fields) >= 3 and all(len(f) > 1 and f.startswith(b'"') and f.endswith(b'"') for f in fields)


def _cut(text: bytes, path: Path, separator: str) -> pl.DataFrame:
    lines = read_columns(text, path, "\0", ("line",)).with_row_index("number", offset=1)
    full = lines.filter(pl.col("line").str.strip_chars().fill_null("") != "")
    return full.select("number", pl.col("line").str.split(separator).alias("fields"))


def _unquote(text: bytes, path: Path, separator: str) -> pl.DataFrame:
    rows: list[list[str]] = []
    numbers: list[int] = []
    reader = csv.reader(io.StringIO(text.decode(), newline=""), delimiter=separator, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields) or len(fields) > 1:
                rows.append(fields)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f'{path}, line {reader.line_num}: {error}; close the quotes, write " as ""') from error
    return pl.DataFrame({"number": numbers, "fields": rows}, schema={"number": pl.Int64, "fields": pl.List(pl.String)})


def _parquet(path: Path) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path)
        if not len(table):
            raise DataError(f"{path}: no triple in it; one row each: head, relation, tail")
        places = _places(table.columns)
        if places is None and len(table.columns) != 3:
            listed = ", ".join(table.columns[:10])
            raise DataError(f"{path}: its columns are {listed}; call three of them head, relation and tail")
        named = [table.columns[place] for place in places or (0, 1, 2)]
        texts = [pl.col(name).cast(pl.String).alias(column) for name, column in zip(named, COLUMNS, strict=True)]
        frame = table.select(texts).with_row_index("number", offset=1)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a Parquet file of words or numbers: {str(error).splitlines()[0]}") from error
    return frame.select("number", pl.concat_list(COLUMNS).alias("fields"))


def _layout(cells: pl.DataFrame, path: Path, unit: str, notes: list[str]) -> tuple[int, tuple[int, int, int] | None]:
    """How many columns there are, and which are head, relation and tail as a header says it; None without header."""
    if unit == "row" or not len(cells):
        return 3, None
    first = cells["fields"][0].to_list()
    places = _places(first)
    if places is None:
        return 3, None
    unused = [shorten(name) for i, name in enumerate(first) if i not in places]
    rest = f"; not used: {', '.join(unused)}" if unused else ""
    head, relation, tail = (first[place].strip() for place in places)
    notes.append(f"line {cells['number'][0]} is taken as a header: {head}, {relation}, {tail}{rest}")
    return len(first), places


def _places(names: list[str]) -> tuple[int, int, int] | None:
    """Where the columns head, relation and tail are among those called `names`, None if that is not clear."""
    found = []
    for column in COLUMNS:
        here = [i for i, name in enumerate(names) if name.strip().lower() in HEADERS[column]]
        if len(here) != 1:
            return None
        found.append(here[0])
    return found[0], found[1], found[2]


def _check_widths(cells: pl.DataFrame, width: int, path: Path, unit: str) -> None:
    wrong = (cells["fields"].list.len() != width).arg_true()
    if not len(wrong):
        return
    row = int(wrong[0])
    fields = cells["fields"][row].to_list()
    columns = f"{len(fields)} column{'s' if len(fields) != 1 else ''}"
    more = f" ({len(wrong):,} {unit}s are like this)" if len(wrong) > 1 else ""
    cure = "head, relation and tail with TABs between them (or commas in a .csv, with quotes around commas in a name)"
    if len(wrong) == len(cells):
        cure += "; of more columns, name three head, relation and tail in a first line"
    where = f"{path}, {unit} {cells['number'][row]}"
    raise DataError(f"{where}: {columns} in {shorten(' '.join(fields))!r}, expected {width}: {cure}{more}")


def _check_words(frame: pl.DataFrame, path: Path, unit: str) -> None:
    for column in COLUMNS:
        words = frame[column]
        if len(rows := (words.str.strip_chars().fill_null("") == "").arg_true()):
            number = frame["number"][int(rows[0])]
            raise DataError(f"{path}, {unit} {number}: the {column} is empty; fill it or remove the {unit}")
        if len(rows := words.str.contains(r"[\t\n\r]").arg_true()):
            number = frame["number"][int(rows[0])]
            raise DataError(f"{path}, {unit} {number}: a tab or a line break in the {column}; remove it")


def _doubts(frame: pl.DataFrame) -> list[str]:
    first = frame.row(0, named=True)
    alone = all((frame[column] == first[column]).sum() == 1 for column in COLUMNS)
    if len(frame) < _LEAST_FOR_A_DOUBT or not alone:
        return []
    words = ", ".join(repr(shorten(first[column])) for column in COLUMNS)
    return [f"line 1 ({words}) is taken as a triple, though its words come nowhere else; if it is a header, remove it"]
