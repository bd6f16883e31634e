"""A finished model as MLflow serves it: a models-from-code pyfunc in a folder."""

import logging
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from distkgd.common.version import __version__
from distkgd.distributed.ranks import Ranks
from distkgd.models.export import export_model
from distkgd.models.model_folder import FORMAT, check_files, check_numbers, find_model, read_config, read_names
from distkgd.tracking.serving.questions import DEFAULT_K

SERVED = Path(__file__).with_name("served.py")


def pack(model: Path, out: Path) -> None:
    """Write the new folder `out`: the code that answers, signature, input example, and the model folder itself.

    model: of a stage or a model; it is exported first, which checks its files, unless it is an export already.
    Raises ModelError where it is damaged.
    """
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # it would copy files of the working directory
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    pyfunc: Any = import_module("mlflow.pyfunc")
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it talks among the lines of training
    folder = find_model(model)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=out.parent) as scratch:
        if read_config(folder)["format"] == FORMAT:
            export_model(folder, Path(scratch) / "model", "safetensors", Ranks())
            folder = Path(scratch) / "model"
        else:
            check_files(folder)
            check_numbers(folder)
        pyfunc.save_model(
            path=str(out),
            python_model=str(SERVED),
            artifacts={"model": str(folder)},
            signature=signature(),
            input_example=[example(folder)],
            pip_requirements=[f"distkgd[mlflow]=={__version__}", f"torch=={torch.__version__.partition('+')[0]}"],
        )


def example(folder: Path) -> dict[str, Any]:
    """A question that the model in `folder` can answer."""
    config = read_config(folder)
    heads = read_names(folder, "entities", "entity_labels", int(config["num_entities"]))
    relations = read_names(folder, "relations", "relation_labels", int(config["num_relations"]))
    return {"head": heads.name(0), "relation": relations.name(0), "k": DEFAULT_K}


def signature() -> Any:
    """Of the endpoint: what a question and an answer hold."""
    models, types = import_module("mlflow.models"), import_module("mlflow.types.schema")
    text, number, real = types.DataType.string, types.DataType.long, types.DataType.double
    # A number is a name too, and a batch may leave out here what it has there, which makes other numbers of whole ones.
    asked = [
        types.ColSpec(types.AnyType(), name, name == "relation") for name in ("head", "relation", "tail", "k", "ids")
    ]
    answered = dict.fromkeys(("head", "relation", "tail", "asked"), text)
    answered |= {"names": types.Array(text), "labels": types.Array(text), "ids": types.Array(number)}
    answered |= {"scores": types.Array(real), "error": text}
    columns = [types.ColSpec(kind, name, required=False) for name, kind in answered.items()]
    return models.ModelSignature(types.Schema(asked), types.Schema(columns))
