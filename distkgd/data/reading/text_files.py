"""Lines of text as triples: how a file is written is found out from its first lines and its bytes.

Fields lie between TABs; where the first line has none, between commas or semicolons, and then quotes are read as in
RFC 4180. Between TABs they are where every field of the first line is in quotes; else they belong to the names. Blank
lines, comments and empty fields behind the last one are left out and counted. Rows are lines: no name has a line break.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from distkgd.data.reading.formats import LIBKGE, How, is_openke, lines_of, places_of, read_libkge, read_openke
from distkgd.data.triples import COLUMNS
from distkgd.errors import DataError, shorten

_BOM = b"\xef\xbb\xbf"
_BLOCK = 64 << 20
_LOOKED_AT = 1 << 14  # bytes, to tell commas from semicolons
_FIRST_LINES = 50  # among which the first two that are no comments are looked for
_SEPARATORS = {"\t": "TABs", ",": "commas", ";": "semicolons"}
# What is left out on the way, in the order in which it is told.
_BLANK = "blank lines were skipped"
_COMMENTS = "lines that begin with # and hold no triple were skipped"
_HEADERS = "more lines like the header were skipped"
_TRAILING = "lines had empty fields behind the last column, which were dropped"
_AROUND_QUOTES = "fields had white space around their quotes, which was dropped"
_LEFT_OUT = (_BLANK, _COMMENTS, _HEADERS, _TRAILING, _AROUND_QUOTES)


@dataclass(frozen=True)
class Layout:
    """How a text is written.

    start: byte at which the first triple's line begins; line: its number. places: of head, relation and tail among
    `width` columns. header: the line that names them, where there is one.
    """

    start: int
    line: int
    separator: str = "\t"
    quoted: bool = False
    width: int = 3
    places: tuple[int, int, int] = (0, 1, 2)
    header: bytes | None = None
    openke: bool = False
    libkge: bool = False

    def is_plain(self, data: bytes) -> bool:
        """Whether three bare fields a line are expected, as kernels/cpp/names.cpp reads them."""
        if self.openke or self.libkge or self.quoted or self.width != 3 or self.places != (0, 1, 2):
            return False
        if self.separator != "\t" and b"\t" in data:
            return False
        return self.header is None or data.find(b"\n" + self.header + b"\n", self.start - 1) < 0


def clean_text(data: bytes, path: Path) -> bytes:
    """The text without byte-order marks and last line ends. Raises DataError when it is none, or not UTF-8."""
    text = without_mark(data).rstrip(b"\n")
    if not text:
        raise DataError(f"{path}: the file is empty; fill it, or remove it if there is nothing to put in")
    bad, what = text.find(0), "NUL"
    if bad < 0:  # polars would drop it from the end of a field without a word
        bad, what = text.find(b"\r"), "a carriage return without a line feed"
    for start, end in [] if text.isascii() else _blocks(text):
        try:
            text[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            bad, what = start + error.start, f"0x{text[start + error.start]:02x}, which is not UTF-8"
            break
    if bad >= 0:
        line, byte = text.count(b"\n", 0, bad) + 1, bad - text.rfind(b"\n", 0, bad)
        cure = "save it as UTF-8 with LF or CRLF line ends"
        if text[:2] == b"\x1f\x8b":
            cure = "it looks like gzip: let its name end in .gz"
        raise DataError(f"{path}, line {line}: byte {byte} of the line is {what}; {cure}")
    return text


def layout_of(data: bytes, path: Path, how: How, notes: list[str]) -> Layout:
    """How a text (without byte-order mark) is written, as its first lines show; a header is noted."""
    places, width = how.places or (0, 1, 2), len(how.columns or COLUMNS)
    if path.name.lower().endswith(LIBKGE):
        return Layout(0, 1, libkge=True)
    lines = _first_lines(data)
    if not lines:
        return Layout(0, 1)
    real = [line for line in lines if not line.text.startswith(b"#")] or lines
    if len(real) > 1 and how.columns is None and is_openke(real[0].text, real[1].text):
        return Layout(real[0].start, real[0].number, openke=True)
    separator = _separator(real[0].text, data, path, notes)
    for line in lines:
        names = _fields(line.text, separator)
        header = places_of(names)
        if header is None or _comes_again(data, line, [names[place] for place in header]):
            if line is real[0]:
                break
            continue
        if how.columns is None:
            places, width = header, len(names)
        unused = [shorten(name) or "a column without a name" for i, name in enumerate(names) if i not in places]
        rest = f"; not used: {', '.join(unused)}" if unused else ""
        told = ", ".join(names[place] for place in sorted(places) if place < len(names))
        notes.append(f"{path.name}: line {line.number} is taken as a header: {told}{rest}")
        below = next((one for one in real if one.start > line.start), line)
        start = min(line.start + len(line.text) + 1, len(data))
        quoted = _quoted(data, separator, below.text)
        return Layout(start, line.number + 1, separator, quoted, width, places, line.text)
    return Layout(0, 1, separator, _quoted(data, separator, real[0].text), width, places)


def read_lines(text: bytes, layout: Layout, path: Path, notes: list[str], quoted: set[str]) -> Iterator[pl.DataFrame]:
    """Frames of number, head, relation, tail of a clean text from the layout's first line on, block by block.

    quoted: takes the names to which quotes gave outer white space. All other white space around fields stays.
    Raises DataError naming file, line and cure.
    """
    number, left = layout.line, Counter[str](dict.fromkeys(_LEFT_OUT, 0))
    for start, end in _blocks(text, layout.start):
        lines = lines_of(text[start:end], number)
        number += len(lines)
        yield _triples(lines, layout, path, left, quoted)
    notes += (f"{path.name}: {number:,} {what}" for what, number in left.items() if number)


def read_ids(text: bytes, layout: Layout, path: Path, notes: list[str]) -> tuple[pl.DataFrame, bytes]:
    """number, head, relation, tail of OpenKE's or LibKGE's text, and the bytes of the files that its names are in."""
    lines = lines_of(text[layout.start :], layout.line)
    full = lines.filter(pl.col("line").str.strip_chars() != "")
    return (read_openke if layout.openke else read_libkge)(full, path, notes)


def without_mark(data: bytes) -> bytes:
    """The bytes behind any byte-order marks."""
    while data.startswith(_BOM):
        data = data[len(_BOM) :]
    return data


class _Line(NamedTuple):
    number: int
    start: int
    text: bytes


def _first_lines(data: bytes) -> list[_Line]:
    """The first lines that are not blank, down to the second that is no comment."""
    found: list[_Line] = []
    start, number, real = 0, 1, 0
    while start < len(data) and len(found) < _FIRST_LINES and real < 2:
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        line = data[start:end]
        if line.strip():
            found.append(_Line(number, start, line))
            real += not line.startswith(b"#")
        start, number = end + 1, number + 1
    return found


def _separator(line: bytes, data: bytes, path: Path, notes: list[str]) -> str:
    """The mark between the fields of a first line; of two that could be it, the one that all lines have as often."""
    if line.count(b"\t") >= 2:
        ends = {one.rstrip()[-1:].decode("latin-1") for one in line.split(b"\t")[:-1]}
        return next((mark for mark in ",;" if ends == {mark}), "\t")  # as in "a, <TAB>r, <TAB>b"
    marks = [mark for mark in _SEPARATORS if _bare(line).count(mark.encode()) >= 2]
    if len(marks) > 1:
        lines = [_bare(one) for one in data[:_LOOKED_AT].split(b"\n")[:-1] if one.strip() and not one.startswith(b"#")]
        even = [mark for mark in marks if len({one.count(mark.encode()) for one in lines}) == 1]
        if len(even) != 1:
            notes.append(
                f"{path.name}: commas and semicolons could both be what lies between its fields; commas are taken"
            )
        marks = even or marks
    return (marks or ["\t"])[0]


def _bare(line: bytes) -> bytes:
    return re.sub(rb'"[^"]*"', b"", line)


def _fields(line: bytes, separator: str) -> list[str]:
    # Of a first line, which may turn out not to be text.
    text = line.decode("utf-8", "replace")
    reader = csv.reader([text], delimiter=separator, skipinitialspace=True)
    try:
        return [one.strip() for one in (next(reader) if '"' in text else text.split(separator))]
    except (csv.Error, StopIteration):
        return []


def _quoted(data: bytes, separator: str, line: bytes) -> bool:
    if separator != "\t":
        return b'"' in data
    fields = [bare for one in line.split(b"\t") if (bare := one.strip())]
    wrapped = [len(one) > 1 and one.startswith(b'"') and one.endswith(b'"') for one in fields]
    numbers = [one.isdigit() for one in fields]  # some programs put words into quotes and numbers not
    return sum(wrapped) >= 2 and all(a or b for a, b in zip(wrapped, numbers, strict=True))


def _comes_again(data: bytes, header: _Line, words: list[str]) -> bool:
    """Whether the words head, relation, tail of a header are names too: that of the relation, and one of the others."""
    end, marks = header.start + len(header.text), (b"\t", b",", b";", b'"', b"\n")
    head, relation, tail = words

    def perhaps(word: str) -> bool:  # a plain look, which a large file can pay for
        bare = word.encode()
        return any(data.find(mark + bare, end) >= 0 for mark in marks)

    if not (perhaps(relation) and (perhaps(head) or perhaps(tail))):
        return False
    rest = data[header.start + len(header.text) :].replace(b"\n" + header.text + b"\n", b"\n") + b"\n"

    def used(word: str) -> bool:
        return re.search(rb'(?<=[\t,;"\n])' + re.escape(word.encode()) + rb'(?=[\t,;"\n])', rest) is not None

    return used(relation) and (used(head) or used(tail))


def _blocks(data: bytes, start: int = 0) -> Iterator[tuple[int, int]]:
    """Pieces of about 64 MB that end with a line: neither a triple nor a letter is ever cut in two."""
    while start < len(data):
        end = min(start + _BLOCK, len(data))
        if end < len(data):
            end = (data.rfind(b"\n", start, end) + 1) or (data.find(b"\n", end) + 1) or len(data)
        yield start, end
        start = end


def _triples(lines: pl.DataFrame, layout: Layout, path: Path, left: Counter[str], quoted: set[str]) -> pl.DataFrame:
    # left: what was left out on the way, and how often.
    full = lines.filter(pl.col("line").str.strip_chars() != "")
    left[_BLANK] += len(lines) - len(full)
    if layout.header is not None:
        kept = full.filter(pl.col("line") != layout.header.decode())
        left[_HEADERS] += len(full) - len(kept)
        full = kept
    cells = full.with_columns(_cut(layout).alias("cells")).unnest("cells")
    last, rest = f"field_{layout.width - 1}", f"field_{layout.width}"
    behind = cells[rest].fill_null("").str.strip_chars(f"{layout.separator} ")
    wrong = cells[last].is_null() | (behind != "")
    if wrong.any():
        comment = wrong & cells["line"].str.starts_with("#")
        _refuse_widths(cells.filter(wrong & ~comment), layout, path)
        left[_COMMENTS] += int(comment.sum())
        cells = cells.filter(~comment)
    trailing = cells[rest] != "" if layout.quoted else cells[rest].is_not_null()
    left[_TRAILING] += int(trailing.sum())
    places = zip(layout.places, COLUMNS, strict=True)
    frame = cells.select("number", "line", *(pl.col(f"field_{place}").alias(name) for place, name in places))
    if layout.quoted:
        frame = _unquoted(frame, left, quoted)
    elif layout.separator != "\t":
        frame = frame.with_columns(pl.col(COLUMNS).str.strip_chars("\t"))
    refuse_words(frame, path, "line")
    return frame.drop("line")


def _cut(layout: Layout) -> pl.Expr:
    """field_0 … of a line, the last one what is behind the columns; null where there are too few, or wrong quotes."""
    if not layout.quoted:
        return pl.col("line").str.splitn(layout.separator, layout.width + 1)
    mark = re.escape(layout.separator)
    blank = rf"[\s--{mark}]*"
    one = rf'({blank}(?:"(?:[^"]|"")*"{blank}|[^"\s{mark}][^{mark}]*)?)'
    pattern = "^" + mark.join([one] * layout.width) + rf"((?:{mark}.*)?)$"
    return (
        pl.col("line").str.extract_groups(pattern).struct.rename_fields([f"field_{i}" for i in range(layout.width + 1)])
    )


def _unquoted(frame: pl.DataFrame, left: Counter[str], quoted: set[str]) -> pl.DataFrame:
    for column in COLUMNS:
        raw = frame[column]
        bare = raw.str.strip_chars()
        marked = bare.str.starts_with('"')
        left[_AROUND_QUOTES] += int((marked & (raw != bare)).sum())
        inner = bare.str.slice(1).str.head(-1).str.replace_all('""', '"', literal=True)
        quoted.update(inner.filter(marked & (inner != inner.str.strip_chars())).unique().to_list())
        frame = frame.with_columns(pl.when(marked).then(inner).otherwise(raw.str.strip_chars("\t")).alias(column))
    return frame


def _refuse_widths(wrong: pl.DataFrame, layout: Layout, path: Path) -> None:
    if not len(wrong):
        return
    line, number = wrong["line"][0], wrong["number"][0]
    where, mark = f"{path}, line {number}", layout.separator
    fields = line.split(mark)
    if layout.quoted and '"' in line:
        try:
            fields = next(csv.reader([line], delimiter=mark, skipinitialspace=True, strict=True))
        except csv.Error as error:
            cure = 'close the quotes, write " as "", and no line break in a name'
            raise DataError(f"{where}: {error}; {cure}") from None
    columns = f"{len(fields)} column{'s' if len(fields) != 1 else ''}"
    more = f" ({len(wrong):,} lines are like this)" if len(wrong) > 1 else ""
    cure = f"head, relation and tail with {_SEPARATORS[mark]} between them"
    if len(fields) > layout.width:
        cure += "; of more columns, name three head, relation and tail in a first line"
    raise DataError(f"{where}: {columns} in {shorten(line)!r}, expected {layout.width}: {cure}{more}")


def refuse_words(frame: pl.DataFrame, path: Path, unit: str) -> None:
    """Raises DataError for the first name that is empty, or holds what names cannot hold."""
    empty = [frame[column].str.strip_chars() == "" for column in COLUMNS]
    broken = [frame[column].str.strip_chars().str.contains(r"[\t\n\r\x00]") for column in COLUMNS]
    for masks, what in (
        (empty, "the {} is empty{}; fill it or remove the {}"),
        (broken, "a tab or a line break in a field; remove it"),
    ):
        rows = [int(mask.arg_true()[0]) if mask.any() else len(frame) for mask in masks]
        row = min(rows)
        if row < len(frame):
            shown = f" in {shorten(frame['line'][row])!r}" if "line" in frame.columns else ""
            told = what.format(COLUMNS[rows.index(row)], shown, unit)
            raise DataError(f"{path}, {unit} {frame['number'][row]}: {told}")
