"""A finished model meets a newer state of its graph: rows matched by name, newcomers placed, all trained a little."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distkgd.common.paths import AnyPath
from distkgd.config.tree import apply, merge, read_yaml
from distkgd.data import Graph, anchored, load_graph
from distkgd.data.growth import holding
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import metrics
from distkgd.models.model_folder import LoadedModel, find_model, load_model, save_model
from distkgd.models.newcomers import grown
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.autoconfig.program import one_run
from distkgd.pipeline.autoconfig.rules import choose
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.finished_run import Run
from distkgd.pipeline.plan import Addition, run_plan
from distkgd.pipeline.run_folder import refuse_existing
from distkgd.pipeline.stage_job import Run as StageRun
from distkgd.pipeline.stage_job import load_teacher

SHARE = 6  # of the epochs that the model was trained for: an update takes one in so many
CALM = 5  # its learning rate is that of the training, divided by this: most rows are good already
NAME = "updated"


def update(
    model: AnyPath,
    data: AnyPath,
    overrides: Sequence[str] = (),
    *,
    out: AnyPath | None = None,
    resume: bool = False,
    show: bool = False,
) -> Run:
    """Train a finished model on a newer state of its graph; the old model is left as it is.

    Entities and relations are matched by name. New entities are placed by their neighbours
    (`distkgd.models.newcomers`), then all rows are trained as the model was, for a sixth of its epochs at a fifth of
    its learning rate. The report says how old and new entities do, before that training and after it.

    model: a stage of a run, or a model folder; without a run's plan.yaml the rules of `distkgd.distill` say how.
    data: a folder, or a public data set. overrides: `key=value` each, such as student.epochs=5.
    out: run folder, default runs/NAME_updated. resume, show: as for `distkgd.distill`.

    Raises ConfigError and its like for what cannot be done.
    """
    machine = parse_config({}, "the default config")
    with one_run(machine, show) as (ranks, display):
        graph = load_graph(data)
        loaded = load_model(model, Ranks(device=ranks.device))
        tree = _tree(Path(model), loaded, graph)
        folder = Path(out) if out is not None else Path("runs") / f"{Path(model).name}_{NAME}"
        start = folder / "first_rows"
        tree |= {"name": folder.name, "data": str(data)}
        for override in overrides:
            apply(tree, override)
        tree["student"]["first_rows"] = str(start)
        config = parse_config(tree, "the config of the update")
        on_first(ranks, partial(refuse_existing, folder, resume))
        begun, newcomers = grown(loaded, graph, config.seed)

        def write() -> None:
            if not start.exists():
                save_model(start, begun, graph, {"data": graph.summary(), "source": anchored(str(data))})

        further = partial(_apart, newcomers=newcomers)
        report = run_plan(config, graph, ranks, folder, resume=resume, display=display, write=write, further=further)
    return Run(folder, report)


def _tree(model: Path, loaded: LoadedModel, graph: Graph) -> dict[str, Any]:
    """The config of the stage that trained a model, calmer and shorter; where nothing tells of it, the rules'."""
    scorer, stage = loaded.model.scorer, find_model(model).parent
    plan = stage.parent.parent / "plan.yaml"
    if plan.is_file():
        content = read_yaml(plan)
        found = next((one for one in content["stages"] if one.get("name") == stage.name and "epochs" in one), None)
        kept = {key: content["config"][key] for key in ("seed", "dtype", "device", "threads", "mlflow", "report")}
    else:
        found, kept = None, {}
    if found is None:
        found = choose(graph, scorer.dim)["student"]
    student = {
        key: value for key, value in found.items() if key not in ("name", "teachers", "method", "distill", "start")
    }
    constants = scorer.constants()
    student |= {"scorer": scorer.name, "dim": scorer.dim, "reciprocal": loaded.model.reciprocal}
    student |= {key: constants[key] for key in ("margin", "norm") if constants.get(key) is not None}
    epochs = max(1, math.floor(student["epochs"] / SHARE + 0.5))
    optimizer = merge(student["optimizer"], {"lr": student["optimizer"]["lr"] / CALM})
    if optimizer.get("relation_lr") is not None:
        optimizer["relation_lr"] /= CALM
    return kept | {"student": student | {"epochs": epochs, "validate_every": epochs, "optimizer": optimizer}}


def _apart(run: StageRun, results: list[StageResult], *, newcomers: torch.Tensor) -> Addition:
    """Old and new entities apart, as remarks: placed and not yet trained, and updated."""
    split, config = run.shown_split, run.config
    triples = getattr(run.graph, split)
    new = holding(triples, newcomers)
    lines = [f"{len(newcomers):,} of {run.graph.num_entities:,} entities are new."]
    for kind, here in (("without new entities", ~new), ("with new entities", new)):
        found = []
        for folder in (str(config.student.first_rows), "student"):
            rank = run.evaluate(load_teacher(run, folder), split)[1]
            found.append(metrics(rank[here])["mrr"])
        before, after = ("–" if one is None else f"{one:.4f}" for one in found)
        lines.append(f"{split} MRR of the {int(here.sum()):,} triples {kind}: placed {before}, updated {after}.")
    return Addition(remarks=lines)
