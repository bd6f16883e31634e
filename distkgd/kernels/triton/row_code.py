"""Triton code of `rows` and `draws`."""

from distkgd.kernels.triton.runtime import tl, triton


@triton.jit
def add_code(table_ptr, rows_ptr, values_ptr, order_ptr, num, width, SORTED: tl.constexpr, BE: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """table[rows[i]] += the sum of all values whose row that is, by the program of the first of them.

    SORTED: rows ascend, and order says which of values belongs to each.
    """
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = k < width
    total = tl.zeros((BK,), dtype=tl.float32)
    earlier = 0
    if SORTED:
        earlier += (tl.load(rows_ptr + i - 1, mask=i > 0, other=-1) == row).to(tl.int32)
        j = tl.where(earlier == 0, i, num)
        while tl.load(rows_ptr + j, mask=j < num, other=-1) == row:
            total += tl.load(values_ptr + tl.load(order_ptr + j) * width + k, mask=inside, other=0.0)
            j += 1
    else:
        for begin in range(0, num, BE):
            place = begin + tl.arange(0, BE)
            same = tl.load(rows_ptr + place, mask=place < num, other=-1) == row
            earlier += tl.sum((same & (place < i)).to(tl.int32))
            if (earlier == 0) & (tl.sum(same.to(tl.int32)) > 0):
                for j in range(begin, tl.minimum(begin + BE, num)):
                    if tl.load(rows_ptr + j) == row:
                        total += tl.load(values_ptr + j * width + k, mask=inside, other=0.0)
    at = table_ptr + row * width + k
    mask = inside & (earlier == 0)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def update_code(table_ptr, rows_ptr, grad_ptr, first_ptr, second_ptr, clip_ptr, width, clip, lr, eps, first_gain,
                second_gain, kept, first_scale, second_scale, RULE: tl.constexpr, LISTED: tl.constexpr,
                CLIPPED: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One step of an optimiser on a row of a table and its state; formulas in distributed/optim/rows.py.

    LISTED: program i has rows[i], if that stands there for the first time of consecutive times. CLIPPED: the factor on
    gradients lies in memory. Of adam's betas: gains 1 - beta, scales 1 / (1 - beta^step), kept the second one.
    """
    i = tl.program_id(0).to(tl.int64)
    row = i
    alive = i >= 0
    if LISTED:
        row = tl.load(rows_ptr + i)
        alive = (i == 0) | (tl.load(rows_ptr + i - 1, mask=i > 0, other=-1) != row)
    if CLIPPED:
        clip = tl.load(clip_ptr).to(tl.float32)
    rowwise = 0.0
    if RULE == "rowwise_adagrad":
        for begin in range(0, width, BK):
            k = begin + tl.arange(0, BK)
            grad = tl.load(grad_ptr + i * width + k, mask=(k < width) & alive, other=0.0) * clip
            rowwise += tl.sum(grad * grad)
        rowwise = tl.load(first_ptr + row) + rowwise / width
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        mask = (k < width) & alive
        grad = tl.load(grad_ptr + i * width + k, mask=mask, other=0.0) * clip
        at = row * width + k
        if RULE == "adagrad":
            total = tl.load(first_ptr + at, mask=mask, other=0.0) + grad * grad
            tl.store(first_ptr + at, total, mask=mask)
            grad = grad / (tl.sqrt(total) + eps)
        elif RULE == "rowwise_adagrad":
            grad = grad / (tl.sqrt(rowwise) + eps)
        elif RULE == "adam":
            mean = tl.load(first_ptr + at, mask=mask, other=0.0)
            mean += (grad - mean) * first_gain
            square = tl.load(second_ptr + at, mask=mask, other=0.0) * kept + grad * grad * second_gain
            tl.store(first_ptr + at, mean, mask=mask)
            tl.store(second_ptr + at, square, mask=mask)
            grad = mean * first_scale / (tl.sqrt(square * second_scale) + eps)
        new = tl.load(table_ptr + at, mask=mask, other=0.0) - lr * grad
        tl.store(table_ptr + at, new, mask=mask)
    if RULE == "rowwise_adagrad":
        tl.store(first_ptr + row, rowwise, mask=alive)


@triton.jit(do_not_specialize=["key", "first", "low", "size"])
def integers_code(out_ptr, num, key, first, low, size, golden, one, two, BLOCK: tl.constexpr):
    """out[i] = low + a number below size, that of counter first + i; golden, one, two: SplitMix64's factors."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = (i + first) * golden + key
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * one
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * two
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    tl.store(out_ptr + i, low + ((x >> 1) & ((1 << 63) - 1)) % size, mask=i < num)


@triton.jit
def _begins(listed_ptr, i, num):
    """Which of the sorted numbers differ from the one before; the first does not."""
    found = tl.load(listed_ptr + i, mask=i < num, other=-1)
    return found, (i > 0) & (i < num) & (found != tl.load(listed_ptr + i - 1, mask=(i > 0) & (i < num), other=-1))


@triton.jit
def begins_code(listed_ptr, out_ptr, num, BLOCK: tl.constexpr):
    """out[b]: how many segments of equal numbers begin in block b of sorted ones, but for the very first."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, new = _begins(listed_ptr, i, num)
    tl.store(out_ptr + tl.program_id(0), tl.sum(new.to(tl.int32)))


@triton.jit
def segments_code(listed_ptr, order_ptr, begins_ptr, unique_ptr, place_ptr, offsets_ptr, num, most, blocks,
                  BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """What `segments` returns, of sorted numbers, the places that they had, and what `begins_code` has found."""
    b = tl.arange(0, BLOCKS)
    begun = tl.load(begins_ptr + b, mask=b < blocks, other=0)
    number = tl.sum(begun) + 1
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found, new = _begins(listed_ptr, i, num)
    among = (tl.sum(tl.where(b < tl.program_id(0), begun, 0)) + tl.cumsum(new.to(tl.int32), 0)).to(tl.int64)
    tl.store(place_ptr + tl.load(order_ptr + i, mask=i < num, other=0), among, mask=i < num)
    first = (new | (i == 0)) & (among < most)
    tl.store(unique_ptr + among, found, mask=first)
    tl.store(offsets_ptr + among, i.to(tl.int64), mask=first)
    last = tl.load(listed_ptr + num - 1) + tl.zeros((BLOCK,), dtype=tl.int64)
    tl.store(unique_ptr + i, last, mask=(i >= number) & (i < most))
    tl.store(offsets_ptr + i, tl.zeros((BLOCK,), dtype=tl.int64) + num, mask=(i >= number) & (i <= most))


@triton.jit
def directions_code(rows_ptr, unit_ptr, length_ptr, width, least, BK: tl.constexpr):
    """unit [n, width], length [n]: rows over their norms, which are at least `least`, and the logarithm of these."""
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BK,), dtype=tl.float32)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        x = tl.load(rows_ptr + row * width + k, mask=k < width, other=0.0)
        square += x * x
    norm = tl.maximum(tl.sqrt(tl.sum(square, 0)), least)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        x = tl.load(rows_ptr + row * width + k, mask=k < width, other=0.0)
        tl.store(unit_ptr + row * width + k, x / norm, mask=k < width)
    tl.store(length_ptr + row, tl.log(norm))


@triton.jit
def undirected_code(unit_ptr, length_ptr, grad_ptr, of_length_ptr, out_ptr, width, least, BK: tl.constexpr):
    """Gradients of rows for those of what `directions_code` made of them, which stands in unit and length."""
    row = tl.program_id(0).to(tl.int64)
    along = tl.zeros((BK,), dtype=tl.float32)
    for begin in range(0, width, BK):
        at = row * width + begin + tl.arange(0, BK)
        mask = begin + tl.arange(0, BK) < width
        along += tl.load(unit_ptr + at, mask=mask, other=0.0) * tl.load(grad_ptr + at, mask=mask, other=0.0)
    norm = tl.exp(tl.load(length_ptr + row))
    pull = tl.load(of_length_ptr + row) - tl.sum(along, 0)
    pull = tl.where(norm > 1.001 * least, pull, 0.0)  # which the logarithm and back has rounded
    for begin in range(0, width, BK):
        at = row * width + begin + tl.arange(0, BK)
        mask = begin + tl.arange(0, BK) < width
        unit = tl.load(unit_ptr + at, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, (grad + unit * pull) / norm, mask=mask)
