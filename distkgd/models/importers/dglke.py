"""Models of DGL-KE: DATA_MODEL_entity.npy, DATA_MODEL_relation.npy and config.json in one folder.

Its formulas (dglke/models/pytorch/score_fun.py): TransE with norm 1 or 2, DistMult, ComplEx, RESCAL, RotatE, SimplE;
pairs of vectors in halves. DGL-KE clamps SimplE's scores to ±20, which is left out here. TransR is not supported.
"""

from pathlib import Path

from distkgd.errors import ModelError
from distkgd.models.importers import rotate
from distkgd.models.importers.foreign import Foreign, Given
from distkgd.models.model_folder import read_json

MODELS = rotate.MODELS | {
    "TransE": ("transe", 2),
    "TransE_l1": ("transe", 1),
    "TransE_l2": ("transe", 2),
    "RESCAL": ("rescal", None),
    "SimplE": ("simple", None),
}


def open_dglke(path: Path, given: Given) -> Foreign:
    """The model in the folder `path`."""
    config = read_json(path / "config.json")
    try:
        # Both spellings occur, by the version that wrote them.
        config["model"] = config.get("model_name") or config["model"]
        config["hidden_dim"] = config.get("hidden_dim") or config["emb_size"]
    except KeyError as error:
        what = "model_name, hidden_dim and gamma"
        raise ModelError(f"{path}/config.json lacks {error}; it must say {what}.") from None
    files = _only(path, "*_entity.npy"), _only(path, "*_relation.npy")
    return rotate.of_arrays("DGL-KE", MODELS, path, config, files, given.folders(path))


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        seen = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{folder} must hold one file {pattern}; found: {seen}.")
    return found[0]
