"""What coordinate-wise scorers sum over the coordinates, φ(q, c), in plain torch, for one tile of pairs.

dot: q c. square: (q − c)². manhattan: |q − c|. scaled_manhattan: |a − b·c| with queries (a, b) side by side. modulus:
|q − c| of complex numbers, stored (re, im, re, im, …). Where φ is not smooth its gradient is 0.
"""

import torch
from torch import Tensor

from distkgd.kernels.pairs import Kind
from distkgd.scorers.interleaved import as_complex


def summed(term: Kind, q: Tensor, c: Tensor) -> Tensor:
    """`[B, Q, N]` Σ_k φ(q_k, c_k) of queries `[B, Q, width]` and candidates `[B, N, dim]`, without a gradient."""
    q, c = q.unsqueeze(2), c.unsqueeze(1)
    match term:
        case "dot":
            return (q * c).sum(-1)
        case "square":
            return (q - c).square_().sum(-1)
        case "manhattan":
            return (q - c).abs_().sum(-1)
        case "scaled_manhattan":
            a, b = q.tensor_split(2, -1)
            return torch.addcmul(a, b, c, value=-1).abs_().sum(-1)
        case "modulus":
            return as_complex(q - c).abs().sum(-1)


def pulled(term: Kind, q: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, Q, width]` and `[B, N, dim]`: gradients of `summed` for `[B, Q, N]` of the sums; differentiable."""
    q, c, grad = q.unsqueeze(2), c.unsqueeze(1), grad.unsqueeze(-1)
    match term:
        case "dot":
            return (c * grad).sum(2), (q * grad).sum(1)
        case "scaled_manhattan":
            a, b = q.tensor_split(2, -1)
            down = torch.addcmul(a, b, c, value=-1).sign_() * grad
            return torch.cat([down.sum(2), -(down * c).sum(2)], -1), -(down * b).sum(1)
        case "square":
            slope = 2.0 * (q - c)
        case "manhattan":
            slope = (q - c).sign_()
        case "modulus":
            slope = torch.view_as_real(as_complex(q - c).sgn_()).flatten(-2)
    down = slope * grad
    return down.sum(2), -down.sum(1)
