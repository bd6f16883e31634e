"""Triton code of `distances`: sums over coordinates of all pairs of a group, and their gradients.

φ by KIND, as in `pairs`: dot q·c; square (q − c)²; manhattan |q − c|; scaled_manhattan |a − b·c|, a query being (a,
b) side by side; modulus √(re² + im²) of q − c, complex numbers interleaved. `width` counts the k of Σ_k φ(q_k,
c_k): half a row with modulus, half a query with scaled_manhattan. A query and a candidate number each become two
parts below; where the formula has one, both parts are the same.

Every accumulator is a [queries, candidates, coordinates] block of registers that is summed over its inner axis
once, after the last block: summing each block at once would cost as many exchanges between threads as the
arithmetic itself. Masked rows and coordinates are read as 0: there φ is 0, and so is every gradient.
"""

from distkgd.kernels.triton.runtime import tl, triton


@triton.jit
def _places(base, rows, present, start, width, KIND: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Where coordinates start … start + BLOCK - 1 of some rows lie, and which of them there are; with modulus both
    parts, in whole rows: reading every second number would leave half of each transaction unused."""
    WIDE: tl.constexpr = 2 if KIND == "modulus" else 1
    STRIDE: tl.constexpr = 2 if KIND == "modulus" or (KIND == "scaled_manhattan" and SIDE == "query") else 1
    k = WIDE * start + tl.arange(0, WIDE * BLOCK)
    return base + rows[:, None] * (STRIDE * width) + k[None, :], present[:, None] & (k < WIDE * width)[None, :]


@triton.jit
def _parts(base, rows, present, start, width, ACC: tl.constexpr, KIND: tl.constexpr, SIDE: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Both parts [ROWS, BLOCK] of what lies there."""
    at, mask = _places(base, rows, present, start, width, KIND, SIDE, BLOCK)
    found = tl.load(at, mask=mask, other=0.0).to(ACC)
    if KIND == "modulus":
        first, second = tl.split(tl.reshape(found, (ROWS, BLOCK, 2)))
    else:
        first = found
        second = found
        if KIND == "scaled_manhattan" and SIDE == "query":
            second = tl.load(at + width, mask=mask, other=0.0).to(ACC)
    return first, second


@triton.jit
def _keep(base, rows, present, start, width, first, second, KIND: tl.constexpr, SIDE: tl.constexpr,
          ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write what `_parts` reads."""
    at, mask = _places(base, rows, present, start, width, KIND, SIDE, BLOCK)
    if KIND == "modulus":
        tl.store(at, tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK)), mask=mask)
    else:
        tl.store(at, first, mask=mask)
        if KIND == "scaled_manhattan" and SIDE == "query":
            tl.store(at + width, second, mask=mask)


@triton.jit
def _phi(q0, q1, c0, c1, KIND: tl.constexpr):
    if KIND == "modulus":
        re = q0 - c0
        im = q1 - c1
        found = tl.sqrt(re * re + im * im)
    elif KIND == "scaled_manhattan":
        found = tl.abs(q0 - q1 * c0)
    elif KIND == "dot":
        found = q0 * c0
    elif KIND == "square":
        found = (q0 - c0) * (q0 - c0)
    else:
        found = tl.abs(q0 - c0)
    return found


@triton.jit
def _pull(q0, q1, c0, c1, g, KIND: tl.constexpr):
    """g · ∂φ/∂(difference): its two parts with modulus, else the same twice. 0 where the difference is 0. Not dot."""
    if KIND == "modulus":
        first = q0 - c0
        second = q1 - c1
        square = first * first + second * second
        weight = g / tl.sqrt(tl.where(square > 0, square, 1.0))  # times 0 where the difference is 0
        first = first * weight
        second = second * weight
    elif KIND == "square":
        first = 2.0 * g * (q0 - c0)
        second = first
    else:
        if KIND == "scaled_manhattan":
            apart = q0 - q1 * c0
        else:
            apart = q0 - c0
        first = tl.where(apart > 0, g, tl.where(apart < 0, -g, 0.0))
        second = first
    return first, second


@triton.jit
def _pull_candidates(first, second, q0, q1, c0, c1, g, KIND: tl.constexpr):
    """Both parts of candidates' gradients with those for g added."""
    if KIND == "dot":
        first += g * q0
    else:
        p0, p1 = _pull(q0, q1, c0, c1, g, KIND)
        if KIND == "scaled_manhattan":
            first -= p0 * q1
        else:
            first -= p0
        if KIND == "modulus":
            second -= p1
    return first, second


@triton.jit
def _rows(index_ptr, group, candidate, present, num_candidates, INDEXED: tl.constexpr):
    """Table rows of some candidates of a group."""
    rows = group * num_candidates + candidate
    if INDEXED:
        rows = tl.load(index_ptr + rows, mask=present, other=0)
    return rows


@triton.jit
def forward_code(q_ptr, table_ptr, index_ptr, out_ptr, num_queries, num_candidates, width, ACC: tl.constexpr,
                 KIND: tl.constexpr, INDEXED: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr):  # fmt: skip
    """out [G, Q, N]. One program: BQ queries and BN candidates of one group; neighbours share their candidates."""
    blocks_q = tl.cdiv(num_queries, BQ)
    blocks_n = tl.cdiv(num_candidates, BN)
    program = tl.program_id(0)
    group = (program // (blocks_q * blocks_n)).to(tl.int64)
    query = ((program % blocks_q) * BQ + tl.arange(0, BQ)).to(tl.int64)
    candidate = (((program // blocks_q) % blocks_n) * BN + tl.arange(0, BN)).to(tl.int64)
    has_q = query < num_queries
    has_n = candidate < num_candidates
    rows = _rows(index_ptr, group, candidate, has_n, num_candidates, INDEXED)
    asked = group * num_queries + query
    total = tl.zeros((BQ, BN, BK), dtype=ACC)
    for start in range(0, width, BK):
        q0, q1 = _parts(q_ptr, asked, has_q, start, width, ACC, KIND, "query", BQ, BK)
        c0, c1 = _parts(table_ptr, rows, has_n, start, width, ACC, KIND, "candidate", BN, BK)
        total += _phi(q0[:, None, :], q1[:, None, :], c0[None, :, :], c1[None, :, :], KIND)
    at = out_ptr + asked[:, None] * num_candidates + candidate[None, :]
    tl.store(at, tl.sum(total, 2), mask=has_q[:, None] & has_n[None, :])


@triton.jit
def queries_code(q_ptr, table_ptr, index_ptr, grad_ptr, out_ptr, num_groups, num_queries, num_candidates, per_split,
                 width, ACC: tl.constexpr, KIND: tl.constexpr, INDEXED: tl.constexpr, BQ: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out [splits, G, Q, a]: gradients of queries from `per_split` candidates each.

    One program: BK coordinates of BQ queries of one group, and all candidates of its split.
    """
    blocks_q = tl.cdiv(num_queries, BQ)
    program = tl.program_id(0)
    split = (program // (blocks_q * num_groups)).to(tl.int64)
    group = ((program // blocks_q) % num_groups).to(tl.int64)
    start = tl.program_id(1) * BK
    query = ((program % blocks_q) * BQ + tl.arange(0, BQ)).to(tl.int64)
    has_q = query < num_queries
    asked = group * num_queries + query
    q0, q1 = _parts(q_ptr, asked, has_q, start, width, ACC, KIND, "query", BQ, BK)
    first = tl.zeros((BQ, BN, BK), dtype=ACC)
    second = tl.zeros((BQ, BN, BK), dtype=ACC)
    end = tl.minimum((split + 1) * per_split, num_candidates)
    for begin in range(split * per_split, end, BN):
        candidate = (begin + tl.arange(0, BN)).to(tl.int64)
        has_n = candidate < end
        rows = _rows(index_ptr, group, candidate, has_n, num_candidates, INDEXED)
        c0, c1 = _parts(table_ptr, rows, has_n, start, width, ACC, KIND, "candidate", BN, BK)
        at = grad_ptr + asked[:, None] * num_candidates + candidate[None, :]
        g = tl.load(at, mask=has_q[:, None] & has_n[None, :], other=0.0).to(ACC)
        if KIND == "dot":
            first += g[:, :, None] * c0[None, :, :]
        else:
            p0, p1 = _pull(q0[:, None, :], q1[:, None, :], c0[None, :, :], c1[None, :, :], g[:, :, None], KIND)
            first += p0
            if KIND == "modulus":
                second += p1
            elif KIND == "scaled_manhattan":
                second -= p0 * c0[None, :, :]
    to = split * num_groups * num_queries + asked
    _keep(out_ptr, to, has_q, start, width, tl.sum(first, 1), tl.sum(second, 1), KIND, "query", BQ, BK)


@triton.jit
def candidates_code(q_ptr, table_ptr, index_ptr, grad_ptr, out_ptr, num_queries, num_candidates, width,
                    ACC: tl.constexpr, KIND: tl.constexpr, INDEXED: tl.constexpr, BQ: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out [G, N, d]: gradients of candidates, each pair (group, candidate) for itself.

    One program: BK coordinates of BN candidates of one group, and all queries of the group.
    """
    blocks_n = tl.cdiv(num_candidates, BN)
    program = tl.program_id(0)
    group = (program // blocks_n).to(tl.int64)
    start = tl.program_id(1) * BK
    candidate = ((program % blocks_n) * BN + tl.arange(0, BN)).to(tl.int64)
    has_n = candidate < num_candidates
    rows = _rows(index_ptr, group, candidate, has_n, num_candidates, INDEXED)
    c0, c1 = _parts(table_ptr, rows, has_n, start, width, ACC, KIND, "candidate", BN, BK)
    first = tl.zeros((BQ, BN, BK), dtype=ACC)
    second = tl.zeros((BQ, BN, BK), dtype=ACC)
    for begin in range(0, num_queries, BQ):
        query = (begin + tl.arange(0, BQ)).to(tl.int64)
        has_q = query < num_queries
        asked = group * num_queries + query
        q0, q1 = _parts(q_ptr, asked, has_q, start, width, ACC, KIND, "query", BQ, BK)
        at = grad_ptr + asked[:, None] * num_candidates + candidate[None, :]
        g = tl.load(at, mask=has_q[:, None] & has_n[None, :], other=0.0).to(ACC)
        first, second = _pull_candidates(first, second, q0[:, None, :], q1[:, None, :], c0[None, :, :], c1[None, :, :],
                                         g[:, :, None], KIND)  # fmt: skip
    to = group * num_candidates + candidate
    _keep(out_ptr, to, has_n, start, width, tl.sum(first, 0), tl.sum(second, 0), KIND, "candidate", BN, BK)


@triton.jit
def rows_code(q_ptr, table_ptr, grad_ptr, order_ptr, offsets_ptr, out_ptr, before, num_queries, num_candidates, width,
              ACC: tl.constexpr, KIND: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out [M, d]: gradients of table rows, summed over the pairs (group, candidate) that hold them.

    order: these pairs plus `before`, sorted by row, among smaller numbers that are no pairs; offsets [M + 1]: where
    each row's begin. One program: BK coordinates of one row, and every query that meets it, in order. Rows that nobody
    meets become 0.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BK
    begin = tl.load(offsets_ptr + row)
    number = (tl.load(offsets_ptr + row + 1) - begin) * num_queries
    alone = row + tl.zeros((1,), dtype=tl.int64)
    exists = alone >= 0
    c0, c1 = _parts(table_ptr, alone, exists, start, width, ACC, KIND, "candidate", 1, BK)
    first = tl.zeros((BE, BK), dtype=ACC)
    second = tl.zeros((BE, BK), dtype=ACC)
    for at in range(0, number, BE):
        entry = at + tl.arange(0, BE)
        has = entry < number
        pair = tl.load(order_ptr + begin + entry // num_queries, mask=has, other=0) - before
        has = has & (pair >= 0)
        asked = (pair // num_candidates) * num_queries + entry % num_queries
        g = tl.load(grad_ptr + asked * num_candidates + pair % num_candidates, mask=has, other=0.0).to(ACC)
        q0, q1 = _parts(q_ptr, asked, has, start, width, ACC, KIND, "query", BE, BK)
        first, second = _pull_candidates(first, second, q0, q1, c0, c1, g[:, None], KIND)
    f, s = tl.sum(first, 0), tl.sum(second, 0)
    _keep(out_ptr, alone, exists, start, width, f[None, :], s[None, :], KIND, "candidate", 1, BK)


@triton.jit
def gather_code(parts_ptr, order_ptr, offsets_ptr, out_ptr, before, width, ACC: tl.constexpr, BE: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    """out [M, d]: sums of the rows of parts [G·N, d] that belong to each table row, in order; see `rows_code`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    total = tl.zeros((BE, BK), dtype=ACC)
    for at in range(begin, end, BE):
        entry = at + tl.arange(0, BE)
        pair = tl.load(order_ptr + entry, mask=entry < end, other=0) - before
        mask = ((entry < end) & (pair >= 0))[:, None] & (k < width)[None, :]
        total += tl.load(parts_ptr + pair[:, None] * width + k[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + row * width + k, tl.sum(total, 0), mask=k < width)
