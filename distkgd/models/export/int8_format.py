"""Entities in 8 bits each number with a scale per row; relations as they are. A model folder: all launchers read it."""

from itertools import chain
from pathlib import Path
from typing import Any

from distkgd.distributed.checkpoint.tables import safetensors_header, write_bytes
from distkgd.models.export.source import Source
from distkgd.models.formats.int8 import write_int8
from distkgd.models.model_folder import INT8


def write_int8_rows(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.safetensors (see `distributed.int8_files`) and relation.safetensors."""
    entity, relation = source.tables
    write_int8(folder / "entity.safetensors", entity.blocks, entity.shape[0], source.scorer.biases, source.scorer.dim)
    header = safetensors_header({"relation": (relation.tag, relation.shape, relation.size)})
    write_bytes(folder / "relation.safetensors", chain([header], relation.pieces()))
    return {"format": INT8, "files": {table.name: [f"{table.name}.safetensors"] for table in source.tables}}
