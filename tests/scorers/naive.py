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
        total += abs(head * complex(math.cos(phase), math.sin(phase)) - tail) ** norm
    return margin - total ** (1 / norm)


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


# --- Chami et al. 2020: a row is a bias and coordinates; relations as their docstrings say ---


def _block(x: Row, angle: float, mirror: bool) -> list[float]:
    """A Givens rotation (a cos - b sin, a sin + b cos) or reflection (a cos + b sin, a sin - b cos) of one pair."""
    (a, b), cos, sin = x, math.cos(angle), math.sin(angle)
    return [a * cos + b * sin, a * sin - b * cos] if mirror else [a * cos - b * sin, a * sin + b * cos]


def _isometry(h: Row, r: Row, mirror: bool) -> tuple[list[float], list[float]]:
    moved: list[float] = []
    shift: list[float] = []
    for k in range(len(h) // 2):
        moved += _block(h[2 * k : 2 * k + 2], r[3 * k], mirror)
        shift += r[3 * k + 1 : 3 * k + 3]
    return moved, shift


def _euclidean(h: Row, r: Row, t: Row, mirror: bool) -> float:
    moved, shift = _isometry(h[1:], r, mirror)
    total = 0.0
    for k in range(len(moved)):
        total += (moved[k] + shift[k] - t[1 + k]) ** 2
    return h[0] + t[0] - total


def rote(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    return _euclidean(h, r, t, False)


def refe(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    return _euclidean(h, r, t, True)


def _dot(x: Row, y: Row) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def exp_0(v: Row, c: float) -> list[float]:
    """A point of the ball, at most (1 - 1e-5) / sqrt(c) from its centre."""
    size = math.sqrt(c * _dot(v, v))
    return [0.0] * len(v) if size == 0 else [min(math.tanh(size), 1 - 1e-5) * a / size for a in v]


def mobius_add(x: Row, y: Row, c: float) -> list[float]:
    xy, xx, yy = _dot(x, y), _dot(x, x), _dot(y, y)
    below = 1 + 2 * c * xy + c**2 * xx * yy
    return [((1 + 2 * c * xy + c * yy) * a + (1 - c * xx) * b) / below for a, b in zip(x, y, strict=True)]


def project(x: Row, c: float) -> list[float]:
    size = math.sqrt(c * _dot(x, x))
    return [a * min(1.0, (1 - 1e-5) / max(size, 1e-300)) for a in x]


def distance(x: Row, y: Row, c: float) -> float:
    apart = mobius_add([-a for a in x], y, c)
    return 2 / math.sqrt(c) * math.atanh(math.sqrt(c * _dot(apart, apart)))


def less_square(q: Row, t: Row) -> float:
    """What a query (bias, curvature before the softplus, tangent vector) makes of a candidate (bias, coordinates)."""
    c = math.log1p(math.exp(q[1]))
    return q[0] + t[0] - distance(exp_0(q[2:], c), exp_0(t[1:], c), c) ** 2


def _hyperbolic(h: Row, r: Row, t: Row, moved: Row, shift: Row) -> float:
    c = math.log1p(math.exp(r[0]))
    point = project(mobius_add(exp_0(moved, c), exp_0(shift, c), c), c)
    return h[0] + t[0] - distance(point, exp_0(t[1:], c), c) ** 2


def transh(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    return _hyperbolic(h, r, t, h[1:], r[1:])


def disth(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    moved = [a * s for a, s in zip(h[1:], r[1::2], strict=True)]
    return _hyperbolic(h, r, t, moved, r[2::2])


def roth(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    return _hyperbolic(h, r, t, *_isometry(h[1:], r[1:], False))


def refh(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    return _hyperbolic(h, r, t, *_isometry(h[1:], r[1:], True))


def atth(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    turned: list[float] = []
    mirrored: list[float] = []
    attention: list[float] = []
    shift: list[float] = []
    for k in range((len(h) - 1) // 2):
        pair, own = h[1 + 2 * k : 3 + 2 * k], r[1 + 6 * k : 7 + 6 * k]
        turned += _block(pair, own[0], False)
        mirrored += _block(pair, own[1], True)
        attention += own[2:4]
        shift += own[4:6]
    x, y = math.exp(_dot(attention, turned)), math.exp(_dot(attention, mirrored))
    mixed = [(x * a + y * b) / (x + y) for a, b in zip(turned, mirrored, strict=True)]
    return _hyperbolic(h, r, t, mixed, shift)


def hybonet(h: Row, r: Row, t: Row, margin: float, norm: int) -> float:
    size = len(h)  # a bias and coordinates, or a time and coordinates
    start = [math.sqrt(1 + _dot(h[1:], h[1:])), *h[1:]]
    y = [_dot(r[i * size : (i + 1) * size], start) + r[size * size + i] for i in range(size)]
    time = 3.5 / (1 + math.exp(-y[0])) + 1.1
    place = [a * math.sqrt((time**2 - 1) / _dot(y[1:], y[1:])) for a in y[1:]]
    return margin + 2 * (_dot(place, t[1:]) - time * math.sqrt(1 + _dot(t[1:], t[1:]))) + h[0] + t[0]


NAIVE: dict[str, Callable[[Row, Row, Row, float, int], float]] = {
    "transe": transe,
    "distmult": distmult,
    "complex": complex_,
    "simple": simple,
    "rotate": rotate,
    "pairre": pairre,
    "cp": cp,
    "rescal": rescal,
    "rote": rote,
    "refe": refe,
    "transh": transh,
    "disth": disth,
    "roth": roth,
    "refh": refh,
    "atth": atth,
    "hybonet": hybonet,
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
    "rote": lambda dim: 3 * dim // 2,
    "refe": lambda dim: 3 * dim // 2,
    "transh": lambda dim: 1 + dim,
    "disth": lambda dim: 1 + 2 * dim,
    "roth": lambda dim: 1 + 3 * dim // 2,
    "refh": lambda dim: 1 + 3 * dim // 2,
    "atth": lambda dim: 1 + 3 * dim,
    "hybonet": lambda dim: (dim + 1) * (dim + 2),
}
