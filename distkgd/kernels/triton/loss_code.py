"""Triton code of `losses`: reductions over candidates of scores z = scale · (q · c) that are never written
down.

Blocks of scores are products of the matrix units, summed in float32 (float64 for float64), and enter running sums
that are relative to the largest logit so far (online softmax; Milakov & Gimelshein 2018). With KIND kl there are
two models, first the student, then the teacher; a model without a teacher gives its own queries and rows for both.

Pairs that do not count are listed per query, candidates ascending. A program keeps one cursor per query into that
list; most blocks hold no excluded pair and pay one comparison per query for it.
"""

from distkgd.kernels.triton.runtime import tl, triton
from distkgd.kernels.triton.score_code import logistic, softplus

# As in distributed/reductions/candidate_layout.py.
MASKED_SCORE = tl.constexpr(-1e30) if tl.constexpr is not None else -1e30
NOWHERE = tl.constexpr(2**31 - 1) if tl.constexpr is not None else 2**31 - 1


@triton.jit
def _scores(q_ptr, c_ptr, query, candidate, num_queries, num_candidates, width, scale, ACC: tl.constexpr,
            PRECISION: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[BQ, BN] scores of a block."""
    total = tl.zeros((BQ, BN), dtype=ACC)
    inner = tl.arange(0, BK)
    q_at = q_ptr + query[:, None] * width + inner[None, :]
    c_at = c_ptr + candidate[None, :] * width + inner[:, None]
    for start in range(0, width, BK):
        more = inner < width - start
        q = tl.load(q_at + start, mask=(query < num_queries)[:, None] & more[None, :], other=0.0)
        c = tl.load(c_at + start, mask=(candidate < num_candidates)[None, :] & more[:, None], other=0.0)
        total = tl.dot(q, c, total, input_precision=PRECISION, out_dtype=ACC)
    return total * scale


@triton.jit
def _excluded_here(columns_ptr, cursor, end, candidate, stop, BQ: tl.constexpr, BN: tl.constexpr):
    """[BQ, BN] which pairs of a block do not count, and the cursors moved past it."""
    out = tl.zeros((BQ, BN), dtype=tl.int1)
    column = tl.load(columns_ptr + cursor, mask=cursor < end, other=NOWHERE)
    while tl.min(column, 0) < stop:
        out = out | (column[:, None] == candidate[None, :])
        cursor += (column < stop).to(tl.int32)
        column = tl.load(columns_ptr + cursor, mask=cursor < end, other=NOWHERE)
    return out, cursor


@triton.jit
def _limit(z, hidden, candidate, num_candidates):
    """Scores with MASKED_SCORE where a pair does not count, and -inf beyond the last candidate."""
    z = tl.where(hidden, MASKED_SCORE, z)
    return tl.where((candidate < num_candidates)[None, :], z, float("-inf"))


@triton.jit
def partials_code(q_ptr, c_ptr, other_q_ptr, other_c_ptr, columns_ptr, starts_ptr, ends_ptr, out_ptr, num_queries,
                  num_candidates, per_split, width, other_width, scale, temperature, KIND: tl.constexpr,
                  ACC: tl.constexpr, PRECISION: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr):  # fmt: skip
    """out [splits, 3, Q]: of each query and `per_split` candidates.

    log_sum_exp: log Σ exp z in place 0. self_adversarial: log Σ exp(t·z) in place 0 and the mean of softplus(z) under
    softmax(t·z) in place 1. kl: log Σ exp z_t, the mean of z_t − z_s under softmax(z_t), log Σ exp z_s.
    """
    blocks_q = tl.cdiv(num_queries, BQ)
    program = tl.program_id(0)
    split = program // blocks_q
    query = ((program % blocks_q) * BQ + tl.arange(0, BQ)).to(tl.int64)
    has_q = query < num_queries
    cursor = tl.load(starts_ptr + split.to(tl.int64) * num_queries + query, mask=has_q, other=0)
    end = tl.load(ends_ptr + query, mask=has_q, other=0)
    top = tl.full((BQ,), float("-inf"), dtype=ACC)
    mass = tl.zeros((BQ,), dtype=ACC)
    mean = tl.zeros((BQ,), dtype=ACC)
    other_top = tl.full((BQ,), float("-inf"), dtype=ACC)
    other_mass = tl.zeros((BQ,), dtype=ACC)
    last = tl.minimum((split + 1) * per_split, num_candidates)
    for begin in range(split * per_split, last, BN):
        candidate = (begin + tl.arange(0, BN)).to(tl.int64)
        z = _scores(q_ptr, c_ptr, query, candidate, num_queries, num_candidates, width, scale, ACC, PRECISION,
                    BQ, BN, BK)  # fmt: skip
        hidden, cursor = _excluded_here(columns_ptr, cursor, end, candidate, begin + BN, BQ, BN)
        if KIND == "self_adversarial":
            logit = _limit(z * temperature, hidden, candidate, num_candidates)
            value = softplus(_limit(z, hidden, candidate, num_candidates))
        z = _limit(z, hidden, candidate, num_candidates)
        if KIND == "log_sum_exp":
            logit = z
        if KIND == "kl":
            logit = _scores(other_q_ptr, other_c_ptr, query, candidate, num_queries, num_candidates, other_width, scale,
                            ACC, PRECISION, BQ, BN, BK)  # fmt: skip
            logit = _limit(logit, hidden, candidate, num_candidates)
            value = tl.where(candidate[None, :] < num_candidates, logit - z, 0.0)
            new = tl.maximum(other_top, tl.max(z, 1))
            other_mass = other_mass * tl.exp(other_top - new) + tl.sum(tl.exp(z - new[:, None]), 1)
            other_top = new
        new = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp(logit - new[:, None])
        shrink = tl.exp(top - new)
        mass = mass * shrink + tl.sum(weight, 1)
        if KIND != "log_sum_exp":
            mean = mean * shrink + tl.sum(weight * value, 1)
        top = new
    at = out_ptr + split.to(tl.int64) * 3 * num_queries + query
    tl.store(at, top + tl.log(mass), mask=has_q)
    if KIND != "log_sum_exp":
        tl.store(at + num_queries, mean / mass, mask=has_q)
    if KIND == "kl":
        tl.store(at + 2 * num_queries, other_top + tl.log(other_mass), mask=has_q)


@triton.jit
def weights_code(q_ptr, c_ptr, other_q_ptr, other_c_ptr, columns_ptr, starts_ptr, ends_ptr, found_ptr, grad_ptr,
                 out_ptr, other_out_ptr, num_queries, num_candidates, first, stop, stride, width, other_width, scale,
                 temperature, KIND: tl.constexpr, OTHER: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                 BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out [Q, stride]: gradients of q · c for candidates first … stop - 1; with OTHER, those of the teacher too.

    found, grad [3, Q]: what `partials_code` found, all candidates together, and the gradients of these numbers.
    """
    blocks_q = tl.cdiv(num_queries, BQ)
    program = tl.program_id(0)
    block = program // blocks_q
    query = ((program % blocks_q) * BQ + tl.arange(0, BQ)).to(tl.int64)
    has_q = query < num_queries
    begin = first + block * BN
    candidate = (begin + tl.arange(0, BN)).to(tl.int64)
    cursor = tl.load(starts_ptr + block.to(tl.int64) * num_queries + query, mask=has_q, other=0)
    end = tl.load(ends_ptr + query, mask=has_q, other=0)
    hidden, cursor = _excluded_here(columns_ptr, cursor, end, candidate, begin + BN, BQ, BN)
    kept = (candidate < stop)[None, :] & (~hidden)
    z = _scores(q_ptr, c_ptr, query, candidate, num_queries, num_candidates, width, scale, ACC, PRECISION,
                BQ, BN, BK)  # fmt: skip
    lse = tl.load(found_ptr + query, mask=has_q, other=0.0)[:, None]
    at = query[:, None] * stride + (candidate - first)[None, :]
    mask = has_q[:, None] & (candidate < stop)[None, :]
    if KIND == "log_sum_exp":
        grad = tl.load(grad_ptr + query, mask=has_q, other=0.0)[:, None]
        pulled = tl.exp(z - lse) * grad
    elif KIND == "self_adversarial":
        grad = tl.load(grad_ptr + num_queries + query, mask=has_q, other=0.0)[:, None]
        pulled = tl.exp(z * temperature - lse) * logistic(z) * grad
    else:
        logit = _scores(other_q_ptr, other_c_ptr, query, candidate, num_queries, num_candidates, other_width, scale,
                        ACC, PRECISION, BQ, BN, BK)  # fmt: skip
        for_lse = tl.load(grad_ptr + query, mask=has_q, other=0.0)[:, None]
        for_gap = tl.load(grad_ptr + num_queries + query, mask=has_q, other=0.0)[:, None]
        for_own = tl.load(grad_ptr + 2 * num_queries + query, mask=has_q, other=0.0)[:, None]
        gap = tl.load(found_ptr + num_queries + query, mask=has_q, other=0.0)[:, None]
        own_lse = tl.load(found_ptr + 2 * num_queries + query, mask=has_q, other=0.0)[:, None]
        share = tl.exp(logit - lse)
        pulled = tl.exp(z - own_lse) * for_own - share * for_gap
        if OTHER:
            other = share * (for_lse + for_gap * (1.0 + logit - z - gap))
            tl.store(other_out_ptr + at, tl.where(kept, other * scale, 0.0), mask=mask)
    tl.store(out_ptr + at, tl.where(kept, pulled * scale, 0.0), mask=mask)
