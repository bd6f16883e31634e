"""A finished model folder as exporters see it: tables as streams of bytes or rows, so that none is ever in memory."""

import csv
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.common.paths import AnyPath
from distkgd.distributed.checkpoint.tables import TAGS, stored_tensor
from distkgd.errors import ModelError
from distkgd.kernels.packed import PackedRows
from distkgd.kernels.quantiser import Packed, Quantiser, Rounding, quantiser_of
from distkgd.models.formats.packed import read_packed
from distkgd.models.formats.zeros import read_zeros
from distkgd.models.model_folder import FORMAT, PACKED, check_files, check_numbers, find_model, read_config
from distkgd.scorers import Scorer, from_constants

PIECE_BYTES = 1 << 22
_NUMBERS_AT_ONCE = 1 << 18  # of packed rows widened
DTYPE_OF = {tag: dtype for dtype, tag in TAGS.items()}
ITEM_BYTES = {tag: dtype.itemsize for dtype, tag in TAGS.items()}


@dataclass(frozen=True)
class Part:
    """A safetensors file that holds one tensor and nothing else, so its bytes are the last `size` of the file."""

    path: Path
    tag: str
    shape: tuple[int, ...]
    size: int
    sha256: str

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes; ModelError after the last of them when the file is not what was written."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                digest.update(file.read(self.path.stat().st_size - self.size))
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
                    yield piece
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error}.") from error
        if digest.hexdigest() != self.sha256:
            raise ModelError(f"{self.path}: sha256 differs from config.json's: its content has changed.")


@dataclass(frozen=True)
class Table:
    """Parts that make one table [rows, columns] of one dtype.

    tag: of the rows as they are given out, as safetensors spells it; the parts may be in a narrower one.
    columns: those of the parts' columns that the table has, in its order; None: all.
    """

    name: str
    tag: str
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    columns: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * ITEM_BYTES[self.tag]

    def pieces(self) -> Iterator[bytes]:
        """All rows in order: little-endian, row after row."""
        if self.columns is None and all(part.tag == self.tag for part in self.parts):
            for part in self.parts:
                yield from part.pieces()
        else:
            for rows in self.blocks():
                yield rows.contiguous().view(torch.uint8).numpy().tobytes()

    def blocks(self) -> Iterator[Tensor]:
        """[k, columns] all rows in order, a few megabytes at a time."""
        for part in self.parts:
            dtype = DTYPE_OF[part.tag]
            data, row_bytes = bytearray(), math.prod(part.shape[1:]) * dtype.itemsize
            for piece in part.pieces():
                data += piece
                num = len(data) // row_bytes
                rest = data[num * row_bytes :]
                if num:
                    rows = torch.frombuffer(data, dtype=dtype, count=num * part.shape[1]).reshape(num, -1)
                    yield self._columns(rows)
                data = rest

    def rows(self, ids: Tensor) -> Tensor:
        """[len(ids), columns]: rows by number, reading only those."""
        wanted, place = ids.unique(return_inverse=True)
        found = torch.empty(len(wanted), self.parts[0].shape[1], dtype=DTYPE_OF[self.parts[0].tag])
        start = 0
        for part in self.parts:
            here = ((wanted >= start) & (wanted < start + part.shape[0])).nonzero().flatten().tolist()
            if here:
                with stored_tensor(part.path, self.name, ModelError) as stored:
                    for i in here:
                        row = int(wanted[i]) - start
                        found[i : i + 1] = stored[row : row + 1]
            start += part.shape[0]
        return self._columns(found[place])

    def crop(self, columns: Tensor) -> "Table":
        """The same rows of some columns ([k] int64)."""
        return replace(self, shape=(self.shape[0], len(columns)), columns=columns)

    def _columns(self, rows: Tensor) -> Tensor:
        return (rows if self.columns is None else rows[:, self.columns]).to(DTYPE_OF[self.tag])


