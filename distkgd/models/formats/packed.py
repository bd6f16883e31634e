"""Tables of few bits in safetensors files: of table NAME the tables NAME.codes, NAME.step and NAME.bias.

Their rows are those of `distkgd.kernels.quantiser.Packed`; each is written by ranks and read by row ranges like any
other. 16 bits need none of it: the table NAME itself is in bfloat16.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from distkgd.distributed.checkpoint.tables import (
    TAGS,
    Rows,
    read_table,
    safetensors_header,
    write_bytes,
    write_table,
)
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.kernels.quantiser import Packed, Quantiser

PARTS = ("codes", "step", "bias")
_NUMBERS_AT_ONCE = 1 << 18


def packed_rows(rows: Tensor, quantiser: Quantiser) -> Packed:
    """[n, columns] rows, packed a few at a time."""
    pieces = [quantiser.pack(piece) for piece in rows.split(max(1, _NUMBERS_AT_ONCE // rows.shape[1]))]
    parts = {part: torch.cat([getattr(piece, part) for piece in pieces]) for part in PARTS}
    return Packed(**parts, columns=pieces[0].columns)


def write_packed(folder: Path, name: str, rows: Rows, quantiser: Quantiser, peers: Ranks) -> dict[str, list[str]]:
    """Every rank writes its rows; {table: its files}, in the order of their rows."""
    if quantiser.bits == 16:
        return {name: write_table(folder, name, Rows(rows.tensor.bfloat16(), rows.lo, rows.total), peers)}
    packed = packed_rows(rows.tensor, quantiser)
    tables = {f"{name}.{part}": getattr(packed, part) for part in PARTS if getattr(packed, part).shape[1]}
    return {key: write_table(folder, key, Rows(part, rows.lo, rows.total), peers) for key, part in tables.items()}


def stream_packed(
    folder: Path, name: str, blocks: Callable[[], Iterable[Tensor]], shape: tuple[int, int], quantiser: Quantiser
) -> dict[str, list[str]]:
    """`write_packed` of a table of `shape` given as blocks of rows, none of which stays in memory; a pass per part."""

    def part_of(rows: Tensor, part: str) -> Tensor:
        return rows.bfloat16() if quantiser.bits == 16 else getattr(packed_rows(rows.float(), quantiser), part)

    files = {}
    for part in PARTS[: 1 if quantiser.bits == 16 else None]:
        row = part_of(torch.zeros(1, shape[1]), part)
        if not row.shape[1]:
            continue
        key = name if quantiser.bits == 16 else f"{name}.{part}"
        layout = {key: (TAGS[row.dtype], [shape[0], row.shape[1]], shape[0] * row.nbytes)}
        content = (part_of(block, part).contiguous().view(torch.uint8).numpy().tobytes() for block in blocks())
        files[key] = [f"{key}.safetensors"]
        write_bytes(folder / files[key][0], chain([safetensors_header(layout)], content))
    return files


def read_packed(
    folder: Path, files: Mapping[str, Sequence[str]], name: str, quantiser: Quantiser, width: int, lo: int, hi: int
) -> Packed:
    """Rows lo … hi - 1 of a table of `width` numbers, biases among them; ModelError names a bad file."""
    sizes = {"codes": quantiser.code_bytes(width), "step": quantiser.groups(width), "bias": quantiser.biases}
    parts = {}
    for part in PARTS:
        key = f"{name}.{part}"
        if part == "bias" and not quantiser.biases:
            parts[part] = torch.empty(hi - lo, 0, dtype=torch.bfloat16)
            continue
        parts[part] = read_table(folder, files[key], key, lo, hi)
        wanted = torch.uint8 if part == "codes" else torch.bfloat16
        if parts[part].dtype != wanted or list(parts[part].shape[1:]) != [sizes[part]]:
            raise ModelError(
                f"{folder / files[key][0]}: {key!r} has rows of {list(parts[part].shape[1:])} {parts[part].dtype}; "
                f"config.json says {[sizes[part]]} {wanted}. Write the model again."
            )
    return Packed(**parts, columns=width - quantiser.biases)


def unpacked(packed: Packed, quantiser: Quantiser) -> Iterator[Tensor]:
    """[k, biases + columns] float32 rows in order, a megabyte at a time."""
    rows = max(1, _NUMBERS_AT_ONCE // (quantiser.biases + packed.columns))
    for at in range(0, len(packed.codes), rows):
        yield quantiser.unpack(packed.select(slice(at, at + rows)))
