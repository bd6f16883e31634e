"""The four kinds of relation by which link prediction is usually broken down."""

from __future__ import annotations

import torch
from torch import Tensor

# Bordes et al. 2013, section 4: an average of 1.5 or more counts as "many".
MANY = 1.5


def relation_categories(train: Tensor, num_relations: int) -> list[str]:
    """ "1-1", "1-N", "N-1" or "N-N" for each relation (Bordes et al. 2013, section 4).

    The first letter is "N" when a (relation, tail) pair has on average 1.5 heads or more, the second when a
    (head, relation) pair has on average 1.5 tails or more. A relation without triples is called "1-1".

    train: [n, 3] rows of (head, relation, tail); doubled triples count once.
    """
    if train.ndim != 2 or train.shape[1] != 3:
        raise ValueError(f"train must be [n, 3] rows of (head, relation, tail), got {list(train.shape)}")
    if len(train) and int(train[:, 1].max()) >= num_relations:
        raise ValueError(f"train holds relation {int(train[:, 1].max())}, but num_relations is {num_relations}")
    averages = per_relation(torch.unique(train, dim=0), num_relations)
    many_heads, many_tails = ((average >= MANY).tolist() for average in averages)
    return [f"{'N' if a else '1'}-{'N' if b else '1'}" for a, b in zip(many_heads, many_tails, strict=True)]


def per_relation(triples: Tensor, num_relations: int) -> tuple[Tensor, Tensor]:
    """[num_relations] float64 each: heads of a (relation, tail) pair on average, tails of a (head, relation) pair.

    triples: [n, 3], each once. A relation without any has 0.
    """
    sizes = torch.bincount(triples[:, 1], minlength=num_relations).double()
    span = int(triples.max()) + 1 if len(triples) else 1

    def average(column: int) -> Tensor:
        pairs = torch.unique(triples[:, 1] * span + triples[:, column]) // span
        return sizes / torch.bincount(pairs, minlength=num_relations).clamp(min=1)

    return average(2), average(0)
