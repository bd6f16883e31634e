"""A model of another library as a model folder, written block by block, its rows in the order of a graph's names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from distkgd.data import Graph, Vocabulary
from distkgd.data.triples import rows_of, words_of
from distkgd.distributed.checkpoint.tables import TAGS, atomic_folder, safetensors_header, write_bytes
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.models.importers.foreign import ROWS_AT_ONCE, Foreign, Table
from distkgd.models.model_folder import FORMAT, sha256_of, write_names


def write_model(model: Foreign, out: Path, ranks: Ranks, graph: Graph | None, data: str) -> list[str]:
    """Write `out`, which appears only when it is complete, and return what became of unknown names.

    Entities that the graph has and the model lacks get the mean of all rows where no training triple holds them; one
    that has any is an error. All ranks call it, the first one writes.
    """
    with atomic_folder(out, ranks) as folder:
        return _write(model, folder, graph, data) if ranks.first else []


def _write(model: Foreign, folder: Path, graph: Graph | None, data: str) -> list[str]:
    notes: list[str] = []
    entities, relations = (torch.arange(len(names)) for names in model.names)
    words = tuple(map(Vocabulary, model.names))
    about: dict[str, Any] = {"source": data}
    if graph is not None:
        entities, notes = _entity_rows(model, graph)
        relations = _relation_rows(model, graph)
        words = graph.entities, graph.relations
        about["data"] = graph.summary()
        if model.trained is not None:
            about["trained_on_held_out"] = seen = held_out_among(model.trained(), graph)
            notes += [
                f"{num:,} {split} triples of {graph.name} are among its training triples"
                for split, num in seen.items()
                if num
            ]
    if model.reciprocal:
        relations = torch.cat([relations, relations + len(model.names[1])])
    tables: dict[Table, Tensor] = {"entity": entities, "relation": relations}
    for name, ids in tables.items():
        write_bytes(folder / f"{name}.safetensors", _bytes(model, name, ids))
    files = {name: [f"{name}.safetensors"] for name in tables}
    config = {
        "format": FORMAT,
        "scorer": model.scorer.constants(),
        "num_entities": len(entities),
        "num_relations": len(words[1]),
        "reciprocal": model.reciprocal,
        "dtype": str(model.entity.dtype).removeprefix("torch."),
        "files": files,
        "sha256": {file: sha256_of(folder / file) for (file,) in files.values()},
        "imported_from": model.library,
        **about,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_names(folder, "entities", "entity_labels", words[0])
    write_names(folder, "relations", "relation_labels", words[1])
    return notes


def _bytes(model: Foreign, table: Table, ids: Tensor) -> Iterator[bytes]:
    """A file with the rows `ids` of a table; the mean of all rows for -1. ModelError where one is not finite."""
    dtype = model.entity.dtype
    width = model.scorer.entity_size if table == "entity" else model.scorer.relation_size
    yield safetensors_header({table: (TAGS[dtype], [len(ids), width], len(ids) * width * dtype.itemsize)})
    mean = torch.zeros(width, dtype=torch.float64)
    if (ids < 0).any():
        for block in torch.arange(len(model.entity)).split(ROWS_AT_ONCE):
            mean += model.finite_rows(table, block).double().sum(0) / len(model.entity)
    for block in ids.split(ROWS_AT_ONCE):
        found = model.finite_rows(table, block.clamp_min(0))
        found = torch.where((block < 0).unsqueeze(1), mean.to(dtype), found)
        yield found.contiguous().view(torch.uint8).numpy().tobytes()


def _entity_rows(model: Foreign, graph: Graph) -> tuple[Tensor, list[str]]:
    """[num_entities] row of each of the graph's entities in the model, -1 for none, and what to say of it."""
    rows = _rows_of(graph.entities, model.names[0])
    missing = (rows < 0).nonzero().flatten()
    trained = torch.isin(missing, graph.train[:, [0, 2]])
    if trained.any():
        names = ", ".join(repr(graph.entities.name(int(i))) for i in missing[trained][:3])
        raise ModelError(
            f"the model lacks {int(trained.sum()):,} entities that {graph.name} has training triples of ({names} …); "
            "it was trained on other data, or its names are written otherwise."
        )
    notes = []
    if len(missing):
        notes.append(
            f"{len(missing):,} entities without training triples are unknown to the model; they get its mean row"
        )
    if (extra := len(model.entity) - int((rows >= 0).sum())) > 0:
        notes.append(f"{extra:,} entities of the model are not in {graph.name}; they are left out")
    return rows, notes


def held_out_among(trained: pl.DataFrame, graph: Graph) -> dict[str, int]:
    """How many of the graph's valid and of its test triples are among `trained`, names of head, relation and tail."""
    found = {}
    for split, triples in (("valid", graph.valid), ("test", graph.test)):
        words = words_of(triples, graph.entities.names, graph.relations.names)
        found[split] = len(words.join(trained, on=words.columns, how="semi"))
    return found


def _relation_rows(model: Foreign, graph: Graph) -> Tensor:
    rows = _rows_of(graph.relations, model.names[1])
    if (rows < 0).any():
        missing = [graph.relations.name(int(i)) for i in (rows < 0).nonzero().flatten()]
        raise ModelError(f"the model lacks {len(missing)} relations of {graph.name}: {', '.join(missing[:5])}.")
    return rows


def _rows_of(wanted: Vocabulary, names: pl.Series) -> Tensor:
    return torch.from_numpy(rows_of(wanted.names, names).cast(pl.Int64).fill_null(-1).to_numpy().copy())
