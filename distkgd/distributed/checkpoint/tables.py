"""Tables in safetensors files: every rank writes its own rows, any rank reads any row range.

A folder that a reader may see is always whole: filled under a temporary name, made durable, then renamed.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.common.files import abandon, begin, publish, sync, temporary_of
from distkgd.distributed.ranks import Ranks
from distkgd.errors import DistkgdError, ModelError

T = TypeVar("T")

TAGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TAGS}
PIECE_BYTES = 1 << 24  # the largest host copy made of a table on its way to or from a file


@dataclass(frozen=True)
class Rows:
    """One rank's contiguous slice of a global row table.

    tensor: [hi - lo, ...] the rows themselves
    lo: first global row
    total: number of rows of the whole table
    """

    tensor: Tensor
    lo: int
    total: int


class Span(NamedTuple):
    """A `Rows` without its data: what the other ranks need to know of it."""

    lo: int
    hi: int
    total: int
    row_shape: tuple[int, ...]
    dtype: str


def span_of(name: str, rows: Rows) -> Span:
    """Describe `rows`; ValueError when they do not fit in their table."""
    if rows.tensor.ndim == 0:
        raise ValueError(f"table {name!r}: a row table needs at least one dimension, got a scalar")
    hi = rows.lo + rows.tensor.shape[0]
    if not 0 <= rows.lo <= hi <= rows.total:
        raise ValueError(f"table {name!r}: rows [{rows.lo}, {hi}) lie outside [0, {rows.total})")
    if rows.tensor.dtype not in TAGS:
        raise ValueError(f"table {name!r}: dtype {rows.tensor.dtype} cannot be stored; use one of {[*DTYPES]}")
    dtype = str(rows.tensor.dtype).removeprefix("torch.")
    return Span(rows.lo, hi, rows.total, tuple(rows.tensor.shape[1:]), dtype)


def check_cover(name: str, ranges: Sequence[tuple[int, int]], total: int) -> None:
    """ValueError unless the ranges, in any order, hold every row of [0, total) exactly once."""
    at = 0
    for lo, hi in [*sorted(r for r in ranges if r[0] != r[1]), (total, total)]:
        if lo != at or hi < lo:
            what = f"rows [{at}, {lo}) are nowhere" if lo > at else f"rows [{lo}, {at}) appear twice"
            raise ValueError(f"table {name!r}: {what}; [0, {total}) must be covered exactly once")
        at = hi


def check_spans(name: str, spans: Sequence[Span]) -> None:
    """ValueError unless the ranks' slices make one table."""
    if len({span[2:] for span in spans}) != 1:
        listed = ", ".join(f"{s.total} rows of {list(s.row_shape)} {s.dtype}" for s in dict.fromkeys(spans))
        raise ValueError(f"table {name!r}: the ranks disagree about its total, row shape or dtype: {listed}")
    check_cover(name, [span[:2] for span in spans], spans[0].total)


def on_every_rank(peers: Ranks, action: Callable[[], T], error: type[DistkgdError]) -> list[T]:
    """Run `action` on every rank; all ranks get all results, or all ranks get the same `error`."""
    cause: Exception | None = None
    problem, result = None, None
    try:
        result = action()
    except Exception as e:  # whatever it is, the others must hear of it instead of waiting
        cause, problem = e, str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
    answers = peers.gather_objects((problem, result))
    problems = [f"rank {rank}: {p}" for rank, (p, _) in enumerate(answers) if p is not None]
    if problems:
        same = len({p for p, _ in answers}) == 1
        raise error(str(answers[0][0]) if same else "; ".join(problems)) from cause
    return [result for _, result in answers]


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The raw bytes of `tensor`, a few megabytes at a time, from any device and any strides."""
    tensor = tensor.detach()
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if tensor.numel() == 0:
        return
    row_bytes = tensor[0].numel() * tensor.element_size()
    for piece in torch.split(tensor, max(1, PIECE_BYTES // row_bytes)):
        yield piece.contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write a new file, not yet durable (see `sync` and `seal`); returns its size."""
    with open(path, "xb") as f:  # x: two writers of one file is a mistake worth hearing of
        return sum(f.write(piece) for piece in pieces)


