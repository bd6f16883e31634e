"""Rows of few bits as candidates: scored where they lie, on a CPU by packed.cpp.

DISTKGD_PACKED forces one of its ways: `portable` unpacks blocks of rows and multiplies these by the queries, `avx2` and
`avx512` multiply the codes. Without it few queries meet the codes by the widest instructions that the processor has,
and many queries meet unpacked blocks. Scores are the same to rounding.

Queries may be rounded to 8 bits: whole numbers of -127 to 127, times the largest magnitude of the query / 127. Then the
kernels multiply a third as often, and all ways give the scores of the rounded queries.
"""

import ctypes
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distkgd.errors import ConfigError
from distkgd.kernels.build import address, library
from distkgd.kernels.quantiser import Packed, Quantiser, pack_codes, unpack_codes

WAYS = ("portable", "avx2", "avx512")
_FEW_QUERIES = 16
_NUMBERS_AT_ONCE = 1 << 17  # unpacked, for a matrix product: half a second-level cache
_LANE_BITS = 32  # of codes that the kernels sum in one number: a group of columns fills whole ones, or is a whole row


@dataclass(frozen=True)
class PackedRows:
    """Candidates [N, entity_size] of few bits, on a CPU, that are seen in precision `dtype`.

    query_bits: 8 where inner products are those of rounded queries, else 32.
    """

    packed: Packed
    quantiser: Quantiser
    dtype: torch.dtype = torch.float32
    query_bits: int = 32

    @property
    def shape(self) -> torch.Size:
        """Of the rows that these are unpacked to."""
        return torch.Size([len(self), self.quantiser.biases + self.packed.columns])

    def __len__(self) -> int:
        return len(self.packed.codes)

    def __getitem__(self, rows: slice) -> "PackedRows":
        return replace(self, packed=self.packed.select(rows))

    def to(self, dtype: torch.dtype) -> "PackedRows":
        """The same rows, seen in another precision."""
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def take(self, rows: Tensor | slice) -> Tensor:
        """[n, entity_size]: these rows, unpacked."""
        return unpack(self.packed.select(rows), self.quantiser).to(self.dtype)

    def crop(self, bits: int, columns: Tensor) -> "PackedRows":
        """Some of the numbers beside the biases ([k] int64), as the top `bits` of their codes, with steps as they are.

        ConfigError for other bits than the rows are nested in, and where columns that share a step are torn apart.
        """
        packed, whole = self.packed, self.quantiser
        if whole.group is not None and len(columns) % whole.group:
            raise ConfigError(
                f"group: {whole.group} columns that share a step do not divide {len(columns)}; take a multiple."
            )
        narrow = replace(whole.narrowed(bits), of=None)
        groups, at = packed.step.shape[1], whole.widths.index(bits) * packed.step.shape[1]
        step = packed.step if bits == whole.bits else packed.coarser[:, at : at + groups]
        codes = [
            pack_codes(unpack_codes(piece, whole.bits, packed.columns)[:, columns] >> (whole.bits - bits), bits)
            for piece in packed.codes.split(max(1, _NUMBERS_AT_ONCE // packed.columns))
        ]
        kept = step[:, : narrow.groups(narrow.biases + len(columns))].contiguous()
        rows = Packed(torch.cat(codes), kept, packed.bias, packed.coarser[:, :0], len(columns))
        return replace(self, packed=rows, quantiser=narrow)

    def products(self, queries: Tensor) -> Tensor:
        """[Q, N] inner products of queries [Q, dim] and rows that have no biases."""
        if self.query_bits == 8:
            whole, unit = whole_queries(queries)
            return self._products(whole, whole_bytes=True).mul_(unit)
        return self._products(queries)

    def _products(self, queries: Tensor, whole_bytes: bool = False) -> Tensor:
        # whole_bytes: queries are whole numbers of -127 to 127.
        way, few = chosen(), len(queries) <= _FEW_QUERIES or "DISTKGD_PACKED" in os.environ
        if way != "portable" and few and queries.dtype == self.dtype == torch.float32:
            found = _products(way, self.packed, self.quantiser.bits, queries.contiguous(), whole_bytes)
            if found is not None:
                return found
        out = queries.new_empty(len(queries), len(self))
        step = max(1, _NUMBERS_AT_ONCE // self.packed.columns)
        buffer = torch.empty(min(step, len(self)), self.packed.columns)
        for at in range(0, len(self), step):
            packed = self.packed.select(slice(at, at + step))
            rows = unpack(packed, self.quantiser, buffer[: len(packed.codes)])
            out[:, at : at + step] = queries @ rows.to(queries.dtype).T  # quicker than a product into such a part
        return out


def chosen() -> str:
    """The way of WAYS that DISTKGD_PACKED names, or the best one here; ConfigError for one that is not to be had."""
    lib = library("packed")
    able = WAYS[: 1 if lib is None else lib.packed_level() + 1]
    way = os.environ.get("DISTKGD_PACKED", able[-1])
    if way not in able:
        why = "this processor or DISTKGD_KERNELS does without it" if way in WAYS else "there is no such way"
        raise ConfigError(f"DISTKGD_PACKED={way}: {why}; allowed here: {', '.join(able)}.")
    return way


def whole_queries(queries: Tensor) -> tuple[Tensor, Tensor]:
    """([Q, dim] whole numbers of -127 to 127, [Q, 1] unit): what queries are rounded to in 8 bits is their product."""
    unit = queries.abs().amax(1, keepdim=True) / 127
    return torch.where(unit == 0, 0.0, queries / unit).round_(), unit


def unpack(packed: Packed, quantiser: Quantiser, out: Tensor | None = None) -> Tensor:
    """[n, biases + columns] float32, number by number those of `Quantiser.unpack`; in `out` if that is given."""
    lib = library("packed")
    if lib is None or packed.codes.device.type != "cpu":
        rows = quantiser.unpack(packed)
        return rows if out is None else out.copy_(rows)
    n, biases, columns = len(packed.codes), quantiser.biases, packed.columns
    out = torch.empty(n, biases + columns) if out is None else out
    parts = [address(part) for part in (packed.codes, packed.step, packed.bias)]
    sizes = [ctypes.c_int64(size) for size in (n, columns, packed.step.shape[1], biases)]
    lib.packed_unpack(*parts, quantiser.bits, *sizes, address(out))
    return out


def _products(way: str, packed: Packed, bits: int, queries: Tensor, whole_bytes: bool) -> Tensor | None:
    # None where the kernels do not know how.
    groups = packed.step.shape[1]
    if groups > 1 and packed.columns // groups * bits % _LANE_BITS:
        return None
    out = queries.new_empty(len(queries), len(packed.codes))
    n, columns, num = (ctypes.c_int64(size) for size in (len(packed.codes), packed.columns, len(queries)))
    parts = address(packed.codes), address(packed.step), bits, n, columns, ctypes.c_int64(groups)
    lib = library("packed")
    assert lib is not None
    known = lib.packed_products(WAYS.index(way), *parts, address(queries), num, int(whole_bytes), address(out))
    return out if known else None
