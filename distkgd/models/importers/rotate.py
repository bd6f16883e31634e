"""Models of RotatE's authors (DeepGraphLearning/KnowledgeGraphEmbedding): entity_embedding.npy, relation_embedding.npy
and config.json in one folder. The names are in the data set's entities.dict and relations.dict.

Their formulas (codes/model.py): TransE with norm 1, DistMult, ComplEx, RotatE; complex numbers in halves; a phase is
pi times the stored number over (gamma + 2) / hidden_dim. pRotatE is not supported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from distkgd.errors import ModelError
from distkgd.models.importers.foreign import Foreign, Given, counterpart, open_array, read_names
from distkgd.models.model_folder import read_json
from distkgd.scorers import build_scorer

# Their name -> ours, and the norm of those that have one, and then a margin, too.
MODELS = {
    "TransE": ("transe", 1),
    "DistMult": ("distmult", None),
    "ComplEx": ("complex", None),
    "RotatE": ("rotate", 1),
}
RANGE = 2.0  # epsilon of their embedding range


def open_rotate(path: Path, given: Given) -> Foreign:
    """The model in the folder `path`."""
    config = read_json(path / "config.json")
    data = Path(str(config.get("data_path") or path))  # as the authors' scripts have it: from the folder above models/
    folders = given.folders(path, data, path.resolve().parent.parent / data)
    train = next((folder / "train.txt" for folder in folders if (folder / "train.txt").is_file()), None)
    entity, relation = (path / f"{name}_embedding.npy" for name in ("entity", "relation"))
    trained = None if train is None else partial(_trained, train)
    return of_arrays("RotatE's authors", MODELS, path, config, (entity, relation), folders, trained)


def _trained(path: Path) -> pl.DataFrame:
    """Names of the triples in a train.txt of the authors' data sets."""
    schema = dict.fromkeys(("head", "relation", "tail"), pl.String)
    try:
        return pl.read_csv(path.read_bytes(), separator="\t", has_header=False, quote_char=None, schema=schema)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ModelError(f"{path} is no table of triples: {str(error).splitlines()[0]}") from None


def of_arrays(
    library: str,
    models: Mapping[str, tuple[str, int | None]],
    path: Path,
    config: Mapping[str, Any],
    files: tuple[Path, Path],
    names: Sequence[Path],
    trained: Callable[[], pl.DataFrame] | None = None,
) -> Foreign:
    """A model of two .npy files in the layout that RotatE's authors and DGL-KE share.

    config: that in the folder `path`, with model, gamma and hidden_dim. names: folders that may hold the files with
    names.
    """
    try:
        model, margin, hidden = str(config["model"]), float(config["gamma"]), int(config["hidden_dim"])
    except (KeyError, TypeError, ValueError) as error:
        what = "model, gamma and hidden_dim"
        raise ModelError(f"{path}/config.json lacks or garbles {error}; it must say {what}.") from None
    scorer, norm = counterpart(model, models, path)
    entity, relation = map(open_array, files)
    return Foreign(
        library,
        build_scorer(scorer, entity.shape[1], None if norm is None else margin, norm),
        files,
        read_names(names, len(entity), len(relation)),
        entity,
        relation,
        halves=True,
        turn=math.pi * hidden / (margin + RANGE) if scorer == "rotate" else 1.0,
        trained=trained,
    )
