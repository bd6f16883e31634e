"""Plain tables: entity.npy and relation.npy, or the same as .safetensors, beside entities.tsv and relations.tsv.

A config.json with `scorer` and `reciprocal`, as `launch/export.py --format numpy` writes it, says what they mean;
else the user says the scorer, its constants, and the layout of pairs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.errors import ConfigError, ModelError
from distkgd.models.importers.foreign import (
    Foreign,
    Given,
    Rows,
    in_pairs,
    interleaved,
    open_array,
    read_names,
    rows_of_array,
)
from distkgd.models.model_folder import read_json
from distkgd.scorers import SCORERS, Scorer, build_scorer, from_constants

UNCHECKED = "scorer, constants and layout are as you said them; there is nothing to check them by"


def open_plain(path: Path, given: Given) -> Foreign:
    """The tables in the folder `path`."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(config.get("scorer", {}), dict):
        raise ModelError(
            f"{path}/config.json: scorer is {config['scorer']!r}, not the constants of a scorer; leave it out."
        )
    name = given.scorer or config.get("scorer", {}).get("name")
    if name not in SCORERS:
        raise ConfigError(
            f"{path}: the scorer is {name!r}; say which of {', '.join(SCORERS)} it is (launch/import.py --scorer)."
        )
    if "scorer" not in config and given.layout is None and (in_pairs(name, "entity") or in_pairs(name, "relation")):
        raise ConfigError(
            f"{path}: {name} has pairs of numbers, and the files do not say how they lie. Say it: launch/import.py "
            "--layout interleaved (re, im, re, im, …) or --layout halves (all re before all im)."
        )
    files = _file(path, "entity"), _file(path, "relation")
    entity, entity_shape, dtype = _open(files[0], "entity", name, given)
    relation, relation_shape, _ = _open(files[1], "relation", name, given)
    scorer = _scorer(config, given, name, entity_shape[1])
    if relation_shape[1] != scorer.relation_size:
        raise ModelError(
            f"{path}: relations have {relation_shape[1]} columns; {scorer} needs {scorer.relation_size} beside "
            f"{entity_shape[1]} per entity."
        )
    names = given.folders(path)
    entities = read_names(names, "entities", entity_shape[0])
    reciprocal = bool(config.get("reciprocal", False))
    relations = read_names(names, "relations", relation_shape[0] // (2 if reciprocal else 1))
    said = "scorer, constants and layout are those of its config.json" if "scorer" in config else UNCHECKED
    return Foreign(
        "plain tables", scorer, reciprocal, entities, relations, entity, relation, dtype, unchecked=said, files=files
    )


def _file(path: Path, table: str) -> Path:
    npy, safetensors = path / f"{table}.npy", path / f"{table}.safetensors"
    return npy if npy.is_file() or not safetensors.is_file() else safetensors


def _scorer(config: dict[str, Any], given: Given, name: str, columns: int) -> Scorer:
    if given.scorer is None and given.margin is None and given.norm is None and "scorer" in config:
        found = from_constants(config["scorer"])
        if found.entity_size != columns:
            raise ModelError(f"entities have {columns} columns; {found} of config.json needs {found.entity_size}.")
        return found
    return build_scorer(name, columns - SCORERS[name].biases, given.margin, given.norm)


def _open(
    file: Path, table: Literal["entity", "relation"], scorer: str, given: Given
) -> tuple[Rows, tuple[int, int], torch.dtype]:
    change: Callable[[Tensor], Tensor] = lambda rows: rows  # noqa: E731
    if given.layout == "halves" and in_pairs(scorer, table):
        change = interleaved
    if file.suffix == ".npy":
        array = open_array(file)
        return rows_of_array(array, change), (array.shape[0], array.shape[1]), torch.from_numpy(array[:0].copy()).dtype
    try:
        with safe_open(file, "pt") as opened:
            (name,) = opened.keys()
            stored = opened.get_tensor(name)  # a map of the file: rows are read when they are asked for
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{file}: missing, truncated, or more than one table: {error}.") from None
    if stored.ndim != 2 or not stored.is_floating_point():
        raise ModelError(f"{file} holds {stored.dtype} {list(stored.shape)}; expected a table of floating-point rows.")
    return (lambda ids: change(stored[ids])), (stored.shape[0], stored.shape[1]), stored.dtype
