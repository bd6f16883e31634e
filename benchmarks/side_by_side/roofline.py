"""What a task must move and compute at the least, what the machine reaches at best, and the time that follows.

The least is counted per unit of the task, in float32 (4 bytes), for rows of d numbers and Adagrad (one number of state
per number of a row):

- A row that learns is read once and written once, and so is its state: 16 d bytes. Where every row takes part in a
  softmax, its weight is needed once more, after the sum is known: 20 d bytes. Gradients need never reach memory.
- A row that only speaks (ranking, serving, a teacher) is read once per pass over the table: 4 d bytes.
- A score of a dot product: 2 d FLOPs, with both gradients 6 d, fused multiply-adds as in a matrix product.
- A score of a distance: 3 d FLOPs for L1 (subtract, absolute value, add), with gradients 7 d (a product with the sign
  and an addition for each side more); RotatE, per complex number, 7 and 14 (subtract twice, two squares, their sum,
  root, add; gradients: a division, two products, two additions for each side): 3.5 d and 7 d.

Ids, scores and relations are left out: they are hundreds of times smaller. The time is the larger of bytes at copy
bandwidth and FLOPs at their ceilings: a bound that no program beats by more than the ceilings were measured too low.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FORWARD = {"transe": 3.0, "complex": 2.0, "rotate": 3.5}  # FLOPs per score and number
WITH_GRADIENT = {"transe": 7.0, "complex": 6.0, "rotate": 7.0}
LEARNS, LEARNS_ALL, SPEAKS = 16, 20, 4  # bytes per number of a row
BEST_OF = 5


@dataclass(frozen=True)
class Ceilings:
    """What was reached at best: bytes (read + written) and FLOPs per second."""

    copy: float
    gemm: float
    elementwise: float


@dataclass(frozen=True)
class Work:
    """The least that one unit of a task needs."""

    bytes: float
    gemm: float = 0.0
    elementwise: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        """The time it needs at the ceilings, memory and arithmetic side by side."""
        return max(self.bytes / ceilings.copy, self.gemm / ceilings.gemm + self.elementwise / ceilings.elementwise)


def distinct(entities: int, draws: float) -> float:
    """Expected number of distinct entities among uniform draws."""
    return entities * -math.expm1(draws * math.log1p(-1.0 / entities))


def sampled_step(scorer: str, entities: int, dim: int, batch: int, negatives: int, groups: int) -> Work:
    """A positive triple of a training step with one query per triple.

    groups: lists of `negatives` drawn per step: batch (per triple), batch / chunk, or 1.
    """
    rows = distinct(entities, 2 * batch + groups * negatives)
    flops = WITH_GRADIENT[scorer] * (negatives + 1) * dim
    return Work(LEARNS * dim * rows / batch, *((flops, 0.0) if scorer == "complex" else (0.0, flops)))


def full_step(scorer: str, entities: int, dim: int, batch: int) -> Work:
    """A positive triple of a 1-vs-all step, two queries per triple."""
    flops = WITH_GRADIENT[scorer] * 2 * entities * dim
    return Work(LEARNS_ALL * dim * entities / batch, *((flops, 0.0) if scorer == "complex" else (0.0, flops)))


def full_pass(scorer: str, entities: int, dim: int, queries: int) -> Work:
    """A query that is compared with all entities, `queries` of them per pass over the table."""
    flops = FORWARD[scorer] * entities * dim
    return Work(SPEAKS * dim * entities / queries, *((flops, 0.0) if scorer == "complex" else (0.0, flops)))


def together(*parts: Work) -> Work:
    """All of it, one after the other."""
    return Work(*(sum(getattr(part, kind) for part in parts) for kind in ("bytes", "gemm", "elementwise")))


def times(work: Work, number: float) -> Work:
    """That often."""
    return Work(work.bytes * number, work.gemm * number, work.elementwise * number)


def measure_ceilings(numbers: int = 1 << 26) -> Ceilings:
    """With torch, in this process, with its threads.

    numbers: of the copied tensor.
    elementwise: half of the product's rate, whose FLOPs come in fused pairs, one vector instruction for two; those of a
    distance are an instruction each. Or what `torch.cdist` with p = 1 reaches on rows in the cache, if that is more.
    """
    source, target = torch.ones(numbers), torch.zeros(numbers)
    copy, gemm = 8 * numbers / _best(lambda: target.copy_(source)), gemm_rate(numbers)
    rows = torch.rand(64, 512)
    distances = 3 * len(rows) ** 2 * 512 * 16 / _best(lambda: [torch.cdist(rows, rows, p=1) for _ in range(16)])
    return Ceilings(copy, gemm, max(gemm / 2, distances))


def gemm_rate(numbers: int = 1 << 26) -> float:
    """FLOPs per second of float32 matrix products, the best of several.

    numbers: the sides are half of its root, 2048 at most.
    """
    side = max(8, min(2048, int(numbers**0.5) // 2))
    a, b = torch.rand(side, side), torch.rand(side, side)
    return 2 * side**3 / _best(lambda: a @ b)


def best_of(found: list[Ceilings]) -> Ceilings:
    """The best of several measurements, each kind for itself."""
    return Ceilings(*(max(getattr(one, kind) for one in found) for kind in ("copy", "gemm", "elementwise")))


def _best(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(BEST_OF + 1):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
