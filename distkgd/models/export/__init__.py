"""Finished models in the formats of other programs: `export_model` and the table FORMATS.

A format is a function (source, folder) -> changes to config.json, among them "files": {table: [file names]}. It
writes the tables; names, config.json and README.md are the same for all, and README.md ends with what the docstring of
the format's module says. Only the formats of IN_MEMORY hold tables in memory,
and `faiss` of few bits and `packed` of pruned tables.
Of a model of few bits config.json says in "widened" what was written in more.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distkgd.common.paths import AnyPath, check_folder
from distkgd.distributed.checkpoint.tables import atomic_folder
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError, UnsupportedError
from distkgd.kernels.quantiser import Rounding
from distkgd.models.export.card import write_card
from distkgd.models.export.faiss_format import write_faiss
from distkgd.models.export.numpy_format import write_numpy
from distkgd.models.export.onnx_format import write_onnx
from distkgd.models.export.packed_format import write_packed_tables
from distkgd.models.export.parquet_format import write_parquet
from distkgd.models.export.pykeen_format import write_pykeen
from distkgd.models.export.safetensors_format import write_safetensors
from distkgd.models.export.source import Source, open_source
from distkgd.models.export.sparse_format import write_sparse_tables
from distkgd.models.export.text_format import write_projector, write_word2vec
from distkgd.models.model_folder import check_files, sha256_of

Format = Callable[[Source, Path], dict[str, Any]]

FORMATS: dict[str, Format] = {
    "safetensors": write_safetensors,
    "numpy": write_numpy,
    "sparse": write_sparse_tables,
    "packed": write_packed_tables,
    "parquet": write_parquet,
    "faiss": write_faiss,
    "onnx": write_onnx,
    "pykeen": write_pykeen,
    "projector": write_projector,
    "word2vec": write_word2vec,
}
IN_MEMORY = ("onnx", "pykeen")

__all__ = ["FORMATS", "IN_MEMORY", "check_files", "export_model"]


def export_model(
    model: AnyPath,
    out: AnyPath,
    format_: str,
    ranks: Ranks,
    dim: int | None = None,
    rounding: Rounding | None = None,
) -> list[Path]:
    """Write the model in `model` to the new folder `out`, which appears only when it is complete; returns its files.

    dim: write the crop to the first `dim` coordinates; ConfigError or UnsupportedError where there is none.
    rounding: of format "packed"; default: 8 bits for entities, relations as they are.
    """
    model, out = Path(model), Path(out)
    if format_ not in FORMATS:
        raise ConfigError(f"format {format_!r} is not known; allowed: {', '.join(FORMATS)}.")
    if rounding is not None and format_ != "packed":
        raise ConfigError(f"bits and group are of format packed, not of {format_}; drop one of the two.")
    if ranks.world > 1:
        raise UnsupportedError(f"an export runs in one process, not in {ranks.world}; start it without torchrun.")
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; name a folder that does not exist yet, or remove this one.")
    check_folder(out, "the folder")
    source = open_source(model) if dim is None else open_source(model).crop(dim)
    if rounding is not None:
        source = replace(source, rounding=rounding)
    with atomic_folder(out, ranks) as folder:
        for names, number in (("entities", "num_entities"), ("relations", "num_relations")):
            _copy_names(source.folder / f"{names}.tsv", folder, int(source.config[number]))
        for labels in ("entity_labels.tsv", "relation_labels.tsv"):
            if (source.folder / labels).is_file():
                shutil.copyfile(source.folder / labels, folder / labels)
        changes = FORMATS[format_](source, folder)
        widened = [] if format_ == "packed" else changes.pop("widened", source.widened("entity", "relation"))
        changes |= {"widened": widened} if widened else {}
        files = [file for of_table in changes["files"].values() for file in of_table]
        config = source.plain_config | changes | {"sha256": {file: sha256_of(folder / file) for file in files}}
        write_card(source, folder, config, sys.modules[FORMATS[format_].__module__].__doc__ or "")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sorted(path for path in out.rglob("*") if path.is_file())


def _copy_names(path: Path, folder: Path, number: int) -> None:
    """Copy `id<TAB>name` lines, which must have the ids 0 … number - 1 in order."""
    num_lines = 0
    with path.open("rb") as file, (folder / path.name).open("xb") as out:
        for line in file:
            start = b"%d\t" % num_lines
            whole = line.startswith(start) and len(line) > len(start) + 1 and line.endswith(b"\n")
            try:
                line.decode()
            except UnicodeDecodeError:
                whole = False
            if not whole:
                raise ModelError(f"{path}, line {num_lines + 1}: not {num_lines} and a name; write the model again.")
            out.write(line)
            num_lines += 1
    if num_lines != number:
        raise ModelError(f"{path} has {num_lines} rows; config.json says {number}. Write the model again.")
