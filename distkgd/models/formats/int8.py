"""Tables of rows in 8 bits each number: a row is its scale times whole numbers of -127 … 127.

scale [rows] float32    the largest magnitude of a row's coordinates / 127
bias [rows, biases]     what stands before the coordinates, as it was; only where the scorer has biases
rows [rows, dim] int8   coordinate / scale, rounded to the nearest
"""

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.distributed.checkpoint.tables import safetensors_header, write_bytes
from distkgd.errors import ModelError

Blocks = Callable[[], Iterable[Tensor]]
LARGEST = 127


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """([n] float32 scales, [n, dim] int8) of coordinates [n, dim]; a row of zeros has scale 0."""
    rows = rows.float()
    scale = torch.linalg.vector_norm(rows, torch.inf, 1) / LARGEST
    whole = rows / torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    return scale, whole.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def write_int8(path: Path, blocks: Blocks, num: int, biases: int, dim: int) -> int:
    """Write a table given as blocks of rows [k, biases + dim]; returns the file's size.

    Every tensor is made in a pass of its own over `blocks()`, so that none is ever in memory.
    """
    layout = {"scale": ("F32", [num], 4 * num)}
    if biases:
        layout["bias"] = ("F32", [num, biases], 4 * num * biases)
    layout["rows"] = ("I8", [num, dim], num * dim)
    parts = {
        "scale": (quantised(rows[:, biases:])[0] for rows in blocks()),
        "bias": (rows[:, :biases].float().contiguous() for rows in blocks()),
        "rows": (quantised(rows[:, biases:])[1] for rows in blocks()),
    }
    content = (part.view(torch.uint8).numpy().tobytes() for name in layout for part in parts[name])
    return write_bytes(path, chain([safetensors_header(layout)], content))


def read_int8(path: Path, num: int, biases: int, dim: int, lo: int, hi: int) -> Tensor:
    """[hi - lo, biases + dim] float32: rows lo … hi - 1 of a table that `write_int8` wrote.

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
