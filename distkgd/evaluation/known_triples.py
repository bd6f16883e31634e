"""The known triples of a model as a file in its folder, for where its data set is not at hand (`distkgd register`)."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distkgd.data import Graph
from distkgd.errors import ModelError
from distkgd.models.model_folder import find_model, read_json, sha256_of

FILE = "known.npy"  # [n, 3] int32


def of(graph: Graph) -> Tensor:
    """[n, 3] int64: all triples of a graph."""
    return torch.cat([graph.train, graph.valid, graph.test])


def write(folder: Path, graph: Graph) -> None:
    """Write those of a graph into the folder of its model, and their sha256 into its config.json."""
    np.save(folder / FILE, of(graph).int().numpy())
    config = read_json(folder / "config.json")
    config["sha256"][FILE] = sha256_of(folder / FILE)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Tensor | None:
    """[n, 3] int64: what `write` has written, None where it has not; ModelError where it is not as written."""
    folder = find_model(folder)
    digest = read_json(folder / "config.json").get("sha256", {}).get(FILE)
    if digest is None:
        return None
    if not (folder / FILE).is_file() or sha256_of(folder / FILE) != digest:
        raise ModelError(
            f"{folder / FILE}: missing, or its sha256 differs from config.json's; register the model again."
        )
    return torch.from_numpy(np.load(folder / FILE, allow_pickle=False)).long()
