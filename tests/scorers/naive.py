"""The papers' formulas for one triple, in plain Python: loops and complex numbers, no tensors."""

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]


def transe(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    total = 0.0
    for k in range(len(h)):
        total += abs(h[k] + r[k] - t[k]) ** norm
    return margin - total ** (1 / norm)


def distmult(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    total = 0.0
    for k in range(len(h)):
        total += h[k] * r[k] * t[k]
    return total


def _complex(row: Row) -> list[complex]:
    return [complex(row[2 * k], row[2 * k + 1]) for k in range(len(row) // 2)]


def complex_(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    total = 0j
    for head, relation, tail in zip(_complex(h), _complex(r), _complex(t), strict=True):
        total += head * relation * tail.conjugate()
    return total.real


def simple(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    forth = back = 0.0
    for k in range(0, len(h), 2):
        forth += h[k] * r[k] * t[k + 1]
        back += t[k] * r[k + 1] * h[k + 1]
    return (forth + back) / 2


def rotate(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    total = 0.0
    for head, phase, tail in zip(_complex(h), r, _complex(t), strict=True):
        total += abs(head * complex(math.cos(phase), math.sin(phase)) - tail)
    return margin - total


def pairre(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    length_h, length_t = math.dist(h, [0.0] * len(h)), math.dist(t, [0.0] * len(t))
    total = 0.0
    for k in range(len(h)):
        total += abs(h[k] / length_h * r[2 * k] - t[k] / length_t * r[2 * k + 1])
    return margin - total


def cp(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    total = 0.0
    for k in range(len(h) // 2):
        total += h[2 * k] * r[k] * t[2 * k + 1]
    return total


def rescal(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    total = 0.0
    for i in range(len(h)):
        for j in range(len(t)):
            total += h[i] * r[i * len(t) + j] * t[j]
    return total


NAIVE: dict[str, Callable[[Row, Row, Row, float, int], float]] = {
    "transe": transe,
    "distmult": distmult,
    "complex": complex_,
    "simple": simple,
    "rotate": rotate,
    "pairre": pairre,
    "cp": cp,
    "rescal": rescal,
}

# Real numbers per relation, as each docstring says.
RELATION_SIZE: dict[str, Callable[[int], int]] = {
    "transe": lambda dim: dim,
    "distmult": lambda dim: dim,
    "complex": lambda dim: dim,
    "simple": lambda dim: dim,
    "rotate": lambda dim: dim // 2,
    "pairre": lambda dim: 2 * dim,
    "cp": lambda dim: dim // 2,
    "rescal": lambda dim: dim * dim,
}
