"""Tables of few bits in safetensors files: of table NAME the tables NAME.codes, NAME.step, NAME.bias and NAME.coarser.

The last is there where widths are nested. Their rows are those of `distkgd.kernels.quantiser.Packed`; each is written
by ranks and read by row ranges like any other. 16 bits need none of it: the table NAME itself is in bfloat16. What is
pruned has files of its own (`formats.zeros`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from distkgd.distributed.checkpoint.tables import (
    TAGS,
    Rows,
    safetensors_header,
    write_table,
)
from distkgd.distributed.ranks import Ranks
from distkgd.kernels.quantiser import PARTS, Packed, Quantiser
from distkgd.models.formats.parts import read_part
from distkgd.models.formats.zeros import write_zeros


def write_packed(folder: Path, name: str, rows: Rows, quantiser: Quantiser, peers: Ranks) -> dict[str, list[str]]:
    """Every rank writes its rows; {table: its files}, in the order of their rows."""
    if quantiser.zeros:
        return write_zeros(folder, name, rows, quantiser, peers)
    if quantiser.bits == 16:
        return {name: write_table(folder, name, Rows(rows.tensor.bfloat16(), rows.lo, rows.total), peers)}
    parts = tables_of(name, quantiser.pack(rows.tensor))
    return {key: write_table(folder, key, Rows(part, rows.lo, rows.total), peers) for key, part in parts.items()}


def tables_of(name: str, packed: Packed) -> dict[str, Tensor]:
    """{table: its rows}, of the tables that packed rows of table `name` are written as."""
    return {f"{name}.{part}": getattr(packed, part) for part in PARTS if getattr(packed, part).shape[1]}


def stream_packed(
    folder: Path, name: str, blocks: Callable[[], Iterable[Tensor]], shape: tuple[int, int], quantiser: Quantiser
) -> dict[str, list[str]]:
    """`write_packed` of a table of `shape` given as blocks of rows, none of which stays in memory, in one pass."""

    def parts_of(rows: Tensor) -> dict[str, Tensor]:
        if quantiser.bits == 16:
            return {name: rows.bfloat16()}
        return tables_of(name, quantiser.pack(rows.float()))

    rows = parts_of(torch.zeros(1, shape[1]))
    files = {key: [f"{key}.safetensors"] for key in rows}
    with ExitStack() as stack:
        writers = {key: stack.enter_context(open(folder / file, "xb")) for key, (file,) in files.items()}
        for key, row in rows.items():
            layout = {key: (TAGS[row.dtype], [shape[0], row.shape[1]], shape[0] * row.nbytes)}
            writers[key].write(safetensors_header(layout))
        for block in blocks():
            for key, part in parts_of(block).items():
                writers[key].write(part.contiguous().view(torch.uint8).numpy().data)
    return files


def read_packed(
    folder: Path, files: Mapping[str, Sequence[str]], name: str, quantiser: Quantiser, width: int, lo: int, hi: int
) -> Packed:
    """Rows lo … hi - 1 of a table of `width` numbers, biases among them; ModelError names a bad file."""
    groups = quantiser.groups(width)
    sizes = {"codes": quantiser.code_bytes(width), "step": groups, "bias": quantiser.biases}
    sizes |= {"coarser": groups * len(quantiser.coarser)}
    parts = {}
    for part in PARTS:
        key = f"{name}.{part}"
        if not sizes[part]:
            parts[part] = torch.empty(hi - lo, 0, dtype=torch.bfloat16)
            continue
        parts[part] = read_part(folder, files, key, lo, hi, sizes[part])
    return Packed(**parts, columns=width - quantiser.biases)
