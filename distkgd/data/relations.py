"""The four kinds of relation by which link prediction is usually broken down."""

from __future__ import annotations

import torch

# Bordes et al. 2013, section 4: an average of 1.5 or more counts as "many".
MANY = 1.5


def relation_categories(train: torch.Tensor, num_relations: int) -> list[str]:
    """ "1-1", "1-N", "N-1" or "N-N" for each relation (Bordes et al. 2013, section 4).

    The first letter is "N" when a (relation, tail) pair has on average 1.5 heads or more, the second when a
    (head, relation) pair has on average 1.5 tails or more. A relation without triples is called "1-1".

    train: [n, 3] rows of (head, relation, tail); doubled triples count once.
    """
    if train.ndim != 2 or train.shape[1] != 3:
        raise ValueError(f"train must be [n, 3] rows of (head, relation, tail), got {list(train.shape)}")
    if len(train) and int(train[:, 1].max()) >= num_relations:
        raise ValueError(f"train holds relation {int(train[:, 1].max())}, but num_relations is {num_relations}")
    triples = torch.unique(train, dim=0)
    num_triples = torch.bincount(triples[:, 1], minlength=num_relations)
    heads_per_tail = num_triples / _distinct(triples[:, [1, 2]], num_relations)
    tails_per_head = num_triples / _distinct(triples[:, [1, 0]], num_relations)
    return [
        f"{'N' if many_heads else '1'}-{'N' if many_tails else '1'}"
        for many_heads, many_tails in zip(
            (heads_per_tail >= MANY).tolist(), (tails_per_head >= MANY).tolist(), strict=True
        )
    ]


def _distinct(pairs: torch.Tensor, num_relations: int) -> torch.Tensor:
    """[num_relations] distinct entities per relation; at least 1, so that none divides to 0.

    pairs: [n, 2] rows of (relation, entity).
    """
    span = int(pairs[:, 1].max()) + 1 if len(pairs) else 1
    keys = torch.unique(pairs[:, 0] * span + pairs[:, 1])
    return torch.bincount(keys // span, minlength=num_relations).clamp(min=1)
