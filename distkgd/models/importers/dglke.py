"""Models of DGL-KE: DATA_MODEL_entity.npy, DATA_MODEL_relation.npy and config.json in one folder.

Its formulas (dglke/models/pytorch/score_fun.py): TransE with norm 1 or 2, DistMult, ComplEx, RESCAL, RotatE, SimplE;
pairs of vectors in halves. DGL-KE clamps SimplE's scores to ±20, which is left out here. TransR is not supported.
"""

from pathlib import Path

from distkgd.errors import ModelError, UnsupportedError
from distkgd.models.importers.foreign import Foreign, Given
from distkgd.models.importers.rotate import of_arrays
from distkgd.models.model_folder import read_json

MODELS = {
    "TransE": "transe",
    "TransE_l1": "transe",
    "TransE_l2": "transe",
    "DistMult": "distmult",
    "ComplEx": "complex",
    "RESCAL": "rescal",
    "RotatE": "rotate",
    "SimplE": "simple",
}


def open_dglke(path: Path, given: Given) -> Foreign:
    """The model in the folder `path`."""
    config = read_json(path / "config.json")
    try:
        # Both spellings occur, by the version that wrote them.
        model = str(config.get("model_name") or config["model"])
        hidden = int(config.get("hidden_dim") or config["emb_size"])
        margin = float(config["gamma"])
    except (KeyError, TypeError, ValueError) as error:
        what = "model_name, hidden_dim and gamma"
        raise ModelError(f"{path}/config.json lacks or garbles {error}; it must say {what}.") from None
    if model not in MODELS:
        raise UnsupportedError(f"{path}: {model} has no counterpart here; supported are {', '.join(MODELS)}.")
    files = tuple(_only(path, f"*_{name}.npy") for name in ("entity", "relation"))
    norm = 1 if model in ("TransE_l1", "RotatE") else 2
    return of_arrays("DGL-KE", MODELS[model], (files[0], files[1]), given.folders(path), margin, hidden, norm)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        seen = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{folder} must hold one file {pattern}; found: {seen}.")
    return found[0]
