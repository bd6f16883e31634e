"""Models of RotatE's authors (DeepGraphLearning/KnowledgeGraphEmbedding): entity_embedding.npy, relation_embedding.npy
and config.json in one folder. The names are in the data set's entities.dict and relations.dict.

Their formulas (codes/model.py): TransE with norm 1, DistMult, ComplEx, RotatE; complex numbers in halves; a phase is
pi times the stored number over (gamma + 2) / hidden_dim. pRotatE is not supported.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch

from distkgd.errors import ModelError, UnsupportedError
from distkgd.models.importers.foreign import (
    Foreign,
    Given,
    in_pairs,
    interleaved,
    open_array,
    read_names,
    rows_of_array,
)
from distkgd.models.model_folder import read_json
from distkgd.scorers import build_scorer

MODELS = {"TransE": "transe", "DistMult": "distmult", "ComplEx": "complex", "RotatE": "rotate"}
RANGE = 2.0  # epsilon of their embedding range


def open_rotate(path: Path, given: Given) -> Foreign:
    """The model in the folder `path`."""
    config = read_json(path / "config.json")
    try:
        model, margin, hidden = str(config["model"]), float(config["gamma"]), int(config["hidden_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}/config.json lacks or garbles {error}; it must say model, gamma and hidden_dim."
        ) from None
    if model not in MODELS:
        raise UnsupportedError(f"{path}: {model} has no counterpart here; supported are {', '.join(MODELS)}.")
    entities, relations = (path / f"{name}_embedding.npy" for name in ("entity", "relation"))
    data = Path(str(config.get("data_path") or path))  # as the authors' scripts have it: from the folder above models/
    beside = (path, data, path.resolve().parent.parent / data)
    folders = given.folders(*beside)
    made = of_arrays("RotatE's authors", MODELS[model], (entities, relations), folders, margin, hidden, 1)
    train = next((folder / "train.txt" for folder in folders if (folder / "train.txt").is_file()), None)
    return made if train is None else replace(made, trained=partial(_trained, train))


def _trained(path: Path) -> pl.DataFrame:
    """Names of the triples in a train.txt of the authors' data sets."""
    schema = dict.fromkeys(("head", "relation", "tail"), pl.String)
    try:
        return pl.read_csv(path.read_bytes(), separator="\t", has_header=False, quote_char=None, schema=schema)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ModelError(f"{path} is no table of triples: {str(error).splitlines()[0]}") from None


def of_arrays(
    library: str, scorer: str, files: tuple[Path, Path], names: Sequence[Path], margin: float, hidden: int, norm: int
) -> Foreign:
    """A model of two .npy files in the layout that RotatE's authors and DGL-KE share.

    names: folders that may hold the files with names.
    hidden: their hidden_dim; a phase is pi times the stored number over (margin + 2) / hidden.
    """
    arrays = [open_array(path) for path in files]
    entity, relation = arrays
    options: dict[str, Any] = {"margin": margin} if scorer in ("transe", "rotate") else {}
    options |= {"norm": norm} if scorer in ("transe", "rotate") else {}
    made = build_scorer(scorer, entity.shape[1], **options)
    if relation.shape[1] != made.relation_size:
        raise ModelError(
            f"{files[1]} has {relation.shape[1]} columns; {made} needs {made.relation_size} beside {entity.shape[1]} "
            "per entity."
        )
    turn = math.pi * hidden / (margin + RANGE) if scorer == "rotate" else 1.0
    return Foreign(
        library,
        made,
        False,
        read_names(names, "entities", len(entity)),
        read_names(names, "relations", len(relation)),
        rows_of_array(entity, interleaved if in_pairs(scorer, "entity") else lambda rows: rows),
        rows_of_array(relation, interleaved if in_pairs(scorer, "relation") else lambda rows: rows * turn),
        torch.from_numpy(entity[:0].copy()).dtype,
        files=files,
    )