def seal(path: Path, size: int) -> dict[str, Any]:
    """Make a written file durable and return its "size" and "sha256"; OSError unless it has `size` bytes.

    Both calls release the interpreter lock, so training can go on beside them.
    """
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        actual = os.fstat(f.fileno()).st_size
        if actual != size:
            raise OSError(f"{path}: {size} bytes were written, {actual} are there")
        return {"size": size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def safetensors_header(layout: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """What comes before the tensors' bytes: header length (8 bytes, little-endian) and a JSON header.

    layout: by name, in the order of the bytes: dtype tag, shape and number of bytes
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (tag, shape, size) in layout.items():
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file, streaming, and return its size: no second copy of a table is made in memory.

    The library's own writer wants tensors contiguous, unshared and on the host.
    """
    # widest element first keeps every tensor aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout = {}
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in TAGS:
            raise ValueError(f"tensor {name!r}: {tensor.dtype} cannot be stored; use one of {[*DTYPES]}")
        layout[name] = (TAGS[tensor.dtype], tensor.shape, tensor.numel() * tensor.element_size())
    content = (piece for name in names for piece in _pieces(tensors[name]))
    return write_bytes(path, itertools.chain([safetensors_header(layout)], content))


@contextmanager
def stored_tensor(path: Path, name: str, error: type[DistkgdError]) -> Iterator[Any]:
    """A lazy slice of tensor `name` in a safetensors file; whatever goes wrong names the file."""
    try:
        with safe_open(path, "pt") as f:
            yield f.get_slice(name)
    except (OSError, SafetensorError) as e:
        raise error(f"{path}: missing, truncated, or without tensor {name!r}: {e}") from e


def rows_in(path: Path) -> int:
    """Rows of the longest tensor in a safetensors file; ModelError names a bad file."""
    try:
        with safe_open(path, "pt") as f:
            shapes = [f.get_slice(name).get_shape() for name in f.keys()]  # noqa: SIM118 - not a dict
            return max(int(shape[0]) if shape else 1 for shape in shapes)
    except (OSError, SafetensorError, ValueError) as e:
        raise ModelError(f"{path}: missing, truncated, or without a tensor: {e}") from e


def copy_rows(path: Path, name: str, lo: int, out: Tensor, error: type[DistkgdError]) -> None:
    """Fill `out` with the rows [lo, lo + len(out)) of tensor `name` in `path`, reading only those."""
    with stored_tensor(path, name, error) as stored:
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if shape[1:] != out.shape[1:] or shape[0] < lo + len(out) or dtype != TAGS[out.dtype]:
            want = f"{TAGS[out.dtype]} {[lo + len(out), *out.shape[1:]]} or longer"
            raise error(f"{path}: tensor {name!r} is {dtype} {list(shape)}, expected {want}")
    num = max(1, PIECE_BYTES // max(1, out[:1].numel() * out.element_size()))
    for at in range(0, len(out), num):
        # The slice may be a map of the file: copying detaches us from it, closing gives back the pages that were read.
        with stored_tensor(path, name, error) as stored:
            out[at : at + num].copy_(stored[lo + at : lo + min(at + num, len(out))])


def fill_rows(
    out: Tensor, lo: int, name: str, parts: Iterable[tuple[Path, int, int]], error: type[DistkgdError]
) -> Tensor:
    """`out` with the rows [lo, lo + len(out)) of a table in it. parts: its files, and which rows each holds."""
    for path, first, stop in parts:
        begin, end = max(lo, first), min(lo + len(out), stop)
        if begin < end:
            copy_rows(path, name, begin - first, out[begin - lo : end - lo], error)
    return out


@contextmanager
def atomic_folder(folder: Path, peers: Ranks) -> Iterator[Path]:
    """All ranks fill the folder this yields; it appears as `folder` only once all of them are done.

    An error on any rank raises ModelError on all and leaves an existing `folder` as it was.
    """

    def first_only(action: Callable[[Path], None]) -> Callable[[], None]:
        return lambda: action(folder) if peers.rank == 0 else None

    def finish(folder: Path) -> None:
        for path in temporary_of(folder).rglob("*"):
            sync(path)  # files of other writers, and sub-folders
        publish(temporary_of(folder), folder)

    on_every_rank(peers, first_only(begin), ModelError)
    failure: Exception | None = None
    try:
        yield temporary_of(folder)
    except Exception as e:
        failure = e
    except BaseException:  # Ctrl-C: the others may have gone
        if peers.rank == 0:
            abandon(folder)
        raise

    def report() -> None:
        if isinstance(failure, OSError):
            raise ModelError(f"{folder} cannot be written: {failure}") from failure
        if failure is not None:
            raise failure

    try:
        on_every_rank(peers, report, ModelError)
        on_every_rank(peers, first_only(finish), ModelError)
    except ModelError:
        if peers.rank == 0:
            abandon(folder)
        raise


# --- Model tables


def write_table(folder: Path, name: str, rows: Rows, peers: Ranks) -> list[str]:
    """Every rank writes its rows under the key `name`; returns the files, in the order of their rows."""
    spans = on_every_rank(peers, lambda: span_of(name, rows), ModelError)
    order = sorted(range(peers.world), key=lambda rank: (spans[rank].lo, spans[rank].hi))
    files = [f"{name}-{i + 1:05d}-of-{peers.world:05d}.safetensors" for i in range(peers.world)]

    def write() -> None:
        check_spans(name, spans)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / files[order.index(peers.rank)]
        write_tensors(path, {name: rows.tensor})
        sync(path)

    on_every_rank(peers, write, ModelError)
    return files


def read_table(folder: Path, files: Sequence[str], name: str, lo: int, hi: int) -> Tensor:
    """[hi - lo, ...] rows [lo, hi) of the table that `files` make in order; ModelError names a bad file."""
    shapes: list[tuple[int, ...]] = []
    tags: list[str] = []
    for file in files:
        with stored_tensor(folder / file, name, ModelError) as stored:
            shapes.append(tuple(stored.get_shape()))
            tags.append(stored.get_dtype())
        if not shapes[-1] or shapes[-1][1:] != shapes[0][1:] or tags[-1] != tags[0]:
            found = f"{tags[-1]} {list(shapes[-1])}; {files[0]} holds {tags[0]} {list(shapes[0])}"
            raise ModelError(f"{folder / file}: tensor {name!r} is no slice of the table: it is {found}")
    cuts = [0, *itertools.accumulate(shape[0] for shape in shapes)]
    dtype = next((dtype for dtype, tag in TAGS.items() if tags and tag == tags[0]), None)
    if dtype is None or not 0 <= lo <= hi <= cuts[-1]:
        what = f"{cuts[-1]} rows of {tags[0] if tags else 'nothing'} in {len(files)} files"
        raise ModelError(f"{folder}: table {name!r} has {what}; rows [{lo}, {hi}) cannot be read")
    out = torch.empty((hi - lo, *shapes[0][1:]), dtype=dtype)
    parts = [(folder / file, *cut) for file, cut in zip(files, itertools.pairwise(cuts), strict=True)]
    return fill_rows(out, lo, name, parts, ModelError)
