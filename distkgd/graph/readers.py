"""Read a folder of triples; whatever is wrong with it is named by file, line and cure. Nothing is ever written.

A data set is a folder with `train`, `valid` and `test`, each as .txt, .tsv or .csv, plain or .gz: UTF-8, no header,
`head<TAB>relation<TAB>tail`. A .csv whose first line has no tab and three comma-separated fields is read as RFC 4180.
`names.tsv` and `relation_names.tsv` (plain or .gz) may give labels: name, label, anything else.

Files are checked as arrays of byte positions and parsed by polars; a line is only looked at by Python code once a
check has found that some line is wrong.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from distkgd.errors import DataError
from distkgd.graph.triples import COLUMNS, SPLITS, Graph, Vocabulary, assemble, shorten, sorted_unique

ENDINGS = (".txt", ".tsv", ".csv", ".txt.gz", ".tsv.gz", ".csv.gz")
LABEL_ENDINGS = (".tsv", ".tsv.gz")
_BLOCK = 64 << 20
_BOM = b"\xef\xbb\xbf"
_SCHEMA = dict.fromkeys(COLUMNS, pl.String)


@dataclass(frozen=True)
class _Split:
    """One file as columns of strings. lines: [n] line of each row where rows and lines do not run in step."""

    path: Path
    frame: pl.DataFrame
    lines: np.ndarray | None = None

    def where(self, row: int) -> str:
        return f"{self.path}, line {row + 1 if self.lines is None else self.lines[row]}"


def read_folder(
    folder: str | Path, name: str | None = None, checksums: Mapping[str, str] | None = None
) -> Graph:
    """Read a data set. Ids follow the sorted names; triples keep the order of their file.

    name: of the graph; the folder's own name if not given.
    checksums: sha256 per split of the decompressed bytes with CRLF read as LF; a file that differs is refused.
    """
    folder = Path(folder).expanduser()
    present = _list_folder(folder)
    files = {split: _pick(folder, present, split, ENDINGS) for split in SPLITS}
    if files["train"] is None:
        raise DataError(
            f"{folder} is no data set: looked for train, valid and test with one of the endings {' '.join(ENDINGS)}; "
            f"train is missing; there {_and_list(present)}"
        )
    digest = hashlib.sha256()
    splits: dict[str, _Split] = {}
    warnings: list[str] = []
    for split, path in files.items():
        if path is None:
            warnings.append(f"{split}: no such file in {folder}; the split is empty")
            continue
        data = _read_bytes(path)
        digest.update(data)
        _check_sum(data, path, (checksums or {}).get(split))
        splits[split] = _parse_triples(data, path)
    entities = sorted_unique([s.frame[column] for s in splits.values() for column in ("head", "tail")])
    relations = sorted_unique([s.frame["relation"] for s in splits.values()])
    _refuse_blank_fields(splits, entities, relations)
    _refuse_new_relations(splits)
    frames = {
        split: splits[split].frame if split in splits else pl.DataFrame(schema=_SCHEMA) for split in SPLITS
    }
    vocabularies = [
        Vocabulary(names, _read_labels(_pick(folder, present, stem, LABEL_ENDINGS), names, warnings))
        for names, stem in ((entities, "names"), (relations, "relation_names"))
    ]
    return assemble(name or folder.resolve().name, frames, *vocabularies, digest.hexdigest(), tuple(warnings))


def _list_folder(folder: Path) -> list[str]:
    if folder.is_file():
        raise DataError(f"{folder} is a file; give the folder that holds train, valid and test")
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: there is no such folder; give the folder that holds train, valid and test"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the folder cannot be read: {error}") from error


def _and_list(present: list[str]) -> str:
    if not present:
        return "is nothing in it"
    return "are: " + ", ".join(present[:10]) + (f" and {len(present) - 10} more" if len(present) > 10 else "")


def _pick(folder: Path, present: list[str], stem: str, endings: tuple[str, ...]) -> Path | None:
    found = [stem + ending for ending in endings if stem + ending in present]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(found)}; it is unclear which is meant: keep one {stem} file"
        )
    if not found:
        return None
    path = folder / found[0]
    # A pipe would wait for ever and a folder cannot be read: both are refused before they are opened.
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path} is not a file but a {'folder' if path.is_dir() else 'device or pipe'}; put a file there"
        )
    return path


def _read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed, CRLF turned into LF."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz" and data:
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip file is cut off or damaged ({error}); copy or download it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{path}: the file cannot be read ({reason}); check that it exists and its permissions"
        ) from error
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
        data = data[:-1] if data.endswith(b"\r") else data
    return data


def _check_sum(data: bytes, path: Path, expected: str | None) -> None:
    if expected is None:
        return
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise DataError(
            f"{path}: sha256 of its content is {found}, expected {expected}: this is not the published file; "
            "delete the folder to have it downloaded again, or rename it to use it as a data set of your own"
        )


def _clean_text(data: bytes, path: Path) -> bytes:
    """The text without its byte-order mark and its last line ends. Raises DataError when it is none, or not UTF-8."""
    first = len(_BOM) if data.startswith(_BOM) else 0
    if not data.isascii():
        for start, end in _blocks(data):
            try:
                data[start:end].decode("utf-8")
            except UnicodeDecodeError as error:
                byte = start + error.start
                cure = (
                    "it starts like gzip: let its name end in .gz"
                    if data[:2] == b"\x1f\x8b"
                    else "save it as UTF-8"
                )
                line = data.count(b"\n", 0, byte) + 1
                message = f"{path}, line {line}: byte {byte} (0x{data[byte]:02x}) is not UTF-8; {cure}"
                raise DataError(message) from None
    if (zero := data.find(0)) >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise DataError(
            f"{path}, line {line}: byte {zero} is NUL; this is no text file or a damaged one: save it as UTF-8"
        )
    text = data[first:].rstrip(b"\n")
    if not text:
        raise DataError(f"{path}: the file is empty; fill it, or remove it if there is nothing to put in")
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


def _parse_triples(data: bytes, path: Path) -> _Split:
    text = _clean_text(data, path)
    separator = "\t"
    if ".csv" in path.suffixes[-2:]:
        head = text[: text.find(b"\n")] if b"\n" in text else text
        if b"\t" not in head and (head.count(b",") == 2 or len(next(csv.reader([head.decode()]))) == 3):
            separator = ","
    if separator == "," and b'"' in text:
        return _parse_quoted(text, path)
    for start, end in _blocks(text):
        _check_columns(text, start, end, path, separator)
    return _Split(path, _read_columns(text, path, separator, _SCHEMA))


def _read_columns(
    text: bytes, path: Path, separator: str, schema: Mapping[str, type[pl.String]]
) -> pl.DataFrame:
    try:
        frame = pl.read_csv(text, separator=separator, has_header=False, quote_char=None, schema=dict(schema))
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
        _check_fields(
            line.decode(), line.decode().split(separator), f"{path}, line {lines_before + row + 1}", separator
        )
    raise AssertionError("the fast check and the slow one disagree")


def _check_fields(line: str, fields: list[str], where: str, separator: str = ",") -> None:
    if not line.strip(" \r"):
        raise DataError(f"{where}: the line is blank; remove it")
    kind = "TAB" if separator == "\t" else "comma"
    if len(fields) != 3:
        raise DataError(
            f"{where}: {len(fields)} column{'s' if len(fields) != 1 else ''} in {shorten(line)!r}, expected 3: "
            f"head, relation and tail with a {kind} between them"
        )
    for column, field in zip(COLUMNS, fields, strict=True):
        if not field.strip():
            raise DataError(
                f"{where}: the {column} is empty in {shorten(line)!r}; fill it or remove the line"
            )


def _parse_quoted(text: bytes, path: Path) -> _Split:
    """Quoted commas need Python's csv module: some 1 M lines per second instead of 10 M."""
    reader = csv.reader(io.StringIO(text.decode(), newline=""), strict=True)
    columns: tuple[list[str], list[str], list[str]] = ([], [], [])
    lines: list[int] = []
    begun = 1
    try:
        for fields in reader:
            where = f"{path}, line {begun}"
            _check_fields(",".join(fields), fields, where)
            if any("\t" in field or "\n" in field for field in fields):
                raise DataError(
                    f"{where}: a field holds a tab or a line break: {shorten(','.join(fields))!r}; remove it"
                )
            for column, field in zip(columns, fields, strict=True):
                column.append(field)
            lines.append(begun)
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f'{path}, line {begun}: the quotes are wrong ({error}); close them, write " as ""'
        ) from error
    frame = pl.DataFrame(dict(zip(COLUMNS, columns, strict=True)), schema=_SCHEMA)
    return _Split(path, frame, np.array(lines))


