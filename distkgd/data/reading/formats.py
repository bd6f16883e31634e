"""What files of triples may be called, their bytes, and those without lines of words: Parquet, RDF, OpenKE, LibKGE.

Readers give frames `number` (of the line, row or statement, from 1), head, relation, tail, as the file has them.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from distkgd.common.optional_imports import need
from distkgd.common.paths import AnyPath
from distkgd.data.triples import COLUMNS
from distkgd.errors import ConfigError, DataError, shorten

TEXT_ENDINGS = (".txt", ".tsv", ".csv", ".txt.gz", ".tsv.gz", ".csv.gz")
RDF = {".nt": "N_TRIPLES", ".nq": "N_QUADS", ".ttl": "TURTLE"}  # ending -> its name in pyoxigraph
ENDINGS = (*TEXT_ENDINGS, ".parquet", *RDF, *(ending + ".gz" for ending in RDF))
# What the columns of triples are called: in lower case, with _ for blanks, without the marks of SPARQL and Neo4j.
HEADERS = {
    "head": {"head", "h", "subject", "subj", "s", "source", "src", "from", "start", "node1", "entity1", "entity_1"},
    "relation": {"relation", "rel", "r", "predicate", "pred", "p", "property", "edge", "edge_type", "type", "label"}
    | {"relationship", "relation_type", "rel_type", "edge_label"},
    "tail": {"tail", "t", "object", "obj", "o", "target", "dst", "to", "end", "node2", "entity2", "entity_2"},
}
ABOUT = "split.json"  # is in a folder that distkgd has written, and says how
_LABELS = re.compile(rb"_:([^\s;,\[\]()<>\"']+)")  # of blank nodes in Turtle; what literals hold does no harm
_STATEMENTS = 100_000  # that are Python objects at the same time
_OPENKE_NAMES = {"entity": "entity2id.txt", "relation": "relation2id.txt"}
_LIBKGE_NAMES = {"entity": "entity_ids.del", "relation": "relation_ids.del"}
LIBKGE = ".del"  # what LibKGE's files end in


@dataclass(frozen=True)
class How:
    """What a person says of files of triples.

    columns: what their columns hold, in order: head, relation and tail once each, anything else is not used.
    literals: those of RDF are entities too.
    """

    columns: tuple[str, ...] | None = None
    literals: bool = False

    def __post_init__(self) -> None:
        if self.columns is not None and any(self.columns.count(column) != 1 for column in COLUMNS):
            given = ",".join(self.columns)
            raise ConfigError(f"--columns {given}: name head, relation and tail once each, such as head,tail,relation.")

    @property
    def places(self) -> tuple[int, int, int] | None:
        """Of head, relation and tail among the columns."""
        if self.columns is None:
            return None
        head, relation, tail = map(self.columns.index, COLUMNS)
        return head, relation, tail


AS_THEY_ARE = How()


def ending_of(name: str) -> str | None:
    """The ending by which a file of triples is read, in lower case; None for any other file."""
    return max((ending for ending in ENDINGS if name.lower().endswith(ending)), key=len, default=None)


def check_file(path: Path) -> None:
    """Raises DataError for what is no file of triples by its name."""
    if ending_of(path.name) is None:
        raise DataError(f"{path}: a file of triples ends in one of {' '.join(ENDINGS)}; rename or convert it")
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give a file of triples")


def expand(path: AnyPath) -> Path:
    """A path in which ~ is the home, unless something of that very name is here."""
    path = Path(path)
    try:
        return path if path.exists() else path.expanduser()
    except (RuntimeError, OSError, ValueError):  # nobody's home; a name that no file can have
        return path


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed; of a text, CRLF turned into LF."""
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz") and data:
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is cut off or damaged ({error}); copy it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: the file cannot be read ({reason}); check the file and its rights") from error
    if path.name.lower().endswith(".parquet"):
        return data
    while b"\r" in data and b"\r\n" in data:  # more than once where an editor has turned CRLF into CRCRLF
        data = data.replace(b"\r\n", b"\n")
    return data.removesuffix(b"\r")


def places_of(names: list[str]) -> tuple[int, int, int] | None:
    """Where the columns head, relation and tail are among those called `names`, None if that is not clear."""
    plain = [re.sub(r"[\s-]+", "_", name.strip().lstrip("#?:").strip().lower()).removesuffix("_id") for name in names]
    found = []
    for column in COLUMNS:
        here = [i for i, name in enumerate(plain) if name in HEADERS[column]]
        if len(here) != 1:
            return None
        found.append(here[0])
    return found[0], found[1], found[2]


