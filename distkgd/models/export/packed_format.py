"""Tables rounded to few bits, without training. A model folder: all launchers read it."""

from pathlib import Path
from typing import Any

from distkgd.errors import ModelError
from distkgd.models.export.safetensors_format import write_plain
from distkgd.models.export.source import Source
from distkgd.models.formats.packed import stream_packed
from distkgd.models.model_folder import PACKED


def write_packed_tables(source: Source, folder: Path) -> dict[str, Any]:
    """Write the tables as `models.formats.packed` has them, those that keep 32 bits as they are.

    ModelError where a table is packed already: it would be rounded twice.
    """
    if source.config["format"] == PACKED:
        raise ModelError(f"{source.folder} is packed already; pack the model that it was made of, or copy the folder.")
    how = source.rounding.quantisers(source.scorer)
    files: dict[str, list[str]] = {}
    for table in source.tables:
        if table.name in how:
            files |= stream_packed(folder, table.name, table.blocks, table.shape, how[table.name])
        else:
            files |= write_plain(table, folder)
    return {"format": PACKED, "packed": {name: one.to_json() for name, one in how.items()}, "files": files}
