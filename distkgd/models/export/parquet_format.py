"""One Parquet file per table, a row per entity or relation: id, name, label where there are any, embedding."""

from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from distkgd.common.optional_imports import need
from distkgd.errors import UnsupportedError
from distkgd.models.export.source import Source, Table, words_in

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16"}


def write_parquet(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.parquet and relation.parquet; there `inverse` says of which direction a row is.

    Raises UnsupportedError for a dtype that Parquet does not have, and without pyarrow.
    """
    for table, names in zip(source.tables, ("entities", "relations"), strict=True):
        if table.tag not in TYPES:
            raise UnsupportedError(f"parquet has no {table.tag} (table {table.name!r}); use --format safetensors.")
        _write(table, folder / f"{table.name}.parquet", source.folder / f"{names}.tsv")
    return {"format": "distkgd-parquet/1", "files": {table.name: [f"{table.name}.parquet"] for table in source.tables}}


def _write(table: Table, path: Path, names: Path) -> None:
    pa, parquet = need("pyarrow", "--format parquet"), need("pyarrow.parquet", "--format parquet")
    labels = names.with_name(f"{table.name}_labels.tsv")
    fields = [("id", pa.int64()), ("name", pa.string())]
    words = [words_in(names)]
    if labels.is_file():
        fields.append(("label", pa.string()))
        words.append(words_in(labels))
    if table.name == "relation":
        # Relations have one row each, or a second one for the inverse, with the same words.
        num = sum(1 for _ in words_in(names))
        fields.append(("inverse", pa.bool_()))
        words = [chain(column, words_in(file)) for column, file in zip(words, (names, labels), strict=False)]
        words.append(chain(repeat(False, num), repeat(True)))
    fields.append(("embedding", pa.list_(getattr(pa, TYPES[table.tag])(), table.shape[1])))
    schema, at = pa.schema(fields), 0
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for block in table.blocks():
            columns = [range(at, at + len(block)), *(list(islice(column, len(block))) for column in words)]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)]
            flat = pa.array(block.contiguous().view(-1).numpy())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, table.shape[1]))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            at += len(block)
