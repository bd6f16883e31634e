"""Triton code of `scores`: sums over a row of scores in one visit, and their gradients in another."""

from distkgd.kernels.triton.runtime import tl, triton

# Less than every score, and far enough from -inf to be subtracted from itself.
LOWEST = tl.constexpr(-1e38) if tl.constexpr is not None else -1e38
COUNTS = tl.constexpr(-5e29) if tl.constexpr is not None else -5e29  # MASKED_SCORE / 2


@triton.jit
def softplus(z):
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def logistic(z):
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def sums_code(z_ptr, other_ptr, out_ptr, rows, num, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out [3, rows], of each row of z [rows, num]; every lane has running sums of its own, joined in the end.

    logsumexp: log Σ exp z in place 0. gap: log Σ exp of the other, the mean of other - z under its softmax, and
    log Σ exp z. softplus: Σ softplus(z), and how many count.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    mass = tl.zeros((BLOCK,), dtype=tl.float32)
    other_top = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    other_mass = tl.zeros((BLOCK,), dtype=tl.float32)
    mean = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, num, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * num + k, mask=k < num, other=LOWEST)
        if KIND == "softplus":
            mass += tl.where(k < num, softplus(z), 0.0)
            mean += tl.where(z > COUNTS, 1.0, 0.0)
        else:
            new = tl.maximum(top, z)
            mass = mass * tl.exp(top - new) + tl.exp(z - new)
            top = new
            if KIND == "gap":
                other = tl.load(other_ptr + row * num + k, mask=k < num, other=LOWEST)
                new = tl.maximum(other_top, other)
                shrink = tl.exp(other_top - new)
                weight = tl.exp(other - new)
                other_mass = other_mass * shrink + weight
                mean = mean * shrink + weight * (other - z)
                other_top = new
    if KIND == "softplus":
        tl.store(out_ptr + row, tl.sum(mass, 0))
        tl.store(out_ptr + rows + row, tl.sum(mean, 0))
    else:
        highest = tl.max(top, 0)
        lse = highest + tl.log(tl.sum(mass * tl.exp(top - highest), 0))
        if KIND == "logsumexp":
            tl.store(out_ptr + row, lse)
        else:
            highest = tl.max(other_top, 0)
            share = tl.exp(other_top - highest)
            whole = tl.sum(other_mass * share, 0)
            tl.store(out_ptr + row, highest + tl.log(whole))
            tl.store(out_ptr + rows + row, tl.sum(mean * share, 0) / whole)
            tl.store(out_ptr + 2 * rows + row, lse)


@triton.jit
def pulls_code(z_ptr, other_ptr, found_ptr, first_ptr, second_ptr, third_ptr, out_ptr, other_out_ptr, rows, num,
               KIND: tl.constexpr, LEARNS: tl.constexpr, TEACHES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients [rows, num] of z, and of the other with TEACHES, for those of what `sums_code` found, [rows] each."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < num
    at = row * num + k
    z = tl.load(z_ptr + at, mask=mask, other=LOWEST)
    first = tl.load(first_ptr + row)
    if KIND == "softplus":
        tl.store(out_ptr + at, logistic(z) * first, mask=mask)
    elif KIND == "logsumexp":
        tl.store(out_ptr + at, tl.exp(z - tl.load(found_ptr + row)) * first, mask=mask)
    else:
        other = tl.load(other_ptr + at, mask=mask, other=LOWEST)
        second = tl.load(second_ptr + row)
        share = tl.exp(other - tl.load(found_ptr + row))
        if LEARNS:
            own = tl.exp(z - tl.load(found_ptr + 2 * rows + row)) * tl.load(third_ptr + row)
            tl.store(out_ptr + at, own - share * second, mask=mask)
        if TEACHES:
            gap = tl.load(found_ptr + rows + row)
            tl.store(other_out_ptr + at, share * (first + second * (1.0 + other - z - gap)), mask=mask)
