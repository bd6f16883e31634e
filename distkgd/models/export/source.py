"""A finished model folder as exporters see it: tables as streams of bytes or rows, so that none is ever in memory."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.common.paths import AnyPath
from distkgd.distributed.checkpoint.tables import TAGS
from distkgd.errors import ModelError
from distkgd.models.model_folder import FORMAT, check_numbers, find_model, read_config
from distkgd.scorers import Scorer, from_constants

PIECE_BYTES = 1 << 22
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
    """Parts that make one table [rows, columns] of one dtype (`tag`: as safetensors spells it).

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
        if self.columns is None:
            for part in self.parts:
                yield from part.pieces()
        else:
            for rows in self.blocks():
                yield rows.contiguous().view(torch.uint8).numpy().tobytes()

    def blocks(self) -> Iterator[Tensor]:
        """[k, columns] all rows in order, a few megabytes at a time."""
        dtype = DTYPE_OF[self.tag]
        for part in self.parts:
            data, row_bytes = bytearray(), math.prod(part.shape[1:]) * dtype.itemsize
            for piece in part.pieces():
                data += piece
                num = len(data) // row_bytes
                rest = data[num * row_bytes :]
                if num:
                    rows = torch.frombuffer(data, dtype=dtype, count=num * part.shape[1]).reshape(num, -1)
                    yield rows if self.columns is None else rows[:, self.columns]
                data = rest

    def crop(self, columns: Tensor) -> "Table":
        """The same rows of some columns ([k] int64)."""
        return replace(self, shape=(self.shape[0], len(columns)), columns=columns)


@dataclass(frozen=True)
class Source:
    """A model folder whose config.json and table headers agree."""

    folder: Path
    config: dict[str, Any]
    scorer: Scorer
    entity: Table
    relation: Table

    @property
    def tables(self) -> tuple[Table, Table]:
        """What every format writes."""
        return self.entity, self.relation

    def crop(self, dim: int) -> "Source":
        """The model made of the first `dim` coordinates; ConfigError or UnsupportedError where there is none."""
        scorer = self.scorer.crop(dim)
        entity = self.entity.crop(torch.arange(scorer.entity_size))
        relation = self.relation.crop(self.scorer.crop_columns(dim))
        config = self.config | {"scorer": scorer.constants(), "crop_of": {"dim": self.scorer.dim}}
        return Source(self.folder, config, scorer, entity, relation)


def open_source(folder: AnyPath) -> Source:
    """The model in `folder` or its `model/` subfolder; ModelError names what is missing, wrong or not finite."""
    folder = Path(folder)
    folder = find_model(folder)
    config = read_config(folder)
    if config["format"] != FORMAT:
        raise ModelError(f"{folder} is an export already ({config['format']}); export the model that it was made of.")
    try:
        scorer = from_constants(config["scorer"])
        num_relations = int(config["num_relations"]) * (2 if config["reciprocal"] else 1)
        shapes = {
            "entity": (int(config["num_entities"]), scorer.entity_size),
            "relation": (num_relations, scorer.relation_size),
        }
        files = {name: [(str(file), str(config["sha256"][file])) for file in config["files"][name]] for name in shapes}
    except ModelError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json lacks or garbles {error}; write the model again.") from None
    tables = [_open_table(folder, name, shapes[name], files[name]) for name in shapes]
    check_numbers(folder)
    return Source(folder, config, scorer, *tables)


def _open_table(folder: Path, name: str, shape: tuple[int, int], files: list[tuple[str, str]]) -> Table:
    parts = tuple(_open_part(folder / file, name, sha256) for file, sha256 in files)
    tags = {part.tag for part in parts}
    rows = sum(part.shape[0] for part in parts)
    if len(tags) != 1 or {part.shape[1:] for part in parts} != {shape[1:]} or rows != shape[0]:
        held = ", ".join(f"{part.path.name}: {part.tag} {list(part.shape)}" for part in parts) or "no file"
        raise ModelError(f"{folder}: config.json promises a table {name!r} of {list(shape)}, there is {held}.")
    return Table(name, tags.pop(), shape, parts)


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
