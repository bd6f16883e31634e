"""Intervals of paired differences: the same models with several seeds."""

import math
from collections.abc import Sequence
from statistics import mean, stdev


def paired_interval(differences: Sequence[float]) -> dict[str, float]:
    """Their mean, and from two on the ends of its two-sided 95% interval by Student's t."""
    middle, n = mean(differences), len(differences)
    if n == 1:
        return {"mean": middle}
    half = t_quantile(n - 1) * stdev(differences) / math.sqrt(n)
    return {"mean": middle, "low": middle - half, "high": middle + half}


def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """The t that Student's |t| with a whole number of degrees of freedom, 1 or more, stays below that often."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _inside(angle, freedom) < inside else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
