"""What coordinate-wise scorers sum over the coordinates."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from distkgd.kernels import pairs
from distkgd.scorers.interleaved import split_pairs

Parts = tuple[Tensor, ...]


class Term(ABC):
    """φ, summed over coordinates. `kind` is its kernel; the rest works on one tile of the parts of queries
    `[B, Q, 1, k]` and candidates `[B, 1, N, k]`."""

    kind: ClassVar[pairs.Kind]

    def query_parts(self, q: Tensor) -> Parts:
        """`[..., Q, k]` each, of queries `[..., Q, width]`."""
        return (q,)

    def candidate_parts(self, c: Tensor) -> Parts:
        """`[..., N, k]` each, of candidates `[..., N, dim]`."""
        return (c,)

    @abstractmethod
    def value(self, q: Parts, c: Parts) -> Tensor:
        """`[B, Q, N]` Σ_k φ(q_k, c_k). Runs without autograd, so it may work in place on what it made."""

    @abstractmethod
    def pull(self, q: Parts, c: Parts, g: Tensor) -> tuple[Parts, Parts]:
        """Gradients `[B, Q, k]` of query parts and `[B, N, k]` of candidate parts, for g `[B, Q, N, 1]`.

        Written with differentiable operations that keep what they need, for second derivatives.
        """


class Dot(Term):
    """Σ q c."""

    kind = "dot"

    def value(self, q: Parts, c: Parts) -> Tensor:
        return (q[0] * c[0]).sum(-1)

    def pull(self, q: Parts, c: Parts, g: Tensor) -> tuple[Parts, Parts]:
        return ((c[0] * g).sum(2),), ((q[0] * g).sum(1),)


class Square(Term):
    """Σ (q − c)²."""

    kind = "square"

    def value(self, q: Parts, c: Parts) -> Tensor:
        return (q[0] - c[0]).square_().sum(-1)

    def pull(self, q: Parts, c: Parts, g: Tensor) -> tuple[Parts, Parts]:
        pulled = 2.0 * (q[0] - c[0]) * g
        return (pulled.sum(2),), (-pulled.sum(1),)


class Manhattan(Term):
    """Σ |q − c|. The gradient at q = c is 0."""

    kind = "manhattan"

    def value(self, q: Parts, c: Parts) -> Tensor:
        return (q[0] - c[0]).abs_().sum(-1)

    def pull(self, q: Parts, c: Parts, g: Tensor) -> tuple[Parts, Parts]:
        pulled = (q[0] - c[0]).sign() * g
        return (pulled.sum(2),), (-pulled.sum(1),)


class ScaledManhattan(Term):
    """Σ |a − b·c| with queries (a, b) side by side. The gradient where a = b·c is 0."""

    kind = "scaled_manhattan"

    def query_parts(self, q: Tensor) -> Parts:
        return q.tensor_split(2, -1)

    def value(self, q: Parts, c: Parts) -> Tensor:
        return torch.addcmul(q[0], q[1], c[0], value=-1).abs_().sum(-1)

    def pull(self, q: Parts, c: Parts, g: Tensor) -> tuple[Parts, Parts]:
        pulled = torch.addcmul(q[0], q[1], c[0], value=-1).sign() * g
        return (pulled.sum(2), -(pulled * c[0]).sum(2)), (-(pulled * q[1]).sum(1),)


class Modulus(Term):
    """Σ |q − c| over complex numbers, stored (re, im, re, im, …). The gradient at q = c is 0."""

    kind = "modulus"

    def query_parts(self, q: Tensor) -> Parts:
        return split_pairs(q)

    def candidate_parts(self, c: Tensor) -> Parts:
        return split_pairs(c)

    def value(self, q: Parts, c: Parts) -> Tensor:
        re, im = q[0] - c[0], q[1] - c[1]
        return re.square_().addcmul_(im, im).sqrt_().sum(-1)

    def pull(self, q: Parts, c: Parts, g: Tensor) -> tuple[Parts, Parts]:
        re, im = q[0] - c[0], q[1] - c[1]
        square = re.square() + im.square()
        # 1/√inf = 0 with a zero derivative: the direction at distance 0 is 0 instead of 0/0.
        weight = square.masked_fill(square == 0, torch.inf).rsqrt() * g
        re, im = re * weight, im * weight
        return (re.sum(2), im.sum(2)), (-re.sum(1), -im.sum(1))
