"""Read a folder of triples; whatever is wrong with it is named by file, line and cure. Nothing is written.

A data set is a folder with `train`, `valid` and `test`, each as .txt, .tsv or .csv, plain or .gz: UTF-8, no
header, `head<TAB>relation<TAB>tail`. A .csv whose first line has no tab and three comma-separated fields is
read as RFC 4180. `names.tsv` and `relation_names.tsv` (plain or .gz) may give labels: name, label, and more.

A file is checked and turned into numbers in one pass (kernels/names.cpp). Without a compiler, and where that pass
stumbles, files are checked as arrays of byte positions and parsed by polars; Python code looks at single lines only
once a check has found that one of them is wrong.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from distkgd.errors import DataError
from distkgd.graph.triples import COLUMNS, SPLITS, Graph, Vocabulary, assemble_rows, encode, shorten, sorted_unique
from distkgd.kernels.names import NameTables

ENDINGS = (".txt", ".tsv", ".csv", ".txt.gz", ".tsv.gz", ".csv.gz")
LABEL_ENDINGS = (".tsv", ".tsv.gz")
_BLOCK = 64 << 20
_BOM = b"\xef\xbb\xbf"


# What a file becomes: numbers [n, 3] in order of appearance, or else columns of strings. Blank lines and line breaks in
# fields are refused: rows are lines.
_Parsed = Tensor | pl.DataFrame


def read_folder(folder: str | Path, name: str | None = None, checksums: Mapping[str, str] | None = None) -> Graph:
    """Read a data set. Ids follow the sorted names; triples keep the order of their file.

    name: of the graph; the folder's own name if not given.
    checksums: sha256 per split of the decompressed bytes, CRLF read as LF; a file that differs is refused.
    """
    folder = Path(folder).expanduser()
    present = _list_folder(folder)
    files = {split: _pick(folder, present, split, ENDINGS) for split in SPLITS}
    if files["train"] is None:
        looked_for = f"looked for train, valid and test ending in {' '.join(ENDINGS)}"
        raise DataError(f"{folder} is no data set: {looked_for}; train is missing; there {_listed(present)}")
    paths = {split: path for split, path in files.items() if path is not None}
    warnings = [f"{split}: no such file in {folder}; the split is empty" for split in SPLITS if split not in paths]
    digest = hashlib.sha256()
    parsed: dict[str, _Parsed] = {}
    with ThreadPoolExecutor(1) as beside, NameTables.open() as tables:
        for split, path in paths.items():
            data = read_bytes(path)
            _check_sum(data, path, (checksums or {}).get(split))
            beside.submit(digest.update, data)  # one after the other, while the same bytes are parsed
            parsed[split] = _parse_triples(data, path, tables)
            del data
        rows, entities, relations = _number(parsed, tables)
    _refuse_blank_fields(paths, rows, entities, relations)
    _refuse_new_relations(paths, rows, relations)
    entity_labels, relation_labels = (
        _read_labels(_pick(folder, present, stem, LABEL_ENDINGS), names, warnings)
        for names, stem in ((entities, "names"), (relations, "relation_names"))
    )
    return assemble_rows(
        name or folder.resolve().name,
        rows,
        Vocabulary(entities, entity_labels),
        Vocabulary(relations, relation_labels),
        digest.hexdigest(),
        tuple(warnings),
    )


def _list_folder(folder: Path) -> list[str]:
    if folder.is_file():
        cure = (
            "give the folder that holds train, valid and test; launch/distill.py with --to makes one of a single file"
        )
        raise DataError(f"{folder} is a file; {cure}")
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder; give the one with train, valid and test") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the folder cannot be read: {error}") from error


def _listed(present: list[str]) -> str:
    if not present:
        return "is nothing in it"
    return "are: " + ", ".join(present[:10]) + (f" and {len(present) - 10} more" if len(present) > 10 else "")


def _pick(folder: Path, present: list[str], stem: str, endings: tuple[str, ...]) -> Path | None:
    found = [stem + ending for ending in endings if stem + ending in present]
    if len(found) > 1:
        raise DataError(f"{folder} holds {' and '.join(found)}, and only one can be meant; remove the other")
    if not found:
        return None
    path = folder / found[0]
    # A pipe would wait for ever and a folder cannot be read: both are refused before they are opened.
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is a {'folder' if path.is_dir() else 'device or pipe'}; put a file there")
    return path


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed, CRLF turned into LF."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz" and data:
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is cut off or damaged ({error}); copy it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: the file cannot be read ({reason}); check the file and its rights") from error
    while b"\r" in data and b"\r\n" in data:  # more than once where an editor has turned CRLF into CRCRLF
        data = data.replace(b"\r\n", b"\n")
    return data.removesuffix(b"\r")


def _check_sum(data: bytes, path: Path, expected: str | None) -> None:
    if expected is not None and (found := hashlib.sha256(data).hexdigest()) != expected:
        raise DataError(
            f"{path}: the sha256 of its content is {found}, expected {expected}: not the published file; "
            "remove it, or give its folder another name to read it as a data set of your own"
        )


def clean_text(data: bytes, path: Path) -> bytes:
    """The text without byte-order mark and last line ends. Raises DataError when it is none, or not UTF-8."""
    text = data.removeprefix(_BOM).rstrip(b"\n")
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
        is_gzip = text[:2] == b"\x1f\x8b"
        cure = (
            "it looks like gzip: let its name end in .gz" if is_gzip else "save it as UTF-8 with LF or CRLF line ends"
        )
        raise DataError(f"{path}, line {line}: byte {byte} of the line is {what}; {cure}")
    return text


def _blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """Pieces of about 64 MB that end with a line: neither a triple nor a letter is ever cut in two."""
    start = 0
    while start < len(data):
        end = min(start + _BLOCK, len(data))
        if end < len(data):
            end = (data.rfind(b"\n", start, end) + 1) or (data.find(b"\n", end) + 1) or len(data)
        yield start, end
        start = end


def _parse_triples(data: bytes, path: Path, tables: NameTables | None) -> _Parsed:
    start = len(_BOM) if data.startswith(_BOM) else 0
    separator, quoted = _separator(data, start, path)
    # polars drops a second byte-order mark.
    if tables is not None and not quoted and not data.startswith(_BOM, start):
        rows = tables.read(data, start, separator)
        if rows is not None:
            return rows
    text = clean_text(data, path)
    if quoted:
        frame = _parse_quoted(text, path)
    else:
        for first, end in _blocks(text):
            _check_columns(text, first, end, path, separator)
        frame = read_columns(text, path, separator, COLUMNS)
    if tables is None:
        return frame
    plain = frame.write_csv(include_header=False, separator="\t", quote_style="never").encode()
    rows = tables.read(plain, 0, "\t")
    if rows is None:
        raise MemoryError(f"{path}: no memory for a table of its names")
    return rows


def _separator(data: bytes, start: int, path: Path) -> tuple[str, bool]:
    """What stands between fields, and whether they need a reader of quotes."""
    if ".csv" in path.suffixes[-2:]:
        end = data.find(b"\n", start)
        first_line = data[start : end if end >= 0 else len(data)]
        if b"\t" not in first_line and re.sub(rb'"[^"]*"', b"", first_line).count(b",") == 2:
            return ",", b'"' in data or b"\t" in data
    return "\t", False


def _number(parsed: Mapping[str, _Parsed], tables: NameTables | None) -> tuple[dict[str, Tensor], pl.Series, pl.Series]:
    """Ids [n, 3] of each split by sorted names; the names of entities; those of relations."""
    rows = {split: part for split, part in parsed.items() if isinstance(part, Tensor)}
    if tables is not None:
        entities, relations = map(_names, tables.sort(rows.values()))
        return rows, entities, relations
    frames = {split: part for split, part in parsed.items() if isinstance(part, pl.DataFrame)}
    entities = sorted_unique([frame[column] for frame in frames.values() for column in ("head", "tail")])
    relations = sorted_unique([frame["relation"] for frame in frames.values()])
    return {split: encode(frame, entities, relations) for split, frame in frames.items()}, entities, relations


def _names(lines: bytes) -> pl.Series:
    # The header keeps polars from taking a byte-order mark off the first name.
    text, schema = b"name\n" + lines, {"name": pl.String}
    names = pl.read_csv(text, separator="\0", quote_char=None, schema=schema)["name"].rechunk()
    assert len(names) == lines.count(b"\n"), "polars saw other names than we did"
    return names


def read_columns(text: bytes, path: Path, separator: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """The columns of a clean text, without any idea of quotes; as many rows as lines."""
    schema = dict.fromkeys(columns, pl.String)
    try:
        frame = pl.read_csv(text, separator=separator, has_header=False, quote_char=None, schema=schema)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a table of text: {str(error).splitlines()[0]}") from error
    assert len(frame) == text.count(b"\n") + 1, f"{path}: polars saw other lines than we did"
    return frame


def _check_columns(text: bytes, start: int, end: int, path: Path, separator: str) -> None:
    """Every line of text[start:end] holds two separators with something before, between and behind them."""
    block = np.frombuffer(text, np.uint8, end - start, start)
    ends = np.flatnonzero(block == ord("\n"))
    if block[-1] != ord("\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1])
    cuts = np.flatnonzero(block == ord(separator))
    if len(cuts) == 2 * len(ends):
        first, second = cuts[0::2], cuts[1::2]
        if ((starts < first) & (first + 1 < second) & (second + 1 < ends)).all():
            return
    lines_before = text.count(b"\n", 0, start)
    for row, line in enumerate(text[start:end].removesuffix(b"\n").split(b"\n")):
        where = f"{path}, line {lines_before + row + 1}"
        _check_fields(line.decode().split(separator), where, separator)
    raise AssertionError("the fast check and the slow one disagree")


def _check_fields(fields: list[str], where: str, separator: str) -> None:
    line = separator.join(fields)
    if not line.strip(" \r"):
        raise DataError(f"{where}: the line is blank; remove it")
    if len(fields) != 3:
        found = f"{len(fields)} column{'s' if len(fields) != 1 else ''} in {shorten(line)!r}"
        between = "TABs" if separator == "\t" else "commas"
        raise DataError(f"{where}: {found}, expected 3: head, relation and tail with {between} between them")
    for column, field in zip(COLUMNS, fields, strict=True):
        if not field.strip():
            raise DataError(f"{where}: the {column} is empty in {shorten(line)!r}; fill it or remove the line")


def _parse_quoted(text: bytes, path: Path) -> pl.DataFrame:
    """Quoted commas need Python's csv module, which is many times slower than the arrays above."""
    rows: list[list[str]] = []
    try:
        for fields in csv.reader(io.StringIO(text.decode(), newline=""), strict=True):
            where = f"{path}, line {len(rows) + 1}"
            _check_fields(fields, where, ",")
            if any("\t" in field or "\n" in field for field in fields):
                raise DataError(f"{where}: a tab or a line break in a field; remove it")
            rows.append(fields)
    except csv.Error as error:
        raise DataError(f'{path}, line {len(rows) + 1}: {error}; close the quotes, write " as ""') from error
    return pl.DataFrame(rows, schema=COLUMNS, orient="row")


