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
from distkgd.models.importers.foreign import Foreign, Given, counterpart, read_names
from distkgd.models.importers.torch_files import load_tensors
from distkgd.scorers import build_scorer

MODELS = {name: name for name in ("complex", "distmult", "rescal", "transe", "rotate", "cp", "simple")}
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
    scorer = counterpart(model, MODELS, path)
    entity, relation = (_table(state, name, path) for name in TABLES)
    margin = norm = None
    if scorer in ("transe", "rotate"):
        margin, norm = 0.0, float(options.get(model, {}).get("l_norm", 1.0))
        if norm not in (1.0, 2.0):
            raise UnsupportedError(f"{path}: l_norm {norm}; allowed are 1 and 2.")
    return Foreign(
        "LibKGE",
        build_scorer(scorer, entity.shape[1], margin, None if norm is None else int(norm)),
        (path, path),
        _names(checkpoint, path, given, len(entity), len(relation) // (2 if reciprocal else 1)),
        entity,
        relation,
        reciprocal,
        halves=True,
    )


def _table(state: dict[str, Tensor], name: str, path: Path) -> Tensor:
    # A reciprocal model has its tables twice, once as those of its base model.
    found = [state[key] for key in (name, f"_base_model.{name}") if key in state]
    if not found:
        raise ModelError(f"{path} holds no {name}; only look-up embeddings are supported. It has: {', '.join(state)}.")
    return found[0].detach()


def _names(
    checkpoint: dict[str, Any], path: Path, given: Given, entities: int, relations: int
) -> tuple[pl.Series, pl.Series]:
    meta = checkpoint.get("dataset", {}).get("dataset.meta") or {}
    if given.names is not None or not {"entity_ids", "relation_ids"} <= meta.keys():
        return read_names(given.folders(path.parent), entities, relations)
    first, second = (pl.Series("name", map(str, meta[f"{kind}_ids"])) for kind in ("entity", "relation"))
    if (len(first), len(second)) != (entities, relations):
        raise ModelError(f"{path} names {len(first)} entities and {len(second)} relations, and holds other numbers.")
    return first, second