def _refuse_blank_fields(splits: Mapping[str, _Split], entities: pl.Series, relations: pl.Series) -> None:
    """Blanks are looked for among the distinct names, which are few beside the fields; only then is the line found."""
    names = pl.concat([entities, relations])
    blank = names.filter(names.str.strip_chars() == "")
    if blank.is_empty():
        return
    for split in splits.values():
        rows = split.frame.select(pl.any_horizontal(pl.all().is_in(blank.implode()))).to_series().arg_true()
        if len(rows):
            fields = split.frame.row(int(rows[0]))
            column = next(c for c, field in zip(COLUMNS, fields, strict=True) if not field.strip())
            raise DataError(
                f"{split.where(int(rows[0]))}: the {column} is empty (nothing but blanks) in {shorten(' '.join(fields))!r}; "
                "fill it or remove the line"
            )


def _refuse_new_relations(splits: Mapping[str, _Split]) -> None:
    known = splits["train"].frame["relation"].unique()
    for split in splits.values():
        rows = (~split.frame["relation"].is_in(known.implode())).arg_true()
        if len(rows):
            relation = split.frame["relation"][int(rows[0])]
            raise DataError(
                f"{split.where(int(rows[0]))}: train has no triple with the relation {shorten(relation)!r}, so nothing "
                f"can be learnt about it; add one to {splits['train'].path.name} or remove the {len(rows):,} lines with "
                "such relations"
            )


def _read_labels(path: Path | None, names: pl.Series, warnings: list[str]) -> pl.Series | None:
    """[n] labels beside `names`, null where the file has none; the first one counts where a name has several."""
    if path is None:
        return None
    text = _clean_text(_read_bytes(path), path)
    # NUL was refused, so splitting on it gives whole lines, without a million Python strings.
    table = (
        _read_columns(text, path, "\0", {"line": pl.String}).to_series().str.splitn("\t", 3).struct.unnest()
    )
    table = table.rename({"field_0": "name", "field_1": "label"}).select("name", "label")
    wrong = table.select((pl.col("name").str.strip_chars() == "") | pl.col("label").is_null()).to_series()
    if len(row := wrong.fill_null(True).arg_true()):
        line = text.split(b"\n")[row[0]].decode()
        raise DataError(
            f"{path}, line {row[0] + 1}: expected a name, a TAB and its label, found {shorten(line)!r}; "
            "correct or remove the line"
        )
    table = table.filter(pl.col("label").str.strip_chars() != "")
    once = table.unique(subset="name", keep="first", maintain_order=True)
    if doubled := len(table) - len(once):
        warnings.append(
            f"{path.name}: {doubled:,} lines give another label to a name that has one; the first is used"
        )
    return pl.DataFrame({"name": names}).join(once, on="name", how="left", maintain_order="left")["label"]
