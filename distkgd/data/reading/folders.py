"""Read files and folders of triples; whatever is wrong is named by file, line and cure. Nothing is written.

A data set is a folder with `train`, `valid` and `test`, each a file that could be read alone: lines of text (plain or
.gz), Parquet, RDF, ids of OpenKE or LibKGE. `names.tsv` and `relation_names.tsv` (plain or .gz) may give labels: name,
label, and more.

Plain text is checked and turned into numbers in one pass (kernels/cpp/names.cpp). Where that pass stumbles, quotes are
read or no compiler is at hand, polars cuts the lines (text_files.py); what is odd about names is settled among the
distinct ones (odd_names.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from distkgd.common.paths import AnyPath
from distkgd.data.reading.formats import (
    ABOUT,
    AS_THEY_ARE,
    ENDINGS,
    LIBKGE,
    RDF,
    TEXT_ENDINGS,
    How,
    ending_of,
    expand,
    lines_of,
    read_bytes,
    read_parquet,
    read_rdf,
)
from distkgd.data.reading.odd_names import settle, told_first_lines, told_names, told_order
from distkgd.data.reading.text_files import (
    Layout,
    clean_text,
    layout_of,
    read_ids,
    read_lines,
    refuse_words,
    without_mark,
)
from distkgd.data.triples import COLUMNS, SPLITS, Graph, Vocabulary, assemble, encode, sorted_unique, words_of
from distkgd.errors import DataError, shorten
from distkgd.kernels.names import NameTables

LABEL_ENDINGS = (".tsv", ".tsv.gz")
_ALIASES = {"train": (), "valid": ("val", "dev", "validation"), "test": ()}


@dataclass
class _Part:
    """What a file becomes: numbers [n, 3] in order of appearance, or where nothing is compiled frames of strings.

    numbers: of the line, row or statement (`unit`) of each triple. beside: bytes of files that its names are in.
    may_be_header: whether its first line is a triple only because its words are no known names of columns.
    """

    path: Path
    unit: str = "line"
    rows: list[Tensor] = field(default_factory=list)
    frames: list[pl.DataFrame] = field(default_factory=list)
    numbers: list[pl.Series | range] = field(default_factory=list)
    beside: bytes = b""
    may_be_header: bool = False

    def where(self, row: int) -> str:
        """File and line of a triple."""
        for numbers in self.numbers:
            if row < len(numbers):
                return f"{self.path}, {self.unit} {numbers[row]}"
            row -= len(numbers)
        raise AssertionError("there are as many numbers as rows")


@dataclass
class Triples:
    """Ids [n, 3] of each split by sorted names, as the files have them; what a person should know of them."""

    rows: dict[str, Tensor]
    entities: pl.Series
    relations: pl.Series
    notes: list[str]
    sha256: str


def read_folder(
    folder: AnyPath, name: str | None = None, checksums: Mapping[str, str] | None = None, how: How = AS_THEY_ARE
) -> Graph:
    """Read a data set. Ids follow the sorted names; triples keep the order of their file.

    name: of the graph; the folder's own name if not given.
    checksums: sha256 per split of the decompressed bytes, CRLF read as LF; a file that differs is refused.
    """
    folder = expand(folder)
    present = _list_folder(folder)
    notes: list[str] = []
    files = {split: _find_split(folder, present, split, notes) for split in SPLITS}
    if files["train"] is None:
        looked_for = f"looked for train, valid and test ending in {' '.join(ENDINGS)}"
        raise DataError(f"{folder} is no data set: {looked_for}; train is missing; there {_listed(present)}")
    paths = {split: path for split, path in files.items() if path is not None}
    notes += [f"{split}: no such file in {folder}; the split is empty" for split in SPLITS if split not in paths]
    exact = _is_ours(folder)
    if exact and how.columns is not None:
        raise DataError(f"{folder} was written by distkgd, as head, relation, tail; leave the columns out")
    found = read_files(paths, how, checksums, exact)
    notes += found.notes
    entity_labels, relation_labels = (
        _read_labels(_label_file(folder, present, stem, kind), names, notes)
        for names, stem, kind in ((found.entities, "names", "entity"), (found.relations, "relation_names", "relation"))
    )
    return assemble(
        name or folder.resolve().name,
        found.rows,
        Vocabulary(found.entities, entity_labels),
        Vocabulary(found.relations, relation_labels),
        found.sha256,
        notes,
    )


def read_files(
    paths: Mapping[str, AnyPath],
    how: How = AS_THEY_ARE,
    checksums: Mapping[str, str] | None = None,
    exact: bool = False,
) -> Triples:
    """Read the file of each split, `train` among them. Raises DataError naming file, line and cure.

    exact: distkgd has written the files: names between TABs, as they are.
    """
    files = {split: Path(path) for split, path in paths.items()}
    digest = hashlib.sha256()
    notes: list[str] = []
    parts: dict[str, _Part] = {}
    quoted: set[str] = set()
    with ThreadPoolExecutor(1) as beside, NameTables.open() as tables:
        for split, path in files.items():
            data = read_bytes(path)
            _check_sum(data, path, (checksums or {}).get(split))
            beside.submit(digest.update, data)  # one after the other, while the same bytes are parsed
            parts[split] = _parse(data, path, how, exact, tables, notes, quoted)
            beside.submit(digest.update, parts[split].beside)
            del data
        rows, entities, relations = _number(parts, tables)
    doubts: list[str] = []
    if not exact:
        entities, relations = _settle(parts, rows, entities, relations, quoted, notes)
        firsts = {split: part.where(0) for split, part in parts.items() if part.may_be_header}
        doubts = told_first_lines(firsts, rows, entities, relations)
        notes += [*told_names(entities, "entities"), *told_names(relations, "relations")]
        notes += [*told_order(rows, entities, relations), *doubts]
    _refuse_new_relations(parts, rows, relations, doubts)
    return Triples(rows, entities, relations, notes, digest.hexdigest())


def _is_ours(folder: Path) -> bool:
    try:
        return "source_sha256" in json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _list_folder(folder: Path) -> list[str]:
    if folder.is_file():
        cure = "give the folder that holds train, valid and test; distkgd distill with --to makes one of a single file"
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


def _find_split(folder: Path, present: list[str], split: str, notes: list[str]) -> Path | None:
    """The file of a split: the usual text file, else any other that can be read, else one of another usual name."""
    stems = [split, *_ALIASES[split]]

    def called(stems: list[str]) -> list[str]:
        ends = [(name, ending_of(name)) for name in present]
        return [name for name, end in ends if end is not None and name.lower() in [stem + end for stem in stems]]

    usual = [split + end for end in TEXT_ENDINGS if split + end in present]
    openke = [name for name in present if name.lower() == f"{split}2id.txt"]
    libkge = [name for name in present if name.lower() == f"{split}{LIBKGE}"]
    ways = [usual, called(stems[:1]), called(stems[1:]), openke, libkge]
    found = next(filter(None, ways), [])
    path = _pick(folder, found)
    if path is None:
        unread = [name for name in present if name.split(".")[0].lower() in stems and (folder / name).is_file()]
        if unread and split != "train":  # without train the folder is refused anyway
            raise DataError(
                f"{folder / unread[0]}: a file of triples ends in one of {' '.join(ENDINGS)}; convert it, or take it "
                "out of the folder"
            )
        return None
    if found is ways[2]:
        notes.append(f"{path.name} is read as {split}")
    if others := sorted(set(called(stems) + openke) - set(found)):
        notes.append(f"{', '.join(others)}: not read, for {path.name} is {split}")
    return path


def _label_file(folder: Path, present: list[str], stem: str, kind: str) -> Path | None:
    # Ours, else LibKGE's.
    ours = [stem + end for end in LABEL_ENDINGS if stem + end in present]
    return _pick(folder, ours or [name for name in present if name == f"{kind}_strings{LIBKGE}"])


def _pick(folder: Path, found: list[str]) -> Path | None:
    if len(found) > 1:
        raise DataError(f"{folder} holds {' and '.join(found)}, and only one can be meant; remove the other")
    if not found:
        return None
    path = folder / found[0]
    # A pipe would wait for ever and a folder cannot be read: both are refused before they are opened.
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is a {'folder' if path.is_dir() else 'device or pipe'}; put a file there")
    return path


def _check_sum(data: bytes, path: Path, expected: str | None) -> None:
    if expected is not None and (found := hashlib.sha256(data).hexdigest()) != expected:
        raise DataError(
            f"{path}: the sha256 of its content is {found}, expected {expected}: not the published file; "
            "remove it, or give its folder another name to read it as a data set of your own"
        )


def _parse(
    data: bytes,
    path: Path,
    how: How,
    exact: bool,
    tables: NameTables | None,
    notes: list[str],
    quoted: set[str],
) -> _Part:
    ending = (ending_of(path.name) or "").removesuffix(".gz")
    part = _Part(path)
    if ending == ".parquet":
        part.unit = "row"
        frames: Iterable[pl.DataFrame] = [read_parquet(data, path, how)]
    elif ending in RDF:
        part.unit = "statement"
        frames = read_rdf(data, path, how, notes)
    else:
        body = without_mark(data)
        layout = Layout(0, 1) if exact else layout_of(body, path, how, notes)
        part.may_be_header = layout.header is None and not (layout.openke or layout.libkge)
        if tables is not None and layout.is_plain(body):
            rows = tables.read(body, layout.start, layout.separator)
            if rows is not None:
                part.rows.append(rows)
                part.numbers.append(range(layout.line, layout.line + len(rows)))
                return part
        text = clean_text(body, path)
        if layout.openke or layout.libkge:
            frame, part.beside = read_ids(text, layout, path, notes)
            frames = [frame]
        else:
            frames = read_lines(text, layout, path, notes, quoted)
    for frame in frames:
        if part.unit != "line":
            refuse_words(frame, path, part.unit)
        if len(frame):
            _add(part, frame, tables)
    if not part.numbers:
        raise DataError(f"{path}: no triple in it; one {part.unit} each: head, relation, tail")
    return part


def _add(part: _Part, frame: pl.DataFrame, tables: NameTables | None) -> None:
    part.numbers.append(frame["number"])
    words = frame.select(COLUMNS)
    if tables is None:
        part.frames.append(words)
        return
    plain = words.write_csv(include_header=False, separator="\t", quote_style="never").encode()
    rows = tables.read(plain, 0, "\t")
    assert rows is not None, "its fields were checked, so they are three a line"
    part.rows.append(rows)


def _number(parts: Mapping[str, _Part], tables: NameTables | None) -> tuple[dict[str, Tensor], pl.Series, pl.Series]:
    """Ids [n, 3] of each split by sorted names; the names of entities; those of relations."""
    if tables is not None:
        rows = {split: part.rows[0] if len(part.rows) == 1 else torch.cat(part.rows) for split, part in parts.items()}
        entities, relations = (lines_of(text)["line"].rename("name").rechunk() for text in tables.sort(rows.values()))
        return rows, entities, relations
    frames = {split: pl.concat(part.frames) for split, part in parts.items()}
    entities = sorted_unique([frame[column] for frame in frames.values() for column in ("head", "tail")])
    relations = sorted_unique([frame["relation"] for frame in frames.values()])
    return {split: encode(frame, entities, relations) for split, frame in frames.items()}, entities, relations


def _settle(
    parts: Mapping[str, _Part],
    rows: Mapping[str, Tensor],
    entities: pl.Series,
    relations: pl.Series,
    quoted: set[str],
    notes: list[str],
) -> tuple[pl.Series, pl.Series]:
    """Drop outer white space of names where none needs it, rows included; entities and relations as they are then."""
    settled = [settle(entities, quoted, "entities"), settle(relations, quoted, "relations")]
    if not any(settled):
        return entities, relations
    _refuse_blank_fields(parts, rows, entities, relations)
    for split, part in rows.items():
        fields = 0
        for place, found in enumerate((settled[0], settled[1], settled[0])):
            if found is not None:
                fields += int(found.dropped[part[:, place]].sum())
                part[:, place] = found.ids[part[:, place]]
        if fields:
            notes.append(f"{parts[split].path.name}: white space at the ends of {fields:,} fields was dropped")
    for found in settled:
        notes += found.notes if found is not None else ()
    return tuple(  # type: ignore[return-value]
        names if found is None else found.names for names, found in zip((entities, relations), settled, strict=True)
    )


def _refuse_blank_fields(
    parts: Mapping[str, _Part], rows: Mapping[str, Tensor], entities: pl.Series, relations: pl.Series
) -> None:
    """Looks among the distinct names, which are fewer than the fields; at the lines only if need be."""
    if any((names.str.strip_chars() == "").any() for names in (entities, relations)):
        for split, part in parts.items():
            frame = words_of(rows[split], entities, relations)
            numbers = pl.concat([pl.Series("number", one, dtype=pl.Int64) for one in part.numbers])
            refuse_words(frame.with_columns(numbers, line=pl.concat_str(COLUMNS, separator="\t")), part.path, part.unit)


def _refuse_new_relations(
    parts: Mapping[str, _Part], rows: Mapping[str, Tensor], relations: pl.Series, doubts: list[str]
) -> None:
    new = torch.ones(len(relations), dtype=torch.bool)
    new[rows["train"][:, 1]] = False
    for split, part in parts.items():
        if split != "train" and len(lines := new[rows[split][:, 1]].nonzero()):
            where = part.where(int(lines[0]))
            relation = shorten(relations[int(rows[split][int(lines[0]), 1])])
            header = "; if this line is a header, remove it" if any(note.startswith(where) for note in doubts) else ""
            raise DataError(
                f"{where}: train has no triple with the relation {relation!r}, so nothing can be learnt about it; "
                f"add some there, or remove all {len(lines):,} lines with such relations{header}"
            )


def _read_labels(path: Path | None, names: pl.Series, notes: list[str]) -> pl.Series | None:
    """[n] labels beside `names`, null where the file has none; of several for one name the first counts."""
    if path is None:
        return None
    lines = lines_of(clean_text(read_bytes(path), path))["line"]
    table = lines.str.splitn("\t", 3).struct.unnest().select(name="field_0", label="field_1")
    wrong = table.select((pl.col("name").str.strip_chars() == "") | pl.col("label").is_null()).to_series()
    if len(rows := wrong.fill_null(True).arg_true()):
        found = shorten(lines[rows[0]] or "")
        raise DataError(
            f"{path}, line {rows[0] + 1}: expected a name, a TAB and its label, found {found!r}; correct it"
        )
    bare = table.with_columns(pl.all().str.strip_chars()).filter(pl.col("label") != "")
    once = bare.unique(subset="name", keep="first", maintain_order=True)
    if doubled := len(bare) - len(once):
        notes.append(f"{path.name}: {doubled:,} lines give a second label to a name; the first is used")
    asked = pl.DataFrame({"name": names.str.strip_chars()})
    return asked.join(once, on="name", how="left", maintain_order="left")["label"]
