"""One safetensors file per table and a model card. The folder is a model folder again: the launchers read it."""

from itertools import chain
from pathlib import Path
from typing import Any

from distkgd.distributed.checkpoint.tables import safetensors_header, write_bytes
from distkgd.models.export.card import write_card
from distkgd.models.export.source import Source


def write_safetensors(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.safetensors, relation.safetensors and README.md."""
    write_card(source, folder)
    for table in source.tables:
        header = safetensors_header({table.name: (table.tag, table.shape, table.size)})
        write_bytes(folder / f"{table.name}.safetensors", chain([header], table.pieces()))
    return {"files": {table.name: [f"{table.name}.safetensors"] for table in source.tables}}
