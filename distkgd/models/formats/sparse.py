"""Tables with many zeros in safetensors files, laid out in whichever way takes the fewest bytes.

dense    values [rows, columns]
bitmap   values [nonzeros], bitmap [rows * columns / 8, rounded up]: bit i of it, lowest first, is number i's
csr      values [nonzeros], columns [nonzeros], starts [rows + 1]: those of row r are starts[r] … starts[r + 1] - 1
coo      values [nonzeros], columns [nonzeros], rows [nonzeros]

Indices are unsigned and as narrow as they can be. Minus zero counts as zero; NaN does not.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.distributed.checkpoint.tables import safetensors_header, write_bytes
from distkgd.errors import ModelError

Layout = Literal["dense", "bitmap", "csr", "coo"]
Pieces = Callable[[], Iterable[bytes]]
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_UNSIGNED = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}


def index_bytes(largest: int) -> int:
    """Bytes of an unsigned number that can be as large as `largest`."""
    return next(width for width in _UNSIGNED if largest < 1 << 8 * width)


def tensors_of(
    layout: Layout, tag: str, shape: tuple[int, int], nonzeros: int
) -> dict[str, tuple[str, list[int], int]]:
    """Of each tensor of a layout its dtype tag, shape and bytes, widest numbers first."""
    rows, columns = shape
    values = tag, [nonzeros], nonzeros * ITEM_BYTES[tag]
    if layout == "dense":
        return {"values": (tag, [rows, columns], rows * columns * ITEM_BYTES[tag])}
    if layout == "bitmap":
        num = -(-rows * columns // 8)
        return {"values": values, "bitmap": ("U8", [num], num)}

    def indices(num: int, largest: int) -> tuple[str, list[int], int]:
        width = index_bytes(largest)
        return _UNSIGNED[width], [num], num * width

    found = {"values": values, "columns": indices(nonzeros, columns - 1)}
    found |= {"starts": indices(rows + 1, nonzeros)} if layout == "csr" else {"rows": indices(nonzeros, rows - 1)}
    return dict(sorted(found.items(), key=lambda item: -item[1][2] // max(1, item[1][1][0])))


def smallest(tag: str, shape: tuple[int, int], nonzeros: int) -> tuple[Layout, int]:
    """The layout that makes the smallest file, and the bytes of that file."""
    layouts: tuple[Layout, ...] = ("dense", "bitmap", "csr", "coo")
    sizes: dict[Layout, int] = {}
    for layout in layouts:
        tensors = tensors_of(layout, tag, shape, nonzeros)
        sizes[layout] = len(safetensors_header(tensors)) + sum(size for _, _, size in tensors.values())
    best = min(layouts, key=lambda layout: sizes[layout])
    return best, sizes[best]


def write_sparse(path: Path, pieces: Pieces, tag: str, shape: tuple[int, int]) -> int:
    """Write a table, given as its bytes a few megabytes at a time, in the smallest layout; returns the file's size.

    Every tensor is made in a pass of its own over `pieces()`, so that none is ever in memory.
    """
    nonzeros = sum(len(at) for at, _, _ in _scan(pieces, tag))
    layout, _ = smallest(tag, shape, nonzeros)
    tensors = tensors_of(layout, tag, shape, nonzeros)
    content: list[Iterable[bytes]] = [[safetensors_header(tensors)]]
    for name, (kind, _, _) in tensors.items():
        if layout == "dense":
            content.append(pieces())
        elif name == "bitmap":
            content.append(_bitmap(_scan(pieces, tag)))
        else:
            content.append(_numbers(name, kind, _scan(pieces, tag), shape[1]))
    return write_bytes(path, chain.from_iterable(content))


def read_sparse(path: Path, shape: tuple[int, int], lo: int, hi: int) -> Tensor:
    """[hi - lo, columns]: rows lo … hi - 1 of a table [rows, columns] that `write_sparse` wrote.

    Raises ModelError when the file is damaged or of another table.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return _decoded(found, shape)[lo:hi].clone()
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, IndexError) as error:
        raise ModelError(f"{path}: missing, damaged, or no table of {list(shape)}: {error!r}") from error


def _decoded(found: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    values, kinds = found["values"], found.keys() - {"values"}
    if not kinds:
        return values.reshape(shape)
    if kinds == {"bitmap"}:
        bits = np.unpackbits(found["bitmap"].numpy(), bitorder="little", count=rows * columns)
        at = torch.from_numpy(np.flatnonzero(bits))
    else:
        column = found["columns"].long()
        if kinds == {"columns", "starts"}:
            row = torch.repeat_interleave(torch.arange(rows), found["starts"].long().diff())
        else:
            row = found["rows"].long()
        if len(column) and (int(column.min()) < 0 or int(column.max()) >= columns):
            raise ValueError("a column beyond the table's")
        at = row * columns + column
    if len(at) != len(values):
        raise ValueError(f"{len(values)} values for {len(at)} places")
    return values.new_zeros(rows * columns).index_copy(0, at, values).reshape(shape)


def _scan(pieces: Pieces, tag: str) -> Iterator[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.bool_]]]:
    # Of each piece: where in the table its nonzero numbers stand, their bits, and which numbers of the piece they are.
    width, start = ITEM_BYTES[tag], 0
    kind = np.dtype(f"<u{width}")
    for piece in pieces():
        bits = np.frombuffer(piece, kind)
        counts = (bits << kind.type(1)) != 0  # without the sign
        yield np.flatnonzero(counts) + start, bits[counts], counts
        start += len(bits)


def _bitmap(scanned: Iterator[tuple[Any, Any, NDArray[np.bool_]]]) -> Iterator[bytes]:
    left = np.zeros(0, dtype=np.bool_)
    for _, _, counts in scanned:
        joined = np.concatenate([left, counts])
        whole = len(joined) // 8 * 8
        yield np.packbits(joined[:whole], bitorder="little").tobytes()
        left = joined[whole:]
    yield np.packbits(left, bitorder="little").tobytes()


def _numbers(name: str, tag: str, scanned: Iterator[tuple[Any, Any, Any]], columns: int) -> Iterator[bytes]:
    kind = np.dtype(f"<u{int(tag[1:]) // 8}") if tag.startswith("U") else None
    before, begun = 0, 0
    if name == "starts" and kind is not None:
        yield np.zeros(1, kind).tobytes()
    for at, bits, counts in scanned:
        if kind is None:
            yield bits.tobytes()
        elif name == "columns":
            yield (at % columns).astype(kind).tobytes()
        elif name == "rows":
            yield (at // columns).astype(kind).tobytes()
        else:
            # The rows that end in this piece: how many nonzeros stand before their ends.
            ends = np.arange(begun // columns + 1, (begun + len(counts)) // columns + 1, dtype=np.int64) * columns
            yield (np.searchsorted(at, ends) + before).astype(kind).tobytes()
        before, begun = before + len(at), begun + len(counts)
