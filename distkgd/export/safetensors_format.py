"""One safetensors file per table. The folder is a model folder again: `load_model` and the launchers read it."""

from itertools import chain
from pathlib import Path
from typing import Any

from distkgd.distributed.model_files import safetensors_header, write_bytes
from distkgd.export.source import Source


def write_safetensors(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.safetensors and relation.safetensors."""
    for table in source.tables:
        header = safetensors_header({table.name: (table.tag, table.shape, table.size)})
        write_bytes(folder / f"{table.name}.safetensors", chain([header], table.pieces()))
    return {"files": {table.name: [f"{table.name}.safetensors"] for table in source.tables}}