def read_parquet(data: bytes, path: Path, how: How) -> pl.DataFrame:
    """The rows of a Parquet file; columns that are not named are head, relation, tail in this order."""
    try:
        table = pl.read_parquet(io.BytesIO(data))
        places = how.places or places_of(table.columns)
        if len(table.columns) != len(how.columns or COLUMNS) and (how.columns or places is None):
            listed = ", ".join(table.columns[:10])
            raise DataError(f"{path}: its columns are {listed}; call three of them head, relation and tail")
        for place in places or (0, 1, 2):
            if table.dtypes[place].is_nested():
                found = f"its column {table.columns[place]!r} holds {table.dtypes[place]}"
                raise DataError(f"{path}: {found}; make it words or numbers")
        named = zip(places or (0, 1, 2), COLUMNS, strict=True)
        texts = [pl.nth(place).cast(pl.String).fill_null("").alias(column) for place, column in named]
        return table.select(texts).with_row_index("number", offset=1)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a Parquet file of words or numbers: {str(error).splitlines()[0]}") from error


def read_rdf(data: bytes, path: Path, how: How, notes: list[str]) -> Iterator[pl.DataFrame]:
    """The statements of N-Triples, N-Quads and Turtle, IRIs without their brackets; what is left out is noted."""
    ox = need("pyoxigraph", f"{path.name}: to read RDF", "rdf")
    kind = RDF[(ending_of(path.name) or "").removesuffix(".gz")]
    literals = nested = graphs = first = 0
    name_of = _RdfNames(path.name, data if kind == "TURTLE" else b"")
    try:
        statements = ox.parse(data, format=getattr(ox.RdfFormat, kind))
        while batch := list(itertools.islice(statements, _STATEMENTS)):
            rows = []
            for number, quad in enumerate(batch, first + 1):
                graphs += not isinstance(quad.graph_name, ox.DefaultGraph)
                if isinstance(quad.subject, ox.Triple) or isinstance(quad.object, ox.Triple):
                    nested += 1
                elif isinstance(quad.object, ox.Literal) and not how.literals:
                    literals += 1
                else:
                    rows.append((number, *map(name_of, (quad.subject, quad.predicate, quad.object))))
            first += len(batch)
            yield pl.DataFrame(rows, schema={"number": pl.Int64} | dict.fromkeys(COLUMNS, pl.String), orient="row")
    except SyntaxError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}; correct it") from None
    name = path.name
    if literals:
        notes.append(
            f"{name}: {literals:,} of {first:,} triples end in a literal and are left out; --literals keeps them"
        )
    if nested:
        notes.append(f"{name}: {nested:,} of {first:,} statements speak about triples; they are left out")
    if graphs:
        notes.append(f"{name}: {graphs:,} of {first:,} statements are in named graphs; all graphs are read as one")


class _RdfNames:
    """Names of terms: an IRI by itself; blank nodes and literals as N-Triples writes them, where tabs are escaped.

    Nodes of Turtle without a label are numbered as they come: the library names them anew at every reading.
    """

    def __init__(self, file: str, turtle: bytes) -> None:
        self._labels = {match[1].rstrip(b".").decode(errors="replace") for match in _LABELS.finditer(turtle)}
        self._numbers: dict[str, int] = {}
        self._file, self._turtle = file, bool(turtle)

    def __call__(self, term: Any) -> str:
        kind = type(term).__name__
        if kind == "NamedNode":
            return str(term.value)
        if kind == "BlankNode" and self._turtle and term.value not in self._labels:
            return f"[] {self._numbers.setdefault(term.value, len(self._numbers) + 1)} of {self._file}"
        return str(term)


def is_openke(first: bytes, second: bytes) -> bool:
    """Whether a file's first two lines are those of OpenKE: how many triples there are, then three ids."""
    return re.fullmatch(rb"\s*\d+\s*", first) is not None and re.fullmatch(rb"\s*\d+(\s+\d+){2}\s*", second) is not None


def read_openke(lines: pl.DataFrame, path: Path, notes: list[str]) -> tuple[pl.DataFrame, bytes]:
    """Triples of OpenKE's lines, which hold head, tail, relation; and the bytes of the files their names are in.

    lines: `number` and `line`, the first of which says how many follow. Without files of names, ids are names.
    """
    count, rest = int(lines["line"][0]), lines[1:]
    columns = _numbers(rest, path, r"^\s*(\d+)\s+(\d+)\s+(\d+)\s*$", "three ids: head, tail and relation")
    if count != len(rest):
        raise DataError(
            f"{path}, line {lines['number'][0]}: it says {count:,} triples, and {len(rest):,} lines follow; "
            "copy the file again, or correct the number"
        )
    ids = dict(zip(("head", "tail", "relation"), columns, strict=True))
    return _with_names(rest["number"], ids, path, notes, _OPENKE_NAMES)


