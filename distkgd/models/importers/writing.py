"""A model of another library as a model folder, written block by block, its rows in the order of a graph's names."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from distkgd.data import Graph, Vocabulary
from distkgd.data.triples import words_of
from distkgd.distributed.checkpoint.tables import TAGS, atomic_folder, safetensors_header, write_bytes
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.models.importers.foreign import ROWS_AT_ONCE, Foreign, finite_rows
from distkgd.models.model_folder import FORMAT, sha256_of, write_names


def write_model(model: Foreign, out: Path, ranks: Ranks, graph: Graph | None, data: str) -> list[str]:
    """Write `out`, which appears only when it is complete, and return what became of unknown names.

    Entities that the graph has and the model lacks get the mean of all rows where no training triple holds them; one
    that has any is an error. All ranks call it, the first one writes.
    """
    notes: list[str] = []
    with atomic_folder(out, ranks) as folder:
        if ranks.first:
            notes += _write(model, folder, graph, data)
    return notes


def _write(model: Foreign, folder: Path, graph: Graph | None, data: str) -> list[str]:
    notes: list[str] = []
    entities = torch.arange(len(model.entities))
    relations = torch.arange(len(model.relations))
    words = Vocabulary(model.entities), Vocabulary(model.relations)
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
        relations = torch.cat([relations, relations + len(model.relations)])
    tables: dict[Literal["entity", "relation"], Tensor] = {"entity": entities, "relation": relations}
    widths = {"entity": model.scorer.entity_size, "relation": model.scorer.relation_size}
    for name, ids in tables.items():
        size = len(ids) * widths[name] * model.dtype.itemsize
        header = safetensors_header({name: (TAGS[model.dtype], [len(ids), widths[name]], size)})
        written = write_bytes(folder / f"{name}.safetensors", chain([header], _bytes(model, name, ids, widths[name])))
        if written != len(header) + size:
            raise ModelError(
                f"{model.library}: rows of {name} are not {widths[name]} numbers wide, which {model.scorer} needs."
            )
    files = {name: [f"{name}.safetensors"] for name in tables}
    config = {
        "format": FORMAT,
        "scorer": model.scorer.constants(),
        "num_entities": len(entities),
        "num_relations": len(words[1]),
        "reciprocal": model.reciprocal,
        "dtype": str(model.dtype).removeprefix("torch."),
        "files": files,
        "sha256": {file: sha256_of(folder / file) for (file,) in files.values()},
        "imported_from": model.library,
        **about,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_names(folder, "entities", "entity_labels", words[0])
    write_names(folder, "relations", "relation_labels", words[1])
    return notes


def _bytes(model: Foreign, table: Literal["entity", "relation"], ids: Tensor, width: int) -> Iterator[bytes]:
    """The rows `ids` of a table, block by block; the mean of all rows for -1. ModelError where one is not finite."""
    mean = torch.zeros(width, dtype=model.dtype)
    if (ids < 0).any():
        total = torch.zeros(width, dtype=torch.float64)
        for block in torch.arange(len(model.entities)).split(ROWS_AT_ONCE):
            total += finite_rows(model, table, block).double().sum(0)
        mean = (total / len(model.entities)).to(model.dtype)
    for block in ids.split(ROWS_AT_ONCE):
        found = finite_rows(model, table, block.clamp_min(0))
        found = torch.where((block < 0).unsqueeze(1), mean, found)
        yield found.contiguous().view(torch.uint8).numpy().tobytes()


def _entity_rows(model: Foreign, graph: Graph) -> tuple[Tensor, list[str]]:
    """[num_entities] row of each of the graph's entities in the model, -1 for none, and what to say of it."""
    rows = _rows_of(graph.entities.names, model.entities)
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
    if (extra := len(model.entities) - int((rows >= 0).sum())) > 0:
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
    rows = _rows_of(graph.relations.names, model.relations)
    if (rows < 0).any():
        missing = [graph.relations.name(int(i)) for i in (rows < 0).nonzero().flatten()]
        raise ModelError(f"the model lacks {len(missing)} relations of {graph.name}: {', '.join(missing[:5])}.")
    return rows


def _rows_of(wanted: pl.Series, names: pl.Series) -> Tensor:
    table = pl.DataFrame({"name": names, "row": pl.int_range(len(names), eager=True)})
    found = pl.DataFrame({"name": wanted}).join(table, on="name", how="left", maintain_order="left")["row"]
    return torch.from_numpy(found.fill_null(-1).to_numpy().copy())
