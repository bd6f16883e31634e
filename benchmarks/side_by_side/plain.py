"""The same work in plain torch, as one would write it without a library, where the peers have nothing to compare with.

1-vs-all: PyKEEN's LCWA loop builds [batch, entities, dim] for distances and a [pairs, entities] label matrix for all;
the plain step below is leaner: softmax cross entropy over `nn.Embedding` tables with autograd and dense Adagrad.
RotatE's [queries, entities, dim] would not fit either, so its candidates come in checkpointed blocks.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from benchmarks.side_by_side.data import graph_of
from benchmarks.side_by_side.ours import Options, Round, checkpoint_tensors

BLOCK_NUMBERS = 1 << 25  # of a block of RotatE's differences


def complex_scores(anchor: Tensor, relation: Tensor, entities: Tensor) -> Tensor:
    """[Q, N]; numbers are stored (re, …, im, …)."""
    (a_re, a_im), (r_re, r_im) = anchor.chunk(2, 1), relation.chunk(2, 1)
    return torch.cat([a_re * r_re - a_im * r_im, a_re * r_im + a_im * r_re], 1) @ entities.T


def transe_scores(anchor: Tensor, relation: Tensor, entities: Tensor) -> Tensor:
    """[Q, N]: 9 - L1 distance."""
    return 9.0 - torch.cdist(anchor + relation, entities, p=1)


def rotate_scores(anchor: Tensor, relation: Tensor, entities: Tensor) -> Tensor:
    """[Q, N]: 9 - sum of moduli, in blocks of candidates that are computed again in backward."""
    (a_re, a_im), cos, sin = anchor.chunk(2, 1), relation.cos(), relation.sin()
    query = torch.stack([a_re * cos - a_im * sin, a_re * sin + a_im * cos], -1)
    candidates = torch.stack(entities.chunk(2, 1), -1)

    def block(rows: Tensor) -> Tensor:
        moduli: Tensor = torch.linalg.vector_norm(query.unsqueeze(1) - rows, dim=-1)
        return 9.0 - moduli.sum(-1)

    width = max(1, BLOCK_NUMBERS // query.numel())
    return torch.cat([recomputed(block, rows, use_reentrant=False) for rows in candidates.split(width)], 1)


SCORES = {"complex": complex_scores, "transe": transe_scores, "rotate": rotate_scores}


def one_vs_all(options: Options) -> Round:
    """Cross entropy of both queries of each triple against all entities, per positive triple."""
    graph, dim, batch = graph_of(options["source"]), options["dim"], options["batch"]
    score = SCORES[options["scorer"]]
    entity = nn.Embedding(graph.num_entities, dim)
    relation = nn.Embedding(2 * graph.num_relations, dim // 2 if options["scorer"] == "rotate" else dim)
    for table in (entity, relation):
        nn.init.normal_(table.weight, std=0.1)
    optimizer = torch.optim.Adagrad([entity.weight, relation.weight], lr=0.1)
    at = 0

    def run() -> dict[str, float]:
        nonlocal at
        started = time.perf_counter()
        for _ in range(options["steps"]):
            at = at if at + batch <= len(graph.train) else 0
            head, r, tail = graph.train[at : at + batch].unbind(1)
            at += batch
            optimizer.zero_grad()
            rows = relation(torch.cat([r, r + graph.num_relations]))
            scores = score(entity(torch.cat([head, tail])), rows, entity.weight)
            F.cross_entropy(scores, torch.cat([tail, head])).backward()
            optimizer.step()
        return {"seconds": (time.perf_counter() - started) / (options["steps"] * batch)}

    run()
    return run


def checkpoint(options: Options) -> Round:
    """torch.save of the same tensors, made durable, per byte; training waits for all of it."""
    folder = tempfile.TemporaryDirectory(prefix="distkgd-bench-")
    tables = checkpoint_tensors(options)
    size = sum(x.nbytes for x in tables.values())

    def run() -> dict[str, float]:
        started = time.perf_counter()
        with (Path(folder.name) / "checkpoint.pt").open("wb") as file:
            torch.save(tables, file)
            file.flush()
            os.fsync(file.fileno())
        seconds = (time.perf_counter() - started) / size
        return {"seconds": seconds, "blocked": seconds}

    run()
    return run


ARMS: Mapping[str, Callable[[Options], Round]] = {"one_vs_all": one_vs_all, "checkpoint": checkpoint}
