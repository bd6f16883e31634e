"""The Poincare ball of curvature -c in float64: Mobius addition, distances by a matrix product.

Points are tangent vectors at 0, which have no edge to fall off, and stand for exp_0 of themselves. What would be
further than (1 - EDGE) / sqrt(c) from the ball's centre counts as there, and has no gradient outwards. Formulas:
Ganea et al. 2018, "Hyperbolic Neural Networks", §2, in the convention of Chami et al. 2020, §3, where the factor 2 of
the metric is left to the distance: exp_0(v) is at distance 2 |v| of 0.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.kernels.candidates import GatheredRows
from distkgd.scorers.hyperbolic.isometries import of_listed
from distkgd.scorers.sums.tiles import pair_sums

EDGE = 1e-5
_FARTHEST = math.atanh(1.0 - EDGE)  # sqrt(c) |v| of the tangent vectors v at the edge
_SMALLEST_CURVATURE = 1e-6
_NEAREST = 1.0 + 1e-15  # cosh of the smallest distance
_BLOCK_NUMBERS = 1 << 15  # pairs of a query and a candidate that fit the cache of a CPU


def curvature(raw: Tensor) -> Tensor:
    """c = softplus of any number; no smaller than 1e-6, where space is flat."""
    return F.softplus(raw).clamp_min(_SMALLEST_CURVATURE)


def length(x: Tensor) -> Tensor:
    """`[..., 1]` |x| of `[..., d]`, no smaller than 1e-8; its gradient at 0 is 0.

    A shorter vector over its length is shorter than 1, and so nothing is lost: 1e-8 times it has the right derivative,
    and cosh(1e-8) = 1.
    """
    return (x.square().sum(-1, keepdim=True) + 1e-16).sqrt()


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
    square = square.clamp_min(1e-30)  # the root's gradient at 0 is infinite
    above = (cosh_a * (cosh_b.square() + sinh_b.square()) + 2.0 * cosh_b * xy) * x + cosh_b * y
    return above * (square.sqrt().asinh().clamp_max(_FARTHEST) / (root * (square * (1.0 + square)).sqrt()))


def squared_distances(u: Tensor, v: Tensor | GatheredRows, c: Tensor) -> Tensor:
    """`[..., Q, N]` d(exp_0(u), exp_0(v))^2 with d(x, y) = 2 / sqrt(c) artanh(sqrt(c) |-x (+) y|).

    u: [..., Q, d], c: [..., Q, 1], v: [..., N, d], copied or listed; all float64.

    The norm of -x (+) y needs only |x|, |y| and x·y. With a = sqrt(c) |u|, b = sqrt(c) |v| and theta between u and v,

        cosh(sqrt(c) d) = cosh 2a cosh 2b - cos(theta) sinh 2a sinh 2b

    has no argument that could round to 1, as that of artanh can. The differences of near points are lost to 1e-16 / c,
    in d^2. That is a smooth function of the right side, also where d = 0.
    """
    root, u_length = c.sqrt(), length(u)
    a = 2.0 * (root * u_length).clamp_max(_FARTHEST)
    stretched = u * (a.sinh() / u_length)
    if isinstance(v, GatheredRows):
        v_length = of_listed(length(v.table), v.index)
        product = pair_sums("dot", stretched, v) / v_length
    else:
        v_length = length(v).mT
        product = stretched @ (v.mT / v_length)
    squares: Tensor = _Squares.apply(product, a.cosh(), root, v_length)  # type: ignore[no-untyped-call]
    return squares


def _cosh(product: Tensor, wide: Tensor, root: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # cosh(sqrt(c) d) in two halves, and exp(2b): wide = cosh 2a, product = cos(theta) sinh 2a.
    grown = (2.0 * root * lengths).clamp_max(2.0 * _FARTHEST).exp()
    return 0.5 * (wide - product) * grown, 0.5 * (wide + product) / grown, grown


def _squares(product: Tensor, wide: Tensor, root: Tensor, lengths: Tensor) -> Tensor:
    # d^2, by operations that autograd knows.
    out, back, _ = _cosh(product, wide, root, lengths)
    return ((out + back).clamp_min(_NEAREST).acosh() / root).square()


class _Squares(torch.autograd.Function):
    """`_squares`, block by block in the cache; nothing but its arguments is kept for backward."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, wide: Tensor, root: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(product, wide, root, lengths)
        result = torch.empty_like(product)
        for rows in _blocks(product):
            cut, own, by = _cut(rows, product, wide, root)
            out, back, _ = _cosh(cut, own, by, lengths)
            angle, _ = _acosh(out.add_(back))
            result[..., rows, :] = angle.div_(by).square_()
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        product, wide, root, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted
            again = _squares(product, wide, root, lengths)
            return torch.autograd.grad(again, (product, wide, root, lengths), grads[0], create_graph=True)
        found = torch.empty_like(product)
        of_wide, of_root = (torch.empty_like(product[..., :1]) for _ in range(2))
        of_lengths = torch.zeros_like(product[..., :1, :])
        for rows in _blocks(product):
            cut, own, by, g = _cut(rows, product, wide, root, grads[0])
            out, back, grown = _cosh(cut, own, by, lengths)
            angle, sinh = _acosh(out + back)
            # d^2 = angle^2 / root^2; slope: times the gradient, by cosh(angle).
            of_itself = (angle.square() * g).sum(-1, keepdim=True) * (-2.0 / by**3)
            slope = angle.mul_(g).div_(sinh).mul_(2.0 / by.square())
            down = 1.0 / grown
            found[..., rows, :] = 0.5 * slope * (down - grown)
            of_wide[..., rows, :] = 0.5 * (slope * down.add_(grown)).sum(-1, keepdim=True)
            by_angle = out.sub_(back).mul_(slope).mul_(2.0 * (2.0 * by * lengths < 2.0 * _FARTHEST))
            of_root[..., rows, :] = of_itself + (by_angle * lengths).sum(-1, keepdim=True)
            of_lengths += (by_angle * by).sum(-2, keepdim=True)
        like = (product, wide, root, lengths)
        every = (found, of_wide, of_root, of_lengths)
        return tuple(x.sum_to_size(y.shape) for x, y in zip(every, like, strict=True))


def _acosh(cosh: Tensor) -> tuple[Tensor, Tensor]:
    # The angle and its sinh, of values that rounding may have put below 1; in place.
    cosh.clamp_min_(_NEAREST)
    sinh = (cosh * cosh).sub_(1.0).sqrt_()
    return cosh.add_(sinh).log_(), sinh


def _blocks(product: Tensor) -> Iterator[slice]:
    # Ranges of queries; depends on shapes and device only.
    numbers = _BLOCK_NUMBERS if product.device.type == "cpu" else product.numel()
    step = max(1, numbers * product.shape[-2] // max(1, product.numel()))
    for start in range(0, product.shape[-2], step):
        yield slice(start, start + step)


def _cut(rows: slice, *tensors: Tensor) -> list[Tensor]:
    return [x[..., rows, :] for x in tensors]
