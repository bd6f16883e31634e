"""One part of a table of few bits, from its safetensors files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distkgd.distributed.checkpoint.tables import read_table
from distkgd.errors import ModelError


def read_part(folder: Path, files: Mapping[str, Sequence[str]], key: str, lo: int, hi: int, size: int) -> Tensor:
    """[hi - lo, size] rows lo … hi - 1 of the part `key`, TABLE.PART: codes and bitmaps in bytes, all else bfloat16.

    ModelError names a file whose rows are others.
    """
    found = read_table(folder, files[key], key, lo, hi)
    wanted = torch.uint8 if key.endswith((".codes", ".bitmap")) else torch.bfloat16
    if found.dtype != wanted or list(found.shape[1:]) != [size]:
        raise ModelError(
            f"{folder / files[key][0]}: {key!r} has rows of {list(found.shape[1:])} {found.dtype}; "
            f"config.json says {[size]} {wanted}. Write the model again."
        )
    return found
