"""Latency and throughput of the HTTP endpoints of a teacher and its students, beside each other.

python benchmarks/serving.py [--entities 40943] [--dims 512,64,32] [--seconds 5]   # benchmarks/results/serving.json

The models are untrained, of WN18RR's size: how long an answer takes does not depend on what was learned.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import polars as pl
import torch
import typer

from distkgd.common.files import write_atomic
from distkgd.data import Graph, Vocabulary
from distkgd.distributed.ranks import Ranks
from distkgd.models.model import new_model
from distkgd.models.model_folder import bytes_on_disk, save_model
from distkgd.reporting.report import served
from distkgd.scorers import build_scorer
from distkgd.tracking.mlflow_runs import register_finished
from distkgd.tracking.serving.entries import Entry
from distkgd.tracking.serving.speed import SECONDS, measure

RESULTS = Path(__file__).resolve().parent / "results" / "serving.json"
RELATIONS = 11


def entries(folder: Path, num: int, dims: list[int]) -> list[Entry]:
    """A ComplEx of each dim over `num` entities, the first one as the teacher."""
    empty = torch.empty(0, 3, dtype=torch.int64)
    names = Vocabulary(pl.Series([f"entity {i:09d}" for i in range(num)]))
    relations = Vocabulary(pl.Series([f"relation {i:02d}" for i in range(RELATIONS)]))
    graph = Graph("untrained", empty, empty, empty, names, relations, "0" * 64, ())
    made = []
    for place, dim in enumerate(dims):
        stage = "teacher" if place == 0 else f"student_{dim}"
        model = new_model(
            build_scorer("complex", dim),
            num,
            RELATIONS,
            Ranks(),
            reciprocal=True,
            seed=place,
            init_scale=None,
            dtype=torch.float32,
        )
        save_model(folder / stage / "model", model, graph, {"stage": stage})
        role, alias = ("teacher", "teacher") if place == 0 else ("student", f"student-{dim}")
        size = bytes_on_disk(folder / stage)
        made.append(Entry(stage, role, alias, folder / stage, dim, size, None, "", ""))  # type: ignore[arg-type]
    return made


def main(
    entities: Annotated[int, typer.Option(help="Rows of the entity tables.")] = 40943,
    dims: Annotated[str, typer.Option(help="Of the teacher, then of the students.")] = "512,64,32",
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = SECONDS,
    json_: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = RESULTS,
) -> None:
    """Register, serve, ask, and write what it took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = entries(folder, entities, [int(dim) for dim in dims.split(",")])
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        found, store = register_finished(models, "untrained", None, run_folder=folder, uri=uri)
        measured = measure(models, [f"models:/untrained/{version}" for version in found.versions], store, seconds)
    write_atomic(json_, json.dumps(measured | {"entities": entities}, indent=2) + "\n")
    print("\n".join(served(measured)))


if __name__ == "__main__":
    typer.run(main)
