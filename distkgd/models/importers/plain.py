"""Plain tables: entity.npy and relation.npy, or the same as .safetensors, beside entities.tsv and relations.tsv.

A config.json with `scorer` and `reciprocal`, as `distkgd export --format numpy` writes it, says what they mean;
else the user says the scorer, its constants, and the layout of pairs.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.errors import ConfigError, ModelError
from distkgd.models.importers.foreign import Foreign, Given, in_pairs, open_array, read_names, table_of
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
            f"{path}: the scorer is {name!r}; say which of {', '.join(SCORERS)} it is (distkgd import --scorer)."
        )
    if "scorer" not in config and given.layout is None and (in_pairs(name, "entity") or in_pairs(name, "relation")):
        raise ConfigError(
            f"{path}: {name} has pairs of numbers, and the files do not say how they lie. Say it: distkgd import "
            "--layout interleaved (re, im, re, im, …) or --layout halves (all re before all im)."
        )
    files = _file(path, "entity"), _file(path, "relation")
    entity, relation = map(_open, files)
    reciprocal = bool(config.get("reciprocal", False))
    return Foreign(
        "plain tables",
        _scorer(config, given, name, entity.shape[1]),
        files,
        read_names(given.folders(path), len(entity), len(relation) // (2 if reciprocal else 1)),
        entity,
        relation,
        reciprocal,
        halves=given.layout == "halves",
        unchecked="scorer, constants and layout are those of its config.json" if "scorer" in config else UNCHECKED,
    )


def _file(path: Path, table: str) -> Path:
    npy, safetensors = path / f"{table}.npy", path / f"{table}.safetensors"
    return npy if npy.is_file() or not safetensors.is_file() else safetensors


def _scorer(config: dict[str, Any], given: Given, name: str, columns: int) -> Scorer:
    if given.scorer is None and given.margin is None and given.norm is None and "scorer" in config:
        return from_constants(config["scorer"])
    return build_scorer(name, columns - SCORERS[name].biases, given.margin, given.norm)


def _open(file: Path) -> Tensor:
    if file.suffix == ".npy":
        return open_array(file)
    try:
        with safe_open(file, "pt") as opened:
            (name,) = opened.keys()
            found = opened.get_tensor(name)  # a map of the file: rows are read when they are asked for
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{file}: missing, truncated, or more than one table: {error}.") from None
    return table_of(found, file)
