"""Writes soft labels (`distkgd.data.soft_labels`): the best answers of finished models to each training query."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.common.paths import AnyPath, check_folder
from distkgd.data import Graph, load_graph
from distkgd.data.filters import Queries
from distkgd.data.soft_labels import FILES, training_queries, write_about
from distkgd.distributed.checkpoint.tables import atomic_folder
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.methods.losses.teachers import one_scale
from distkgd.models.model import Model
from distkgd.models.model_folder import load_model, same_vocabulary

QUERIES_AT_ONCE = 128


def scores_of(model: Model, queries: Queries) -> Tensor:
    """[Q, entities]: a model's scores of all answers, in one process."""
    rows = model.entity.weight
    relation = F.embedding(model.relation_ids(queries), model.relations)
    found: Tensor = model.scorer.score_candidates(model.project(queries, rows[queries.anchor], relation), rows)
    return found


def averaged(scores: Sequence[Tensor], weights: Sequence[float], normalise: str) -> Tensor:
    """[Q, entities]: the weighted mean of models' scores of all entities ([Q, entities] each), as `mulde` takes it.

    With normalise zscore but for a number that all scores of a query have alike.
    """
    shares = [w / sum(weights) for w in weights]
    factors: Sequence[Tensor | float] = [1.0] * len(scores)
    if normalise == "zscore":
        mean, deviation = (torch.stack(x, 1) for x in zip(*((z.mean(1), z.std(1)) for z in scores), strict=True))
        factors = one_scale(mean, deviation, shares)[0].unsqueeze(2).unbind(1)
    return torch.stack([f * w * z for f, w, z in zip(factors, shares, scores, strict=True) if w]).sum(0)


@torch.no_grad()
def write_labels(
    models: Sequence[AnyPath],
    out: AnyPath,
    *,
    k: int,
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
    normalise: str = "none",
    data: str | None = None,
) -> int:
    """Write the k best answers to each training query, by the weighted mean of finished models' scores; -> queries.

    out: a folder that does not exist yet. data: default: what the first model was trained on.
    """
    out, ranks = Path(out), Ranks()
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or not all(0 <= w < math.inf for w in weights) or not sum(weights):
        raise ConfigError(
            f"weights must be one finite number for each model, not all 0: {len(weights)} for {len(models)}."
        )
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be above 0, not {temperature}.")
    if out.exists():
        raise ConfigError(f"{out} exists; name a folder that does not exist yet, or remove this one.")
    check_folder(out, "the folder")
    loaded = [load_model(folder, ranks) for folder in models]
    graph: Graph = load_graph(data or str(loaded[0].config["source"]))
    for folder, one in zip(models, loaded, strict=True):
        same_vocabulary(one, graph, str(folder))
    asked, k = training_queries(graph), min(k, graph.num_entities)
    shapes = dict(zip(FILES, [(len(asked), 3), (len(asked), k), (len(asked), k), (len(asked),)], strict=True))
    kinds = dict(zip(FILES, ("<i8", "<i4", "<f4", "<f4"), strict=True))
    teachers = [one.model.widened() for one in loaded]
    with atomic_folder(out, ranks) as folder:
        files = {n: np.lib.format.open_memmap(folder / f"{n}.npy", "w+", kinds[n], shapes[n]) for n in FILES}
        files["queries"][:] = asked.numpy()
        for lo in range(0, len(asked), QUERIES_AT_ONCE):
            relation, side, anchor = asked[lo : lo + QUERIES_AT_ONCE].unbind(1)
            queries = Queries(anchor, relation, side, anchor)
            scores = averaged([scores_of(model, queries) for model in teachers], weights, normalise) / temperature
            best = scores.topk(k, 1)
            rows = slice(lo, lo + len(anchor))
            files["entities"][rows], files["logits"][rows] = best.indices.numpy(), best.values.numpy()
            others = scores.scatter_(1, best.indices, -torch.inf)
            files["rest"][rows] = torch.logsumexp(others, 1).numpy()
        for file in files.values():
            file.flush()
        about = {"k": k, "models": [str(one) for one in models], "weights": weights, "normalise": normalise}
        write_about(folder, graph, temperature, about)
    return len(asked)
