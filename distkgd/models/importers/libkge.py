"""Checkpoints and packages of LibKGE (uma-pi1/kge): one .pt file with a state dict and the configuration.

Read without LibKGE and without running what the file says: its class `Config` is read as plain attributes. Models:
ComplEx, DistMult, RESCAL, TransE, RotatE, CP, SimplE, alone or under a ReciprocalRelationsModel; pairs of numbers in
halves. A package holds the names; a training checkpoint needs entity_ids.del and relation_ids.del beside it.
"""

from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from distkgd.errors import ModelError, UnsupportedError
from distkgd.models.importers.foreign import Foreign, Given, in_pairs, interleaved, read_names
from distkgd.models.importers.torch_files import load_tensors
from distkgd.scorers import build_scorer

MODELS = {
    "complex": "complex",
    "distmult": "distmult",
    "rescal": "rescal",
    "transe": "transe",
    "rotate": "rotate",
    "cp": "cp",
    "simple": "simple",
}
TABLES = ("_entity_embedder._embeddings.weight", "_relation_embedder._embeddings.weight")


class Config:
    """Stands for kge.config.Config, of which only `options` is used."""

    options: dict[str, Any]


def open_libkge(path: Path, given: Given) -> Foreign:
    """The model in the file `path`."""
    checkpoint = load_tensors(path, [(Config, "kge.config.Config")])
    try:
        options, state = checkpoint["config"].options, checkpoint["model"][0]
        model, reciprocal = str(options["model"]), options["model"] == "reciprocal_relations_model"
        if reciprocal:
            model = str(options[model]["base_model"]["type"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is no checkpoint of LibKGE: it lacks {error}.") from None
    if model not in MODELS:
        raise UnsupportedError(f"{path}: LibKGE's {model} has no counterpart here; supported are {', '.join(MODELS)}.")
    entity, relation = (_table(state, name, path) for name in TABLES)
    scorer = MODELS[model]
    norm = float(options.get(model, {}).get("l_norm", 1.0)) if scorer in ("transe", "rotate") else None
    if norm not in (None, 1.0, 2.0):
        raise UnsupportedError(f"{path}: l_norm {norm}; allowed are 1 and 2.")
    distances = {} if norm is None else {"margin": 0.0, "norm": int(norm)}
    made = build_scorer(scorer, entity.shape[1], **distances)  # type: ignore[arg-type]
    if relation.shape[1] != made.relation_size or (reciprocal and len(relation) % 2):
        raise ModelError(f"{path}: {len(relation)} relations of {relation.shape[1]} numbers do not fit {made}.")
    num_relations = len(relation) // 2 if reciprocal else len(relation)
    entities, relations = _names(checkpoint, path, given, len(entity), num_relations)
    return Foreign(
        "LibKGE",
        made,
        reciprocal,
        entities,
        relations,
        lambda ids: interleaved(entity[ids]) if in_pairs(scorer, "entity") else entity[ids],
        lambda ids: interleaved(relation[ids]) if in_pairs(scorer, "relation") else relation[ids],
        entity.dtype,
        files=(path, path),
    )


def _table(state: dict[str, Tensor], name: str, path: Path) -> Tensor:
    # A reciprocal model has its tables twice, once as those of its base model.
    found = [state[key] for key in (name, f"_base_model.{name}") if key in state]
    if not found:
        raise ModelError(f"{path} holds no {name}; only look-up embeddings are supported. It has: {', '.join(state)}.")
    return found[0].detach()


def _names(
    checkpoint: dict[str, Any], path: Path, given: Given, num_entities: int, num_relations: int
) -> tuple[pl.Series, pl.Series]:
    meta = checkpoint.get("dataset", {}).get("dataset.meta") or {}
    if given.names is None and {"entity_ids", "relation_ids"} <= meta.keys():
        names = [pl.Series("name", [str(one) for one in meta[f"{kind}_ids"]]) for kind in ("entity", "relation")]
        if [len(one) for one in names] != [num_entities, num_relations]:
            raise ModelError(
                f"{path} names {len(names[0])} entities and {len(names[1])} relations, and holds other numbers."
            )
        return names[0], names[1]
    folders = given.folders(path.parent)
    return read_names(folders, "entities", num_entities), read_names(folders, "relations", num_relations)
