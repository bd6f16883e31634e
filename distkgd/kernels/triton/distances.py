"""Σ_k φ(q_k, c_k) of all pairs of a group on a GPU, forward and backward, with candidates read through an index.

`forward` and `backward` are those of `pairs` on other devices.

Neither the [G, Q, N, k] differences nor a [G, N, d] copy of the candidates exists, with one exception: where an
index meets many queries per group, the gradients of candidates are laid out as [G, N, d] before they are added up
by row.

Every sum has a fixed order: a program owns what it writes and visits its blocks in order, block sizes depend on
shapes only, and nothing is added through atomics. Rows that an index repeats are summed in the order of their
places (a stable sort, then one program per table row). Shapes never depend on data, so nothing here makes the host
wait.

Numbers may be bfloat16, float16, float32 or float64, queries and table independently; sums are float32, or float64
when any input is. φ = 0 has gradient 0; with scaled_manhattan on a GPU, a − b·c is computed with one rounding, so a
= b·c must hold exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distkgd.kernels.pairs import Kind
from distkgd.kernels.triton.distance_code import candidates_code, forward_code, gather_code, queries_code, rows_code
from distkgd.kernels.triton.runtime import OPTIONS, in_triton, pieces, power_of_two, sum_dtype

# From this many queries per group on, the gradients of indexed candidates are laid out first: a candidate's row is then
# read once for a block of queries, and not each query's row once for every candidate.
_LAID_OUT = 8
# Programs that keep a large GPU busy; below, long sums over candidates are cut so that there are as many.
PROGRAMS = 512


# Places of an index by table row, equal rows in order, among smaller numbers; [rows + 1] where those of each row begin;
# what its places begin with.
Sorted = tuple[Tensor, Tensor, int]


@dataclass(frozen=True)
class Blocks:
    """What one program holds: queries × candidates × coordinates, and the warps it works with."""

    queries: int
    candidates: int
    coordinates: int
    warps: int = 4


def block_sizes(kind: Kind, queries: int, candidates: int, width: int, *, gradient: bool = False) -> Blocks:
    """Register blocks for groups of this shape; compiled for capability 8.0 and 9.0, none spills more than 8 bytes."""
    block_q = min(16, power_of_two(queries))
    # One query per group is bound by memory: long rows, read by neighbouring threads.
    coordinates = max(32, 128 // block_q)
    if kind == "modulus":
        coordinates = min(64, coordinates)
    # Gradients in two parts need twice the accumulators.
    narrow = gradient and kind in ("scaled_manhattan", "modulus") and block_q > 1
    return Blocks(block_q, min(8 if narrow else 16, power_of_two(candidates)), min(coordinates, power_of_two(width)))


def forward(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, candidates: int) -> Tensor:
    """[G, Q, N] sums, in the dtype they are summed in.

    q: [G, Q, a]; a = 2d with scaled_manhattan (a, b side by side), else d.
    table: [M, d]; complex numbers interleaved with modulus.
    index: [G, N] int64 rows of the table, or None: the candidates of group g are rows g·N … g·N + N - 1.
    candidates: N.
    """
    groups, queries, width = _sizes(kind, q, table, index, candidates)
    wide = sum_dtype(q, table)
    out = q.new_empty(groups, queries, candidates, dtype=wide)
    if out.numel() == 0:
        return out
    size = block_sizes(kind, queries, candidates, width)
    grid = (groups * pieces(queries, size.queries) * pieces(candidates, size.candidates),)
    forward_code[grid](
        q.contiguous(), table.contiguous(), _pointer(index, table), out, queries, candidates, width,
        ACC=in_triton(wide), KIND=kind, INDEXED=index is not None, **_named(size), **OPTIONS,
    )  # fmt: skip
    return out


def backward(
    kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, grad: Tensor, sorted_: Sorted | None = None
) -> tuple[Tensor, Tensor]:
    """([G, Q, a], [M, d]) gradients of q and of the table, for the gradient [G, Q, N] of what `forward` gives.

    sorted_: of the index, if that is known.
    """
    q, table, grad = q.contiguous(), table.contiguous(), grad.contiguous()
    return query_gradient(kind, q, table, index, grad), table_gradient(kind, q, table, index, grad, sorted_)


def query_gradient(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, grad: Tensor) -> Tensor:
    """[G, Q, a], see `backward`; all tensors contiguous."""
    candidates = grad.shape[2]
    groups, queries, width = _sizes(kind, q, table, index, candidates)
    if grad.numel() == 0:
        return torch.zeros_like(q)
    wide = sum_dtype(q, table)
    size = block_sizes(kind, queries, candidates, width, gradient=True)
    across = groups * pieces(queries, size.queries)
    down = pieces(width, size.coordinates)
    steps = pieces(candidates, size.candidates)
    per_split = size.candidates * pieces(steps, min(steps, pieces(PROGRAMS, across * down)))
    splits = pieces(candidates, per_split)
    out = q.new_empty(splits, *q.shape, dtype=wide if splits > 1 else q.dtype)
    queries_code[(across * splits, down)](
        q, table, _pointer(index, table), grad, out, groups, queries, candidates, per_split, width,
        ACC=in_triton(wide), KIND=kind, INDEXED=index is not None, **_named(size), **OPTIONS,
    )  # fmt: skip
    return out.sum(0).to(q.dtype) if splits > 1 else out[0]


def table_gradient(
    kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, grad: Tensor, sorted_: Sorted | None = None
) -> Tensor:
    """[M, d], see `backward`; all tensors contiguous."""
    candidates = grad.shape[2]
    groups, queries, width = _sizes(kind, q, table, index, candidates)
    if grad.numel() == 0:
        return torch.zeros_like(table)
    wide = sum_dtype(q, table)
    out = torch.empty_like(table)
    if index is not None and queries < _LAID_OUT:
        order, offsets, before = sorted_ or _by_row(index, len(table))
        size = _row_blocks(width)
        rows_code[(len(table), pieces(width, size.coordinates))](
            q, table, grad, order, offsets, out, before, queries, candidates, width,
            ACC=in_triton(wide), KIND=kind, BE=size.candidates, BK=size.coordinates, num_warps=size.warps, **OPTIONS,
        )  # fmt: skip
        return out
    size = block_sizes(kind, queries, candidates, width, gradient=True)
    each = out if index is None else out.new_empty(groups * candidates, table.shape[1], dtype=wide)
    candidates_code[(groups * pieces(candidates, size.candidates), pieces(width, size.coordinates))](
        q, table, _pointer(index, table), grad, each, queries, candidates, width,
        ACC=in_triton(wide), KIND=kind, INDEXED=index is not None, **_named(size), **OPTIONS,
    )  # fmt: skip
    return out if index is None else row_sums(each, sorted_ or _by_row(index, len(table)), out)


def row_sums(parts: Tensor, sorted_: Sorted, out: Tensor) -> Tensor:
    """out [M, d]: sums of the rows of parts [n, d], contiguous, that belong to each row of a table, in order."""
    (order, offsets, before), width = sorted_, out.shape[1]
    size, wide = _row_blocks(width), in_triton(sum_dtype(parts, out))
    if out.numel():
        gather_code[(len(out), pieces(width, size.coordinates))](
            parts, order, offsets, out, before, width,
            ACC=wide, BE=size.candidates, BK=size.coordinates, num_warps=size.warps, **OPTIONS,
        )  # fmt: skip
    return out


def _sizes(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None, candidates: int) -> tuple[int, int, int]:
    """Groups, queries, width."""
    groups, queries, asked = q.shape
    assert asked == table.shape[1] * (2 if kind == "scaled_manhattan" else 1), "queries and rows do not belong together"
    if index is None:
        assert len(table) == groups * candidates or groups == 0
    else:
        assert index.shape == (groups, candidates) and index.is_contiguous() and index.dtype == torch.int64
    return groups, queries, table.shape[1] // 2 if kind == "modulus" else table.shape[1]


def _pointer(index: Tensor | None, table: Tensor) -> Tensor:
    return table if index is None else index  # a kernel without an index never reads what stands in its place


def _named(size: Blocks) -> dict[str, int]:
    return {"BQ": size.queries, "BN": size.candidates, "BK": size.coordinates, "num_warps": size.warps}


def _row_blocks(width: int) -> Blocks:
    return Blocks(1, 4, min(256, power_of_two(width)))


def _by_row(index: Tensor, rows: int) -> Sorted:
    found, order = torch.sort(index.reshape(-1), stable=True)
    return order, torch.searchsorted(found, torch.arange(rows + 1, device=index.device)), 0
