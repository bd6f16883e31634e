"""Entities in 8 bits each number with a scale per row; relations as they are. A model folder: all launchers read it."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from distkgd.distributed.int8_files import write_int8
from distkgd.distributed.model_files import safetensors_header, write_bytes
from distkgd.distributed.ranks import Ranks
from distkgd.evaluate import known_figures, metrics, ranks_of
from distkgd.export.source import Source
from distkgd.graph.filters import KnownAnswers
from distkgd.model_folder import INT8, bytes_on_disk, load_model
from distkgd.paths import AnyPath
from distkgd.predict import data_of

MEASURED = 1000  # valid triples


def write_int8_rows(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.safetensors (see `distributed.int8_files`) and relation.safetensors."""
    entity, relation = source.tables
    write_int8(folder / "entity.safetensors", entity.blocks, entity.shape[0], source.scorer.biases, source.scorer.dim)
    header = safetensors_header({"relation": (relation.tag, relation.shape, relation.size)})
    write_bytes(folder / "relation.safetensors", chain([header], relation.pieces()))
    return {"format": INT8, "files": {table.name: [f"{table.name}.safetensors"] for table in source.tables}}


def cost_of_int8(model: AnyPath, out: AnyPath, ranks: Ranks, dim: int | None = None) -> str:
    """A line: what `out` saves of the model's bytes and loses of its valid MRR, both measured.

    dim: of the crop of `model` that `out` holds. At most 1000 valid triples are ranked, the same of both.
    """
    loaded, small = load_model(model, ranks), load_model(out, ranks)
    full = loaded.model if dim is None else loaded.model.crop(dim)
    before = full.entity.total * full.entity.dim * full.entity.weight.element_size() + full.relation.nbytes
    said = f"8-bit rows: tables of {bytes_on_disk(out):,} bytes instead of {before:,}"
    graph, note = data_of(loaded, str(model), None)
    if graph is None or not len(graph.valid):
        return f"{said}; loss of MRR not measured ({note or f'{graph.name} has no valid triples'})"  # type: ignore[union-attr]
    order = torch.randperm(len(graph.valid), generator=torch.Generator().manual_seed(0))[:MEASURED]
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    valid = graph.valid[order]
    mrr, less = (known_figures(metrics(ranks_of(one, valid, known, ranks)))["mrr"] for one in (full, small.model))
    return f"{said}; MRR of {len(valid):,} valid triples {mrr:.4f} before, {less:.4f} after ({less - mrr:+.4f})"