@dataclass(frozen=True)
class HeldTable(Table):
    """A table of few bits, float32 for whoever reads it. held: its rows, in memory, widened where they have zeros."""

    held: PackedRows | Tensor = field(kw_only=True)

    def pieces(self) -> Iterator[bytes]:
        """All rows in order: little-endian, row after row."""
        for rows in self.blocks():
            yield rows.contiguous().view(torch.uint8).numpy().tobytes()

    def blocks(self) -> Iterator[Tensor]:
        """[k, columns] all rows in order, a few megabytes at a time."""
        few = max(1, _NUMBERS_AT_ONCE // self.held.shape[1])
        for at in range(0, len(self.held), few):
            yield self._columns(self._taken(slice(at, at + few)))

    def rows(self, ids: Tensor) -> Tensor:
        """[len(ids), columns]: rows by number."""
        return self._columns(self._taken(ids))

    def _taken(self, which: Tensor | slice) -> Tensor:
        return self.held[which] if isinstance(self.held, Tensor) else self.held.take(which)


@dataclass(frozen=True)
class PackedTable(HeldTable):
    """One that is packed in memory."""

    held: PackedRows = field(kw_only=True)

    def packed(self, bits: int) -> Packed:
        """The table's columns in a width that is nested in the rows' (or theirs), with steps as they are."""
        biases = self.held.quantiser.biases
        columns = torch.arange(self.held.shape[1]) if self.columns is None else self.columns
        return self.held.crop(bits, columns[biases:] - biases).packed


@dataclass(frozen=True)
class Source:
    """A model folder whose config.json and table headers agree.

    rounding: bits of the entities' and relations' numbers, and columns that share a step, where a format asks for them
    (None: nothing was said of them).
    """

    folder: Path
    config: dict[str, Any]
    scorer: Scorer
    entity: Table
    relation: Table
    rounding: Rounding | None = None

    @property
    def tables(self) -> tuple[Table, Table]:
        """What every format writes."""
        return self.entity, self.relation

    @property
    def plain_config(self) -> dict[str, Any]:
        """config.json of the model with its tables as they are read: what is packed is float32 by then."""
        widened = {"format": FORMAT, "dtype": "float32"} if self.config["format"] == PACKED else {}
        return {key: value for key, value in self.config.items() if key not in ("packed", "widened")} | widened

    def bits(self, table: str) -> int:
        """Of each number of "entity" or "relation" as the model holds them."""
        bits: int = self.config.get("packed", {}).get(table, {}).get("bits", 32)
        return bits

    def one_step_a_row(self, table: str) -> bool:
        """Whether a packed table's rows are not cut into groups of columns."""
        return quantiser_of(self.config["packed"][table]).group is None

    def widened(self, *tables: str) -> list[str]:
        """What to say of those of the tables, "entity" and "relation", that are written wider than the model's."""
        said = []
        for name in tables:
            if (bits := self.bits(name)) < 32:
                width = getattr(self, name).shape[1]
                how, many = quantiser_of(self.config["packed"][name]), "s" if bits > 1 else ""
                before = "" if how.zeros else f", {how.row_bytes(width)} to {4 * width:,} bytes a row"
                said.append(f"{name}: {bits} bit{many} widened to float32{before}")
        return said

    def crop(self, dim: int) -> "Source":
        """The model made of the first `dim` coordinates; ConfigError or UnsupportedError where there is none."""
        scorer = self.scorer.crop(dim)
        entity = self.entity.crop(torch.arange(scorer.entity_size))
        relation = self.relation.crop(self.scorer.crop_columns(dim))
        config = self.config | {"scorer": scorer.constants(), "crop_of": {"dim": self.scorer.dim}}
        return replace(self, config=config, scorer=scorer, entity=entity, relation=relation)


def open_source(folder: AnyPath) -> Source:
    """The model in `folder` or its `model/` subfolder; ModelError names what is missing, wrong or not finite."""
    folder = Path(folder)
    folder = find_model(folder)
    config = read_config(folder)
    if config["format"] not in (FORMAT, PACKED):
        raise ModelError(f"{folder} is an export already ({config['format']}); export the model that it was made of.")
    try:
        scorer = from_constants(config["scorer"])
        num_relations = int(config["num_relations"]) * (2 if config["reciprocal"] else 1)
        shapes = {
            "entity": (int(config["num_entities"]), scorer.entity_size),
            "relation": (num_relations, scorer.relation_size),
        }
        files = {
            name: [(str(file), str(config["sha256"][file])) for file in of_table]
            for name, of_table in config["files"].items()
        }
        packed = {
            name: quantiser_of(about) for name, about in config.get("packed", {}).items() if f"{name}.codes" in files
        }
    except ModelError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json lacks or garbles {error}; write the model again.") from None
    if packed:
        check_files(folder)  # packed tables are read whole; the others are checked as they are streamed
    tables = [
        _open_packed(folder, config, name, shape, packed[name])
        if name in packed
        else _open_table(folder, name, shape, files.get(name, []), config["format"] == PACKED)
        for name, shape in shapes.items()
    ]
    check_numbers(folder)
    entity, relation = tables
    return Source(folder, config, scorer, entity, relation)


def _open_packed(
    folder: Path, config: dict[str, Any], name: str, shape: tuple[int, int], quantiser: Quantiser
) -> HeldTable:
    if quantiser.zeros:
        rows = read_zeros(folder, config["files"], name, quantiser, shape[1], 0, shape[0])
        return HeldTable(name, "F32", shape, (), held=rows)
    packed = read_packed(folder, config["files"], name, quantiser, shape[1], 0, shape[0])
    return PackedTable(name, "F32", shape, (), held=PackedRows(packed, quantiser))


def _open_table(folder: Path, name: str, shape: tuple[int, int], files: list[tuple[str, str]], widens: bool) -> Table:
    # widens: of a packed model, which computes in float32 whatever it stores.
    parts = tuple(_open_part(folder / file, name, sha256) for file, sha256 in files)
    tags = {part.tag for part in parts}
    rows = sum(part.shape[0] for part in parts)
    if len(tags) != 1 or {part.shape[1:] for part in parts} != {shape[1:]} or rows != shape[0]:
        held = ", ".join(f"{part.path.name}: {part.tag} {list(part.shape)}" for part in parts) or "no file"
        raise ModelError(f"{folder}: config.json promises a table {name!r} of {list(shape)}, there is {held}.")
    tag = tags.pop()
    return Table(name, "F32" if widens else tag, shape, parts)


def _open_part(path: Path, name: str, sha256: str) -> Part:
    try:
        with safe_open(path, "pt") as file:  # refuses a file that is shorter or longer than its header says
            names = list(file.keys())
            stored = file.get_slice(name)
            tag, shape = stored.get_dtype(), tuple(stored.get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: missing, truncated, or without tensor {name!r}: {error}.") from error
    if names != [name] or not shape or tag not in ITEM_BYTES:
        raise ModelError(f"{path} holds {', '.join(names)} as {tag} {list(shape)}; expected rows of {name!r} alone.")
    return Part(path, tag, shape, math.prod(shape) * ITEM_BYTES[tag], sha256)


def words_in(path: Path) -> Iterator[Any]:
    """Names or labels, None for none, of the lines `id<TAB>text` in the order of their ids, read as they are needed."""
    with path.open(encoding="utf-8", newline="") as file:
        quoted = path.stem.endswith("_labels")
        lines = csv.reader(file, delimiter="\t") if quoted else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        yield from (text or None for _, text in lines)
