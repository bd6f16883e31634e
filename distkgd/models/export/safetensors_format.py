"""One safetensors file per table. The folder is a model folder again: the launchers read it."""

from itertools import chain
from pathlib import Path
from typing import Any

from distkgd.distributed.checkpoint.tables import safetensors_header, write_bytes
from distkgd.models.export.source import Source, Table


def write_safetensors(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.safetensors and relation.safetensors."""
    return {"files": {name: files for table in source.tables for name, files in write_plain(table, folder).items()}}


def write_plain(table: Table, folder: Path) -> dict[str, list[str]]:
    """Write one table as it is; {its name: its files}."""
    header = safetensors_header({table.name: (table.tag, table.shape, table.size)})
    file = f"{table.name}.safetensors"
    write_bytes(folder / file, chain([header], table.pieces()))
    return {table.name: [file]}
