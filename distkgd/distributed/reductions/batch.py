"""What normalises over the global batch: its queries are spread over ranks, a handful of numbers makes them one."""

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks


def batch_softmax(scores: Tensor, slope: Tensor, ranks: Ranks) -> Tensor:
    """[P, Q]: each query's share of the global batch under softmax(slope * scores), for each of P rows.

    scores: [P, Q] of this rank's queries, without gradient. slope: [], the same on all ranks; it may take a gradient,
    of which each rank gets the part that its own queries cause. Every rank tells the others 2 P numbers.
    """
    with torch.no_grad():
        logit = slope * scores
        lse = torch.logsumexp(logit, 1)
        mean = (torch.exp(logit - lse.unsqueeze(1)) * scores).sum(1)
        told = ranks.gather(torch.cat([lse, mean]).unsqueeze(0), [1] * ranks.world, "control")
        every_lse, every_mean = told.chunk(2, 1)
        lse = torch.logsumexp(every_lse, 0)
        mean = (torch.exp(every_lse - lse) * every_mean).sum(0)
        shift = slope * mean - lse
    # d share / d slope = share * (score - mean): the mean stands where it makes the normaliser's gradient.
    return torch.exp(slope * (scores - mean.unsqueeze(1)) + shift.unsqueeze(1))
