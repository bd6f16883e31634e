"""The Poincare ball of curvature -c in float64: maps at 0, Mobius addition, distances by a matrix product.

Points are kept as tangent vectors at 0, which have no edge to fall off. They are moved to the ball where a formula
needs it, at most to (1 - EDGE) / sqrt(c) from its centre, and a gradient that points outwards ends there. Formulas:
Ganea et al. 2018, "Hyperbolic Neural Networks", §2, in the convention of Chami et al. 2020, §3, where the factor 2 of
the metric is left to the distance: exp_0(v) is at distance 2 |v| of 0.
"""

import math

import torch.nn.functional as F
from torch import Tensor

EDGE = 1e-5
_FARTHEST = math.atanh(1.0 - EDGE)  # sqrt(c) |v| of the tangent vectors v at the edge
_SMALLEST_CURVATURE = 1e-8
_TINY = 1e-30  # keeps the gradients of roots at 0 finite


def curvature(raw: Tensor) -> Tensor:
    """c = softplus of any number; no smaller than 1e-8, where space is flat."""
    return F.softplus(raw).clamp_min(_SMALLEST_CURVATURE)


def length(x: Tensor) -> Tensor:
    """`[..., 1]` |x| of `[..., d]`, no smaller than 1e-15; its gradient at 0 is 0."""
    return (x.square().sum(-1, keepdim=True) + _TINY).sqrt()


def translated(v: Tensor, by: Tensor, c: Tensor) -> Tensor:
    """`[..., d]` log_0(exp_0(v) (+) exp_0(by)): Mobius translation of a tangent vector, c `[..., 1]`.

    With exp_0(v) = tanh(a) v / (sqrt(c) |v|), a = sqrt(c) |v|, and likewise b for `by`,

        x (+) y = ((1 + 2c x·y + c |y|^2) x + (1 - c |x|^2) y) / (1 + 2c x·y + c^2 |x|^2 |y|^2)

    has a numerator and a denominator that lose all digits near the edge. Times cosh^2 a cosh^2 b they are sums of
    products of hyperbolic functions; the denominator is then cosh^2 of the sum's hyperbolic angle.
    """
    root = c.sqrt()
    v_length, by_length = length(v), length(by)
    a, b = (root * v_length).clamp_max(_FARTHEST), (root * by_length).clamp_max(_FARTHEST)
    (sinh_a, cosh_a), (sinh_b, cosh_b) = ((x.sinh(), x.cosh()) for x in (a, b))
    x, y = v * (sinh_a / v_length), by * (sinh_b / by_length)
    xy = (x * y).sum(-1, keepdim=True)
    square = sinh_a.square() + sinh_b * ((1.0 + 2.0 * sinh_a.square()) * sinh_b) + 2.0 * cosh_a * cosh_b * xy
    square = square.clamp_min(_TINY)
    above = (cosh_a * (cosh_b.square() + sinh_b.square()) + 2.0 * cosh_b * xy) * x + cosh_b * y
    return above * (square.sqrt().asinh().clamp_max(_FARTHEST) / (root * (square * (1.0 + square)).sqrt()))


def squared_distances(u: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`[..., Q, N]` d(exp_0(u), exp_0(v))^2 with d(x, y) = 2 / sqrt(c) artanh(sqrt(c) |-x (+) y|).

    u: [..., Q, d], c: [..., Q, 1], v: [..., N, d]; all float64.

    The norm of -x (+) y needs only |x|, |y| and x·y. With hyperbolic angles a = sqrt(c) |u|, b = sqrt(c) |v| and theta
    between u and v, the half distance D = sqrt(c) d / 2 has

        sinh^2 D = sinh^2 a + sinh b ((1 + 2 sinh^2 a) sinh b - 2 sinh a cosh a cos(theta) cosh b)

    which has no argument that could round to 1, as that of artanh can. d^2 is smooth in it, at 0 too.
    """
    root = c.sqrt()
    u_length, v_length = length(u), length(v)
    a = (root * u_length).clamp_max(_FARTHEST)
    sinh_a = a.sinh()
    b = (root * v_length.mT).clamp_max(_FARTHEST)
    sinh_b, cosh_b = b.sinh(), b.cosh()
    across = (u * (2.0 * sinh_a * a.cosh() / u_length)) @ (v / v_length).mT
    square = sinh_a.square() + sinh_b * ((1.0 + 2.0 * sinh_a.square()) * sinh_b - across * cosh_b)
    return (4.0 / c) * square.clamp_min(_TINY).sqrt().asinh().square()