def _refuse_blank_fields(
    paths: Mapping[str, Path], rows: Mapping[str, Tensor], entities: pl.Series, relations: pl.Series
) -> None:
    """Looks among the distinct names, which are fewer than the fields; the line is found only if need be."""
    blank, blank_relation = (torch.from_numpy((x.str.strip_chars() == "").to_numpy()) for x in (entities, relations))
    if not (blank.any() or blank_relation.any()):
        return
    for split, (head, relation, tail) in ((split, found.unbind(1)) for split, found in rows.items()):
        lines = (blank[head] | blank_relation[relation] | blank[tail]).nonzero()
        if len(lines):
            line = int(lines[0])
            names = entities[int(head[line])], relations[int(relation[line])], entities[int(tail[line])]
            _check_fields(list(names), f"{paths[split]}, line {line + 1}", "\t")


def _refuse_new_relations(paths: Mapping[str, Path], rows: Mapping[str, Tensor], relations: pl.Series) -> None:
    new = torch.ones(len(relations), dtype=torch.bool)
    new[rows["train"][:, 1]] = False
    for split, path in paths.items():
        if split != "train" and len(lines := new[rows[split][:, 1]].nonzero()):
            line = int(lines[0])
            relation = shorten(relations[int(rows[split][line, 1])])
            raise DataError(
                f"{path}, line {line + 1}: train has no triple with the relation {relation!r}, so nothing can "
                f"be learnt about it; add some there, or remove all {len(lines):,} lines with such relations"
            )


def _read_labels(path: Path | None, names: pl.Series, warnings: list[str]) -> pl.Series | None:
    """[n] labels beside `names`, null where the file has none; of several for one name the first counts."""
    if path is None:
        return None
    text = clean_text(read_bytes(path), path)
    # NUL was refused, so splitting on it gives whole lines, without a million Python strings.
    lines = read_columns(text, path, "\0", ("line",)).to_series()
    table = lines.str.splitn("\t", 3).struct.unnest().select(name="field_0", label="field_1")
    wrong = table.select((pl.col("name").str.strip_chars() == "") | pl.col("label").is_null()).to_series()
    if len(rows := wrong.fill_null(True).arg_true()):
        found = shorten(lines[rows[0]] or "")
        raise DataError(
            f"{path}, line {rows[0] + 1}: expected a name, a TAB and its label, found {found!r}; correct it"
        )
    table = table.filter(pl.col("label").str.strip_chars() != "")
    once = table.unique(subset="name", keep="first", maintain_order=True)
    if doubled := len(table) - len(once):
        warnings.append(f"{path.name}: {doubled:,} lines give a second label to a name; the first is used")
    return pl.DataFrame({"name": names}).join(once, on="name", how="left", maintain_order="left")["label"]
