"""One .npy file per table, for `numpy.load(…, mmap_mode="r")`."""

from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.lib import format as npy

from distkgd.distributed.checkpoint.tables import write_bytes
from distkgd.errors import UnsupportedError
from distkgd.models.export.source import Source

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def write_numpy(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.npy and relation.npy; UnsupportedError for a dtype that numpy does not have."""
    for table in source.tables:
        if table.tag not in DTYPES:
            raise UnsupportedError(f"numpy has no {table.tag} (table {table.name!r}); use --format safetensors.")
        header = BytesIO()
        layout = {"descr": DTYPES[table.tag], "fortran_order": False, "shape": table.shape}
        npy.write_array_header_1_0(header, layout)
        write_bytes(folder / f"{table.name}.npy", chain([header.getvalue()], table.pieces()))
    return {"format": "distkgd-numpy/1", "files": {table.name: [f"{table.name}.npy"] for table in source.tables}}
