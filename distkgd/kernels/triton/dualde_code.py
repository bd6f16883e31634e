"""Triton code of `dualde`: its terms of pairs of a student's and a teacher's numbers, and their gradients."""

from distkgd.kernels.triton.runtime import tl, triton
from distkgd.kernels.triton.score_code import COUNTS, LOWEST, logistic, softplus


@triton.jit
def _huber(gap, delta):
    """DualDE Eq. 4."""
    size = tl.abs(gap)
    return tl.where(size < delta, 0.5 * gap * gap, delta * (size - 0.5 * delta))


@triton.jit
def _clipped(gap, delta):
    """Its derivative."""
    return tl.minimum(tl.maximum(gap, -delta), delta)


@triton.jit
def _quality(other, alpha, beta, POSITIVE: tl.constexpr, EVALUATED: tl.constexpr):
    """p of DualDE Eq. 8, 9, 12, 13, and its derivative for what the sigmoid is taken of."""
    if not EVALUATED:
        return other * 0.0 + 1.0, other * 0.0
    sigma = logistic(alpha * (other + beta))
    slope = sigma * (1.0 - sigma)
    if not POSITIVE:
        sigma, slope = 1.0 - sigma, -slope
    return sigma, slope


@triton.jit
def _pairs(own_ptr, other_ptr, own_angle_ptr, other_angle_ptr, own_ratio_ptr, other_ratio_ptr, at, mask, delta,
           SHAPED: tl.constexpr):  # fmt: skip
    """Scores of both models and their distance (DualDE Eq. 4, 7), the difference of cosines, both ratios of lengths."""
    own = tl.load(own_ptr + at, mask=mask, other=LOWEST)
    other = tl.load(other_ptr + at, mask=mask, other=LOWEST)
    distance = _huber(own - other, delta)
    angles, own_ratio, other_ratio = distance, distance, distance
    if SHAPED:
        angles = tl.load(own_angle_ptr + at, mask=mask, other=0.0) - tl.load(other_angle_ptr + at, mask=mask, other=0.0)
        own_ratio = tl.exp(tl.load(own_ratio_ptr + at, mask=mask, other=0.0))
        other_ratio = tl.exp(tl.load(other_ratio_ptr + at, mask=mask, other=0.0))
        distance += _huber(angles, delta) + _huber(own_ratio - other_ratio, delta)
    return own, other, distance, angles, own_ratio, other_ratio


@triton.jit
def _made(own, other, counts, distance, alpha, beta, POSITIVE: tl.constexpr, EVALUATED: tl.constexpr):
    """Of one model: weighed distance, weighed hard loss, and the quality of the soft label."""
    quality, _ = _quality(other, alpha, beta, POSITIVE, EVALUATED)
    missed = softplus(-own) if POSITIVE else softplus(own)
    if EVALUATED:
        missed = missed * (1.0 - quality)
    return (
        tl.where(counts, quality * distance, 0.0),
        tl.where(counts, missed, 0.0),
        tl.where(counts, quality, 0.0),
    )


@triton.jit
def _pulled(
    own, other, counts, distance, alpha, beta, for_soft, for_hard, POSITIVE: tl.constexpr, EVALUATED: tl.constexpr
):
    """Of one model's terms: what pulls its side of a distance, the gradient of its own score by its hard loss, and that
    of what the sigmoid of its evaluator is taken of."""
    quality, slope = _quality(other, alpha, beta, POSITIVE, EVALUATED)
    miss = softplus(-own) if POSITIVE else softplus(own)
    push = -logistic(-own) if POSITIVE else logistic(own)
    push = for_hard * push * (1.0 - quality if EVALUATED else 1.0)
    judged = tl.where(counts, (for_soft * distance - for_hard * miss) * slope, 0.0)
    return for_soft * quality, push, judged


