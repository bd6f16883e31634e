"""Tables rounded to few bits, without training, or nested ones narrowed. A model folder: all launchers read it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distkgd.distributed.checkpoint.tables import Rows, write_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError
from distkgd.kernels.quantiser import Quantiser, Rounding
from distkgd.models.export.safetensors_format import write_plain
from distkgd.models.export.source import PackedTable, Source, Table
from distkgd.models.formats.packed import stream_packed, tables_of
from distkgd.models.formats.zeros import write_zeros
from distkgd.models.model_folder import PACKED

PRUNED = 0.25  # share of a table that is 0 from which on zeros are kept


def write_packed_tables(source: Source, folder: Path) -> dict[str, Any]:
    """Write the tables as `models.formats.packed` has them, those that keep 32 bits as they are.

    Of a table of which a quarter or more is 0, what is 0 stays 0 (`models.formats.zeros`); that table is in
    memory meanwhile.

    Of a model of nested bits those of its tables that are packed keep their codes and steps, the entities' in as many
    bits as are asked for (default: all). ModelError where another model is packed already: it would be rounded twice.
    """
    rounding = source.rounding or Rounding()
    if (nested := _nested(source)) is not None:
        rounding = _kept(source, nested)
    elif source.config["format"] == PACKED:
        raise ModelError(f"{source.folder} is packed already; pack the model that it was made of, or copy the folder.")
    how = rounding.quantisers(source.scorer)
    files: dict[str, list[str]] = {}
    for table in source.tables:
        if isinstance(table, PackedTable):
            for key, part in tables_of(table.name, table.packed(how[table.name].bits)).items():
                files[key] = [f"{key}.safetensors"]
                write_tensors(folder / files[key][0], {key: part})
        elif table.name in how and how[table.name].bits <= 8 and _is_pruned(table, how[table.name].biases):
            how[table.name] = replace(how[table.name], zeros=True)
            rows = Rows(torch.cat([block.float() for block in table.blocks()]), 0, table.shape[0])
            files |= write_zeros(folder, table.name, rows, how[table.name], Ranks())
        elif table.name in how:
            files |= stream_packed(folder, table.name, table.blocks, table.shape, how[table.name])
        else:
            files |= write_plain(table, folder)
    return {"format": PACKED, "packed": {name: one.to_json() for name, one in how.items()}, "files": files}


def _is_pruned(table: Table, biases: int) -> bool:
    # count_nonzero makes nothing on the way.
    kept = sum(int(torch.count_nonzero(block[:, biases:])) for block in table.blocks())
    return kept <= (1 - PRUNED) * table.shape[0] * (table.shape[1] - biases)


def _nested(source: Source) -> Quantiser | None:
    table = source.entity
    return table.held.quantiser if isinstance(table, PackedTable) and table.held.quantiser.coarser else None


def _kept(source: Source, nested: Quantiser) -> Rounding:
    """What a model of nested bits is written as; ConfigError where other rows are asked for than it has."""
    asked = source.rounding or Rounding(nested.bits)
    nested.narrowed(asked.bits)
    if asked.group not in (None, nested.group):
        raise ConfigError(f"group {asked.group}: which columns share a step was settled in training; leave it out.")
    packed = source.config["packed"].get("relation", {}).get("bits", 32)
    if packed < 32 and asked.relation_bits not in (32, packed):
        raise ConfigError(f"relation_bits {asked.relation_bits}: the relations have {packed} already; leave it out.")
    return Rounding(asked.bits, min(packed, asked.relation_bits), nested.group)
