"""A finished model meets a newer state of its graph: rows matched by name, newcomers placed and trained a little."""

from collections.abc import Mapping, Sequence
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
from distkgd.models.model_folder import LoadedModel, find_model, load_model
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

SHARE = 6  # of the epochs that the model was trained for: an update takes one in so many, or fewer
CALM = 5  # its learning rate is that of the training, divided by this: most rows are good already
FIRM = (
    10  # times the regulariser, where old rows are kept: new ones fit few triples, and would answer too many questions
)
NAME = "updated"


def update(
    model: AnyPath,
    data: AnyPath,
    overrides: Sequence[str] = (),
    *,
    epochs: int | None = None,
    old_rows: str = "anchored",
    out: AnyPath | None = None,
    resume: bool = False,
    show: bool = False,
) -> Run:
    """Train a finished model on a newer state of its graph; the old model is left as it is.

    Entities and relations are matched by name. New entities are placed by their neighbours
    (`distkgd.models.newcomers`), then trained as the model was, for a sixth of its epochs at a fifth of its learning
    rate, with ten times its regulariser unless old rows are free. Where one teacher, a stage of the same run, taught
    the model, it is updated first and teaches it again by the same method; other models are trained by the triples
    alone. The report says how old and new entities do, before that training and after it.

    model: a run (its student), a stage of one, or a model folder; without a run's plan.yaml the rules of
    `distkgd.distill` say how. data: a folder, or a public data set.
    overrides: `key=value` each, such as student.optimizer.lr=0.01, over everything else. epochs: of each stage.
    old_rows: "anchored" pulls those of old entities and relations back (student.anchor), "frozen" keeps them as they
    are, "free" trains them like the new ones.
    out: run folder, default runs/NAME_updated. resume, show: as for `distkgd.distill`.

    Raises ConfigError and its like for what cannot be done.
    """
    machine = parse_config({}, "the default config")
    with one_run(machine, show) as (ranks, display):
        graph = load_graph(data)
        stages, tree = _plan(_stage(Path(model)), graph, ranks.device)
        folder = Path(out) if out is not None else Path("runs") / f"{Path(model).name}_{NAME}"
        start = folder / "first_rows"
        tree |= {"name": folder.name, "data": str(data), "baseline": False}
        for name in stages:
            tree[name] |= {"first_rows": str(start / name), "old_rows": old_rows}
            if old_rows != "free" and "regulariser" in tree[name]:
                regulariser = tree[name]["regulariser"]
                tree[name]["regulariser"] = regulariser | {"weight": FIRM * regulariser["weight"]}
            tree[name] |= {} if epochs is None else {"epochs": epochs, "validate_every": epochs}
        for override in overrides:
            apply(tree, override)
        config = parse_config(tree, "the config of the update")
        on_first(ranks, partial(refuse_existing, folder, resume))
        begun = {name: grown(loaded, graph, config.seed) for name, loaded in stages.items()}

        def write() -> None:
            for name, one in begun.items():
                if not (start / name).exists():
                    one.save(start / name, graph, anchored(str(data)))

        further = partial(_apart, newcomers=begun["student"].entities)
        report = run_plan(config, graph, ranks, folder, resume=resume, display=display, write=write, further=further)
    return Run(folder, report)


def _stage(model: Path) -> Path:
    """The student of a run, which is a folder with a plan.yaml; else the folder itself."""
    return model / "stages/student" if (model / "plan.yaml").is_file() else model


def _shorter(epochs: int) -> int:
    return max(1, epochs // SHARE)


def _plan(model: Path, graph: Graph, device: torch.device) -> tuple[dict[str, LoadedModel], dict[str, Any]]:
    """The models that are updated, by stage, and the tree of a config that trains them."""
    stage = find_model(model).parent
    plan, trained, tree = stage.parent.parent / "plan.yaml", {}, {}
    if plan.is_file():
        content = read_yaml(plan)
        trained = {one["name"]: one for one in content["stages"] if "name" in one and "epochs" in one}
        tree = {key: content["config"][key] for key in ("seed", "dtype", "device", "threads", "mlflow", "report")}
    student = trained.get(stage.name)
    stages = {"student": load_model(model, Ranks(device=device))}
    tree["student"] = _calmer(student, stages["student"], graph)
    taught_by = student["teachers"] if student is not None else []
    if student is not None and len(taught_by) == 1 and taught_by[0] in trained:
        stages["teacher"] = load_model(stage.parent / taught_by[0], Ranks(device=device))
        tree["teacher"] = _calmer(trained[taught_by[0]], stages["teacher"], graph)
        distill = student["distill"]
        if two := distill.get("stage_two"):  # DualDE's, which lasts for epochs of its own
            cut = {key: _shorter(two[key]) for key in ("start", "epochs") if isinstance(two[key], int)}
            distill = distill | {"stage_two": two | cut}
        tree["student"] |= {"method": student["method"], "distill": distill}
    return stages, tree


def _calmer(stage: Mapping[str, Any] | None, loaded: LoadedModel, graph: Graph) -> dict[str, Any]:
    """The config of the stage that trained a model, calmer and shorter, without its method; where nothing tells of it,
    the rules'."""
    scorer = loaded.model.scorer
    found = choose(graph, scorer.dim)["student"] if stage is None else stage
    kept = {key: value for key, value in found.items() if key not in ("name", "teachers", "method", "distill", "start")}
    constants = scorer.constants()
    kept |= {"scorer": scorer.name, "dim": scorer.dim, "reciprocal": loaded.model.reciprocal}
    kept |= {key: constants[key] for key in ("margin", "norm") if constants.get(key) is not None}
    epochs = _shorter(kept["epochs"])
    optimizer = merge(kept["optimizer"], {"lr": kept["optimizer"]["lr"] / CALM})
    if optimizer.get("relation_lr") is not None:
        optimizer["relation_lr"] /= CALM
    return kept | {"epochs": epochs, "validate_every": epochs, "optimizer": optimizer}


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
