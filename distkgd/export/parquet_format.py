"""One Parquet file per table, a row per entity or relation: id, name, label where there are any, embedding."""

from pathlib import Path
from typing import Any

import polars as pl

from distkgd.errors import UnsupportedError
from distkgd.export.extras import need
from distkgd.export.source import Source, Table
from distkgd.graph import Vocabulary
from distkgd.model_folder import read_names

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16"}


def write_parquet(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.parquet and relation.parquet; there `inverse` says of which direction a row is.

    Raises UnsupportedError for a dtype that Parquet does not have, and without pyarrow.
    """
    config = source.config
    vocabularies = {
        "entity": read_names(source.folder, "entities", "entity_labels", int(config["num_entities"])),
        "relation": read_names(source.folder, "relations", "relation_labels", int(config["num_relations"])),
    }
    for table in source.tables:
        if table.tag not in TYPES:
            raise UnsupportedError(f"parquet has no {table.tag} (table {table.name!r}); use --format safetensors.")
        _write(table, folder / f"{table.name}.parquet", vocabularies[table.name])
    return {"format": "distkgd-parquet/1", "files": {table.name: [f"{table.name}.parquet"] for table in source.tables}}


def _write(table: Table, path: Path, words: Vocabulary) -> None:
    pa, parquet = need("pyarrow", "--format parquet"), need("pyarrow.parquet", "--format parquet")
    fields = [("id", pa.int64()), ("name", pa.large_string())]
    if words.labels is not None:
        fields.append(("label", pa.large_string()))
    if table.name == "relation":
        fields.append(("inverse", pa.bool_()))
    fields.append(("embedding", pa.list_(getattr(pa, TYPES[table.tag])(), table.shape[1])))
    schema, at = pa.schema(fields), 0
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for block in table.blocks():
            ids = pl.int_range(at, at + len(block), eager=True)
            rows = ids % max(1, len(words))
            columns = [ids, words.names.gather(rows)]
            columns += [] if words.labels is None else [words.labels.gather(rows)]
            columns += [ids >= len(words)] if table.name == "relation" else []
            flat = pa.array(block.contiguous().view(-1).numpy())
            arrays = [column.to_arrow().cast(field.type) for column, field in zip(columns, schema, strict=False)]
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, table.shape[1]))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            at += len(block)
