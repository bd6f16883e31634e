"""Numbers as text, each in the fewest digits that read back to it.

`projector`, for projector.tensorflow.org (Load: vectors, then metadata), between TABs:

    vectors.tsv, metadata.tsv                      the entities' rows, and a name (and label) for each
    relation_vectors.tsv, relation_metadata.tsv    likewise, with a column `inverse`

`word2vec`, a first line "COUNT DIM" and then a name and its numbers between blanks:

    entity.txt, relation.txt, and inverse.txt with reciprocal relations

There white space and % in a name are written as in URLs, "new york" as new%20york: urllib.parse.unquote reads that.
"""

import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice, repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl
import torch
from torch import Tensor

from distkgd.distributed.checkpoint.tables import write_bytes
from distkgd.models.export.source import Source, Table, words_in

NO_FIELD = re.compile(r"[\t\r\n]")  # a label may hold them
ROWS_AT_ONCE = 1 << 10
ESCAPED = re.compile(r"[\s%]")


def write_projector(source: Source, folder: Path) -> dict[str, Any]:
    """Write vectors.tsv, metadata.tsv, and both of the relations."""
    files = {}
    for table, names, prefix in zip(source.tables, ("entities", "relations"), ("", "relation_"), strict=True):
        vectors, metadata = f"{prefix}vectors.tsv", f"{prefix}metadata.tsv"
        write_bytes(folder / vectors, (_lines(rows, "\t") for rows in _pieces(table.blocks())))
        directions = table.shape[0] // int(source.config[f"num_{names}"])
        write_bytes(folder / metadata, _metadata(source.folder / f"{names}.tsv", table, directions))
        files[table.name] = [vectors, metadata]
    return {"format": "distkgd-projector/1", "files": files}


def write_word2vec(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.txt and relation.txt, and inverse.txt with reciprocal relations."""
    entity, relation = source.tables
    write_bytes(folder / "entity.txt", _words(source.folder / "entities.tsv", entity.blocks(), entity.shape))
    files, number = ["relation.txt", "inverse.txt"], int(source.config["num_relations"])
    parts = torch.cat([*relation.blocks()]).split(number)
    for file, rows in zip(files, parts, strict=False):
        write_bytes(folder / file, _words(source.folder / "relations.tsv", [rows], (number, relation.shape[1])))
    return {"format": "distkgd-word2vec/1", "files": {"entity": ["entity.txt"], "relation": files[: len(parts)]}}


def _pieces(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    # The same rows, a few at a time: as text they need three times the memory and more.
    for rows in blocks:
        yield from rows.split(ROWS_AT_ONCE)


def _lines(rows: Tensor, separator: str, words: list[str] | None = None) -> bytes:
    # Of rows [n, columns], behind a word each where there are any.
    frame = pl.from_numpy((rows if rows.dtype == torch.float64 else rows.float()).numpy(), orient="row")
    if words is not None:
        frame.insert_column(0, pl.Series("word", words, dtype=pl.String))
    text = BytesIO()
    frame.write_csv(text, include_header=False, separator=separator, quote_style="never")
    return text.getvalue()


def _words(names: Path, blocks: Iterable[Tensor], shape: tuple[int, int]) -> Iterator[bytes]:
    yield b"%d %d\n" % shape
    words = (ESCAPED.sub(lambda sign: quote(sign[0], safe=""), name) for name in words_in(names))
    for rows in _pieces(blocks):
        yield _lines(rows, " ", [*islice(words, len(rows))])


def _metadata(names: Path, table: Table, directions: int) -> Iterator[bytes]:
    # A column by itself has no title: the projector takes a first line for titles where there are several.
    labels = names.with_name(f"{table.name}_labels.tsv")
    titles = ["name", *(["label"] if labels.is_file() else []), *(["inverse"] if table.name == "relation" else [])]
    if len(titles) > 1:
        yield "\t".join(titles).encode() + b"\n"
    for inverse in ("no", "yes")[:directions]:
        beside = words_in(labels) if labels.is_file() else repeat(None)
        for name, label in zip(words_in(names), beside, strict=False):
            cells = {"name": name, "label": label or name, "inverse": inverse}
            yield "\t".join(NO_FIELD.sub(" ", cells[title]) for title in titles).encode() + b"\n"