@triton.jit
def dualde_terms_code(own_ptr, other_ptr, own_angle_ptr, other_angle_ptr, own_ratio_ptr, other_ratio_ptr, alpha_ptr,
                      beta_ptr, out_ptr, rows, num, delta, soft_weight, POSITIVE: tl.constexpr, LEARNING: tl.constexpr,
                      EVALUATED: tl.constexpr, SHAPED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [3 LEARNING + 1, rows]: of student and teacher, as far as they learn, weighed soft and hard terms (DualDE
    Eq. 10-11, 14-15), summed over the `num` pairs of each row; then how many pairs count; then the qualities.

    own, other: the student's and the teacher's scores; angle, ratio: cosines, and logarithms of the ratios of lengths.
    A pair counts unless the student's score is masked.
    """
    row = tl.program_id(0).to(tl.int64)
    side: tl.constexpr = 0 if POSITIVE else 1
    alpha, beta = tl.load(alpha_ptr + side), tl.load(beta_ptr + side)
    its_alpha, its_beta = tl.load(alpha_ptr + 2 + side), tl.load(beta_ptr + 2 + side)
    none = tl.zeros((BLOCK,), dtype=tl.float32)
    soft, hard, seen, its_soft, its_hard, its_seen, number = none, none, none, none, none, none, none
    for begin in range(0, num, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        own, other, distance, _, _, _ = _pairs(own_ptr, other_ptr, own_angle_ptr, other_angle_ptr, own_ratio_ptr,
                                               other_ratio_ptr, row * num + k, k < num, delta, SHAPED)  # fmt: skip
        counts = own > COUNTS
        number += tl.where(counts, 1.0, 0.0)
        more, missed, quality = _made(own, other, counts, distance, alpha, beta, POSITIVE, EVALUATED)
        soft += more
        hard += missed
        seen += quality
        if LEARNING == 2:
            more, missed, quality = _made(other, own, counts, distance, its_alpha, its_beta, POSITIVE, EVALUATED)
            its_soft += more
            its_hard += missed
            its_seen += quality
    at = out_ptr + row
    tl.store(at, soft_weight * tl.sum(soft, 0))
    tl.store(at + rows, tl.sum(hard, 0))
    tl.store(at + 2 * LEARNING * rows, tl.sum(number, 0))
    tl.store(at + (2 * LEARNING + 1) * rows, tl.sum(seen, 0))
    if LEARNING == 2:
        tl.store(at + 2 * rows, soft_weight * tl.sum(its_soft, 0))
        tl.store(at + 3 * rows, tl.sum(its_hard, 0))
        tl.store(at + 6 * rows, tl.sum(its_seen, 0))


@triton.jit
def dualde_pulls_code(own_ptr, other_ptr, own_angle_ptr, other_angle_ptr, own_ratio_ptr, other_ratio_ptr, alpha_ptr,
                      beta_ptr, grad_ptr, of_own_ptr, of_other_ptr, of_own_angle_ptr, of_other_angle_ptr,
                      of_own_ratio_ptr, of_other_ratio_ptr, evaluators_ptr, rows, num, delta, soft_weight,
                      POSITIVE: tl.constexpr, LEARNING: tl.constexpr, EVALUATED: tl.constexpr, SHAPED: tl.constexpr,
                      STOPPED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of what `dualde_terms_code` is given, for grad [2 LEARNING, rows] of its terms. evaluators
    [2, 4, rows]: those of alpha and beta that each row has."""
    row = tl.program_id(0).to(tl.int64)
    side: tl.constexpr = 0 if POSITIVE else 1
    teacher: tl.constexpr = 2 * (LEARNING - 1)  # where its terms begin; the student's again where it has none
    alpha, beta = tl.load(alpha_ptr + side), tl.load(beta_ptr + side)
    for_soft, for_hard = tl.load(grad_ptr + row) * soft_weight, tl.load(grad_ptr + rows + row)
    its_alpha, its_beta = tl.load(alpha_ptr + 2 + side), tl.load(beta_ptr + 2 + side)
    its_grad = grad_ptr + teacher * rows + row
    its_soft, its_hard = tl.load(its_grad) * soft_weight, tl.load(its_grad + rows)
    none = tl.zeros((BLOCK,), dtype=tl.float32)
    pulled_alpha, pulled_beta, its_pulled_alpha, its_pulled_beta = none, none, none, none
    for begin in range(0, num, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        at, mask = row * num + k, k < num
        own, other, distance, angles, own_ratio, other_ratio = _pairs(own_ptr, other_ptr, own_angle_ptr,
                                                                      other_angle_ptr, own_ratio_ptr, other_ratio_ptr,
                                                                      at, mask, delta, SHAPED)  # fmt: skip
        counts = own > COUNTS
        near, of_own, judged = _pulled(own, other, counts, distance, alpha, beta, for_soft, for_hard, POSITIVE,
                                       EVALUATED)  # fmt: skip
        pulled_alpha += judged * (other + beta)
        pulled_beta += judged * alpha
        its_near = near * 0.0
        if LEARNING == 2:
            its_near, of_other, judged = _pulled(other, own, counts, distance, its_alpha, its_beta, its_soft, its_hard,
                                                 POSITIVE, EVALUATED)  # fmt: skip
            its_pulled_alpha += judged * (own + its_beta)
            its_pulled_beta += judged * its_alpha
            if not STOPPED:
                near += its_near
                its_near = near
        gap = _clipped(own - other, delta)
        tl.store(of_own_ptr + at, tl.where(counts, near * gap + of_own, 0.0), mask=mask)
        if LEARNING == 2:
            tl.store(of_other_ptr + at, tl.where(counts, of_other - its_near * gap, 0.0), mask=mask)
        if SHAPED:
            gap = _clipped(angles, delta)
            tl.store(of_own_angle_ptr + at, tl.where(counts, near * gap, 0.0), mask=mask)
            if LEARNING == 2:
                tl.store(of_other_angle_ptr + at, tl.where(counts, -its_near * gap, 0.0), mask=mask)
            gap = _clipped(own_ratio - other_ratio, delta)
            tl.store(of_own_ratio_ptr + at, tl.where(counts, near * gap * own_ratio, 0.0), mask=mask)
            if LEARNING == 2:
                tl.store(of_other_ratio_ptr + at, tl.where(counts, -its_near * gap * other_ratio, 0.0), mask=mask)
    for which in tl.static_range(4):  # of alpha, then of beta: the student's evaluator and the teacher's
        tl.store(evaluators_ptr + (2 * which + 1 - side) * rows + row, 0.0)
    tl.store(evaluators_ptr + side * rows + row, tl.sum(pulled_alpha, 0))
    tl.store(evaluators_ptr + (2 + side) * rows + row, tl.sum(its_pulled_alpha, 0))
    tl.store(evaluators_ptr + (4 + side) * rows + row, tl.sum(pulled_beta, 0))
    tl.store(evaluators_ptr + (6 + side) * rows + row, tl.sum(its_pulled_beta, 0))


@triton.jit
def dualde_shapes_code(anchor_ptr, answer_ptr, sign_ptr, unit_ptr, asked_ptr, out_ptr, rows, width, least,
                       BK: tl.constexpr):  # fmt: skip
    """Of rows [rows, width] of anchors and answers: unit [rows, width], the anchors over their norms; asked [rows, 2],
    sign · log norm and -sign; out [4, rows]: cosines, sign · (difference of log norms), log norms of both."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.zeros((BK,), dtype=tl.float32)
    other = tl.zeros((BK,), dtype=tl.float32)
    both = tl.zeros((BK,), dtype=tl.float32)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        a = tl.load(anchor_ptr + row * width + k, mask=k < width, other=0.0)
        b = tl.load(answer_ptr + row * width + k, mask=k < width, other=0.0)
        own += a * a
        other += b * b
        both += a * b
    norm = tl.maximum(tl.sqrt(tl.sum(own, 0)), least)
    other_norm = tl.maximum(tl.sqrt(tl.sum(other, 0)), least)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        a = tl.load(anchor_ptr + row * width + k, mask=k < width, other=0.0)
        tl.store(unit_ptr + row * width + k, a / norm, mask=k < width)
    sign, length, other_length = tl.load(sign_ptr + row), tl.log(norm), tl.log(other_norm)
    tl.store(asked_ptr + 2 * row, sign * length)
    tl.store(asked_ptr + 2 * row + 1, -sign)
    tl.store(out_ptr + row, tl.sum(both, 0) / (norm * other_norm))
    tl.store(out_ptr + rows + row, sign * (length - other_length))
    tl.store(out_ptr + 2 * rows + row, length)
    tl.store(out_ptr + 3 * rows + row, other_length)


@triton.jit
def dualde_unshaped_code(anchor_ptr, answer_ptr, sign_ptr, found_ptr, unit_ptr, asked_ptr, angle_ptr, ratio_ptr,
                         of_anchor_ptr, of_answer_ptr, rows, width, least, BK: tl.constexpr):  # fmt: skip
    """Gradients of anchors and answers, for those of what `dualde_shapes_code` made of them: unit [rows, width], asked
    [rows, 2], cosines and ratios [rows]; found [4, rows] is what it has found."""
    row = tl.program_id(0).to(tl.int64)
    sign, for_angle, for_ratio = tl.load(sign_ptr + row), tl.load(angle_ptr + row), tl.load(ratio_ptr + row)
    norm, other_norm = tl.exp(tl.load(found_ptr + 2 * rows + row)), tl.exp(tl.load(found_ptr + 3 * rows + row))
    along = tl.zeros((BK,), dtype=tl.float32)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        a = tl.load(anchor_ptr + row * width + k, mask=k < width, other=0.0)
        along += a * tl.load(unit_ptr + row * width + k, mask=k < width, other=0.0)
    turned = for_angle * tl.load(found_ptr + row)
    pull = sign * (tl.load(asked_ptr + 2 * row) + for_ratio) - tl.sum(along, 0) / norm - turned
    other_pull = -sign * for_ratio - turned
    pull = tl.where(norm > 1.001 * least, pull, 0.0)  # which the logarithm and back has rounded
    other_pull = tl.where(other_norm > 1.001 * least, other_pull, 0.0)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        at, mask = row * width + k, k < width
        a = tl.load(anchor_ptr + at, mask=mask, other=0.0) / norm
        b = tl.load(answer_ptr + at, mask=mask, other=0.0) / other_norm
        grad = tl.load(unit_ptr + at, mask=mask, other=0.0) + for_angle * b
        tl.store(of_anchor_ptr + at, (grad + a * pull) / norm, mask=mask)
        tl.store(of_answer_ptr + at, (for_angle * a + b * other_pull) / other_norm, mask=mask)
