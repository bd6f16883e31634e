"""Tables of rows in 8 bits each number as earlier versions exported them (`distkgd-int8/1`): read, no longer written.

scale [rows] float32    the largest magnitude of a row's coordinates / 127
bias [rows, biases]     what stands before the coordinates, as it was; only where the scorer has biases
rows [rows, dim] int8   coordinate / scale, rounded to the nearest
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.errors import ModelError


def read_int8(path: Path, num: int, biases: int, dim: int, lo: int, hi: int) -> Tensor:
    """[hi - lo, biases + dim] float32: rows lo … hi - 1 of the table.

    ModelError names a bad file.
    """
    wanted = {"scale": ([num], torch.float32), "rows": ([num, dim], torch.int8)}
    if biases:
        wanted["bias"] = ([num, biases], torch.float32)
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for name, (shape, dtype) in wanted.items():
                stored = file.get_slice(name)
                found[name] = stored[lo:hi]
                if list(stored.get_shape()) != shape or found[name].dtype != dtype:
                    raise ModelError(f"{path}: {name!r} is {stored.get_shape()} of {found[name].dtype}, not {shape}.")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: missing, truncated, or no table of 8-bit rows: {error}.") from error
    rows = found["rows"].float() * found["scale"].unsqueeze(1)
    return torch.cat([found["bias"], rows], 1) if biases else rows
