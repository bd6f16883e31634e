"""Rows that hold NaN or an infinity, found in one pass over a table, in memory or in a file, without a copy of it."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.distributed.checkpoint.tables import TAGS
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError

_ROWS_AT_ONCE = 1 << 14
_NUMBERS_AT_ONCE = 1 << 20
_FLOATS = {tag: dtype for dtype, tag in TAGS.items() if dtype.is_floating_point}


class Broken(NamedTuple):
    """The first row of a tensor with a number that is not finite, and that number."""

    tensor: str
    row: int
    value: float


def broken_row(name: str, rows: Tensor, first: int = 0) -> Broken | None:
    """The first broken row of [n, ...] rows, None where all are finite. first: the number of the first one."""
    rows = rows.detach()
    if not rows.numel() or not rows.is_floating_point():
        return None
    if bool(torch.stack(rows.aminmax()).isfinite().all()):
        return None
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[at : at + _ROWS_AT_ONCE].flatten(1) if rows.dim() > 1 else rows[at : at + _ROWS_AT_ONCE, None]
        bad = ~block.isfinite()
        if bad.any():
            row = int(bad.any(1).nonzero()[0])
            return Broken(name, first + at + row, float(block[row][bad[row]][0]))
    return None


def first_broken(mine: Broken | None, ranks: Ranks) -> Broken | None:
    """The first of all ranks' broken rows, the same on each; all ranks call it."""
    number = ranks.all_reduce(torch.tensor([float(mine is not None)], device=ranks.device))
    if not number:
        return None
    found: list[Broken] = [one for one in ranks.gather_objects(mine) if one is not None]
    return min(found, key=lambda one: (one.tensor, one.row))


def broken_in_file(path: Path) -> Broken | None:
    """The first broken row of the tensors in a safetensors file, a few megabytes in memory at a time.

    ModelError names a file that cannot be read.
    """
    try:
        with safe_open(path, "pt"):  # refuses a file that is no whole one of its kind
            pass
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
            for name, about in header.items():
                if name == "__metadata__" or not (dtype := _FLOATS.get(about["dtype"])):
                    continue
                # Read, not mapped: the pages of a map count as this process's memory.
                file.seek(8 + start + about["data_offsets"][0])
                num, *shape = about["shape"] or [1]
                width = math.prod(shape)
                rows = max(1, _NUMBERS_AT_ONCE // max(1, width))
                for at in range(0, num if width else 0, rows):
                    data = bytearray(file.read(min(rows, num - at) * width * dtype.itemsize))
                    block = torch.frombuffer(data, dtype=dtype).reshape(-1, width)
                    if (found := broken_row(name, block, at)) is not None:
                        return found
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: missing, truncated, or no safetensors file: {error}.") from error
    return None
