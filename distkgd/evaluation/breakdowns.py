"""How a model does where training had little to say: rare relations, and answers that training hardly ever saw."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distkgd.common.metrics import Metrics
from distkgd.data import Graph
from distkgd.data.relations import relation_categories
from distkgd.evaluation.ranking import breakdown, metrics

# MetaSD Table 2: relations with fewer training triples than this are the long tail. The paper counts 187 of FB15k-237's
# 237 relations and 24 % of its training triples; counted here, it is 181 and 22.4 %.
RARE_BELOW = 1000
DEGREES = (0, 1, 3, 10, 100)  # the first degree of every bucket


def in_parts(rank: Tensor, triples: Tensor, graph: Graph, rare_below: int = RARE_BELOW) -> dict[str, Any]:
    """All breakdowns of the ranks of some of a graph's triples: by direction, category, relation, and the long tail.

    rank: [n, 2] as from `ranks_of`. triples: [n, 3] int64.
    """
    categories = relation_categories(graph.train, graph.num_relations)
    names = dict(enumerate(graph.relations.names.to_list()))
    return {
        **breakdown(rank, triples, categories, names),
        "relation_frequency": by_relation_frequency(rank, triples, graph.train, graph.num_relations, rare_below),
        "answer_degree": by_answer_degree(rank, triples, graph.train, graph.num_entities),
    }


def by_relation_frequency(
    rank: Tensor, triples: Tensor, train: Tensor, num_relations: int, rare_below: int = RARE_BELOW
) -> dict[str, Metrics]:
    """Metrics of triples whose relation has fewer than `rare_below` training triples, and of the others.

    num_relations of each is counted over all relations, also those that `triples` lack. Arguments as in `in_parts`.
    """
    common = torch.bincount(train[:, 1], minlength=num_relations) >= rare_below
    which = common[triples[:, 1].to(common.device)].to(rank.device)
    return {
        name: metrics(rank[here]) | {"num_triples": float(here.sum()), "num_relations": float(kinds.sum())}
        for name, here, kinds in ((f"<{rare_below}", ~which, ~common), (f">={rare_below}", which, common))
    }


def by_answer_degree(rank: Tensor, triples: Tensor, train: Tensor, num_entities: int) -> dict[str, Metrics]:
    """Metrics of queries by the number of training triples that hold their answer, in buckets; empty ones are left out.

    A triple is two queries, whose answers are its tail and its head; one that holds an entity twice counts once.
    Arguments as in `in_parts`.
    """
    heads, tails = train[:, 0], train[:, 2]
    others = tails[tails != heads]
    degree = torch.bincount(heads, minlength=num_entities) + torch.bincount(others, minlength=num_entities)
    of_answers = degree[triples[:, [2, 0]].to(degree.device)].to(rank.device)
    out = {}
    for low, high in pairwise((*DEGREES, None)):
        assert low is not None
        here = of_answers >= low
        if high is not None:
            here &= of_answers < high
        if here.any():
            name = f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}"
            out[name] = metrics(rank[here]) | {"num_queries": float(here.sum())}
    return out
