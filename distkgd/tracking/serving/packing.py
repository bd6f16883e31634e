"""A finished model as MLflow serves it: a models-from-code pyfunc in a folder."""

import logging
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from distkgd.common.version import __version__
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.trained_model import keep_known
from distkgd.models.export import export_model
from distkgd.models.model_folder import FORMAT, check_files, check_numbers, find_model, read_config, read_names
from distkgd.tracking.serving.openapi import ANSWER, openapi_text
from distkgd.tracking.serving.questions import DEFAULT_K

SERVED = Path(__file__).with_name("served.py")


def pack(model: Path, out: Path, known: bool = False) -> None:
    """Write the new folder `out`: the code that answers, signature, input example, openapi.json, and the model folder.

    model: of a stage or a model; it is exported first, which checks its files, unless it is an export already.
    known: the triples of its data set go along, so that its endpoint can leave them out.
    Raises ModelError where it is damaged, ConfigError where its data set is not at hand.
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
            if known:
                folder = Path(shutil.copytree(folder, Path(scratch) / "model"))
        if known:
            keep_known(folder)
        pyfunc.save_model(
            path=str(out),
            python_model=str(SERVED),
            artifacts={"model": str(folder)},
            signature=signature(),
            input_example=[example(folder)],
            pip_requirements=[f"distkgd[mlflow]=={__version__}", f"torch=={torch.__version__.partition('+')[0]}"],
        )
    (out / "openapi.json").write_text(openapi_text(), encoding="utf-8")


def example(folder: Path) -> dict[str, Any]:
    """A question that the model in `folder` can answer."""
    config = read_config(folder)
    heads = read_names(folder, "entities", "entity_labels", int(config["num_entities"]))
    relations = read_names(folder, "relations", "relation_labels", int(config["num_relations"]))
    return {"head": heads.name(0), "relation": relations.name(0), "k": DEFAULT_K}


def signature() -> Any:
    """Of the endpoint: what an answer holds. It has no inputs: MLflow would drop what it does not name unheard."""
    models, types = import_module("mlflow.models"), import_module("mlflow.types.schema")
    kinds = {"string": types.DataType.string, "integer": types.DataType.long, "number": types.DataType.double}
    columns = [
        types.ColSpec(
            types.Array(kinds[one["items"]["type"]]) if "items" in one else kinds["string"], name, required=False
        )
        for name, one in ANSWER.items()
    ]
    return models.ModelSignature(outputs=types.Schema(columns))
