"""One safetensors file per table, zeros left out where that takes fewer bytes.

The folder is a model folder: `load_model` and the launchers read it.
"""

from pathlib import Path
from typing import Any

from distkgd.models.export.source import Source
from distkgd.models.formats.sparse import write_sparse
from distkgd.models.model_folder import SPARSE


def write_sparse_tables(source: Source, folder: Path) -> dict[str, Any]:
    """Write a file per table, each in its smallest layout (see `distributed.sparse_files`)."""
    for table in source.tables:
        write_sparse(folder / f"{table.name}.safetensors", table.pieces, table.tag, table.shape)
    return {"format": SPARSE, "files": {table.name: [f"{table.name}.safetensors"] for table in source.tables}}