def read_libkge(lines: pl.DataFrame, path: Path, notes: list[str]) -> tuple[pl.DataFrame, bytes]:
    """Triples of the lines of LibKGE's train.del, which hold head, relation, tail; else as `read_openke`."""
    columns = _numbers(
        lines, path, r"^(\d+)\t(\d+)\t(\d+)\s*$", "three ids: head, relation and tail, with TABs between"
    )
    return _with_names(lines["number"], dict(zip(COLUMNS, columns, strict=True)), path, notes, _LIBKGE_NAMES)


def _with_names(
    numbers: pl.Series, ids: Mapping[str, pl.Series], path: Path, notes: list[str], files: Mapping[str, str]
) -> tuple[pl.DataFrame, bytes]:
    """Names in place of ids, from the files beside `path`, where there are any; and the bytes of these."""
    beside, tables = b"", {}
    for kind, name in files.items():
        table = path.with_name(name)
        if table.is_file():
            content = read_bytes(table)
            beside, tables[kind] = beside + content, _names_of_ids(content, table)
        else:
            notes.append(f"{path.name}: no {name} beside it, so ids are taken as the names of its {kind} column")
    found = {"number": numbers}
    for column, rows in ids.items():
        kind = "relation" if column == "relation" else "entity"
        if kind not in tables:
            found[column] = rows.cast(pl.String)
            continue
        found[column] = rows.replace_strict(*tables[kind], default=None, return_dtype=pl.String)
        if found[column].null_count():
            row = int(found[column].is_null().arg_true()[0])
            where = f"{path}, line {numbers[row]}"
            raise DataError(f"{where}: the {column} {rows[row]} is not in {files[kind]}; add it")
    return pl.DataFrame(found).select("number", *COLUMNS), beside


def _names_of_ids(content: bytes, path: Path) -> tuple[pl.Series, pl.Series]:
    # Ids, and the name of each: behind it with LibKGE, before it with OpenKE, where a first line may count them.
    libkge = path.name.endswith(LIBKGE)
    try:
        lines = lines_of(content)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a table of text: {str(error).splitlines()[0]}") from error
    full = lines.filter(pl.col("line").str.strip_chars() != "")
    if not libkge and len(full) and re.fullmatch(r"\s*\d+\s*", full["line"][0]):
        full = full[1:]
    expected = "an id, a TAB and its name" if libkge else "a name, a TAB and its id"
    ids = _numbers(full, path, r"^(\d+)\t" if libkge else r"\s(\d+)\s*$", expected)[0]
    names = full["line"].str.replace(r"^\d+\t" if libkge else r"\s+\d+\s*$", "").str.strip_chars()
    if (wrong := (names == "") | names.str.contains("\t")).any():
        row = int(wrong.arg_true()[0])
        raise DataError(
            f"{path}, line {full['number'][row]}: {shorten(full['line'][row])!r}, expected {expected}; correct it"
        )
    for what, column in (("id", ids), ("name", names)):
        if len(twice := column.filter(column.is_duplicated())):
            raise DataError(f"{path}: the {what} {twice[0]!r} stands there twice; correct it")
    return ids, names


def _numbers(lines: pl.DataFrame, path: Path, pattern: str, expected: str) -> list[pl.Series]:
    found = lines["line"].str.extract_groups(pattern).struct.unnest()
    columns = [column.cast(pl.Int64, strict=False) for column in found.get_columns()]
    for column in columns:
        if column.null_count():
            row = int(column.is_null().arg_true()[0])
            line = shorten(lines["line"][row])
            raise DataError(f"{path}, line {lines['number'][row]}: {line!r}, expected {expected}; correct it")
    return columns


def lines_of(text: bytes, first: int = 1) -> pl.DataFrame:
    """`number`, from `first`, and `line` of a clean text; NUL was refused, so cutting at it gives whole lines."""
    # The header keeps polars from taking a byte-order mark off the first line.
    whole = b"".join([b"line\n", text, b"" if text.endswith(b"\n") else b"\n"])
    frame = pl.read_csv(whole, separator="\0", quote_char=None, schema={"line": pl.String})
    assert len(frame) == whole.count(b"\n") - 1, "polars saw other lines than we did"
    return frame.select(pl.col("line").fill_null("")).with_row_index("number", offset=first)
