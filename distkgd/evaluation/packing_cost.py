"""What rows of few bits save in bytes and lose in MRR."""

import torch

from distkgd.common.metrics import known_figures
from distkgd.common.paths import AnyPath
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.prediction import data_of
from distkgd.evaluation.ranking import metrics, ranks_of
from distkgd.models.model_folder import bytes_on_disk, load_model

MEASURED = 1000  # valid triples


def cost_of_packing(model: AnyPath, out: AnyPath, ranks: Ranks, dim: int | None = None) -> str:
    """A line: what `out` saves of the model's bytes and loses of its valid MRR, both measured.

    dim: of the crop of `model` that `out` holds. At most 1000 valid triples are ranked, the same of both.
    """
    loaded, small = load_model(model, ranks), load_model(out, ranks)
    full = loaded.model if dim is None else loaded.model.crop(dim)
    before = full.entity.total * full.entity.dim * full.entity.shard.dtype.itemsize + full.relation.nbytes
    after = bytes_on_disk(out)
    said = f"packed: tables of {after:,} bytes ({after / full.entity.total:,.1f} per entity) instead of {before:,}"
    graph, note = data_of(loaded, str(model), None)
    if graph is None or not len(graph.valid):
        return f"{said}; loss of MRR not measured ({note or f'{graph.name} has no valid triples'})"  # type: ignore[union-attr]
    order = torch.randperm(len(graph.valid), generator=torch.Generator().manual_seed(0))[:MEASURED]
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    valid = graph.valid[order]
    mrr, less = (known_figures(metrics(ranks_of(one, valid, known, ranks)))["mrr"] for one in (full, small.model))
    return f"{said}; MRR of {len(valid):,} valid triples {mrr:.4f} before, {less:.4f} after ({less - mrr:+.4f})"
