"""Rows that a stage leaves where they began, or pulls back there: those of a graph that has grown (`old_rows`)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptRows:
    """Which rows of a table are kept, and how.

    which: [n] bool. first: [n, dim], where they began; None: they stay there, for they never get a gradient.
    weight: of the loss term weight / 2 · |row - first|², which each step adds for every row of which it has a gradient.
    """

    which: Tensor
    first: Tensor | None = None
    weight: float = 0.0

    def pulled(self, rows: Tensor | None, now: Tensor, grad: Tensor, share: float = 1.0) -> Tensor:
        """[m, dim]: the gradient of rows ([m] ascending, None: all) of a table that is `now` [n, dim].

        Of a repeated row the first has the pull. grad: without it; of rows that stay it is overwritten.
        share: this rank's of the pull, where gradients are summed over ranks.
        """
        kept = (self.which if rows is None else self.which[rows]).unsqueeze(1)
        if self.first is None:
            return grad.masked_fill_(kept, 0.0)
        gap = now - self.first if rows is None else now[rows] - self.first[rows]
        if rows is not None and len(rows):
            kept[1:, 0] &= rows[1:] != rows[:-1]
        return grad + torch.where(kept, share * self.weight * gap.to(grad.dtype), 0.0)
