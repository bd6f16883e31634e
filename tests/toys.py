"""Small graphs and stages that tests of several modules train on; importable by rank processes."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import torch

from distkgd.common.console import Display
from distkgd.config.stage import StageOptions
from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import KnownAnswers
from distkgd.data.step_inputs import Move, StepInputBuilder
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import candidate_layout
from distkgd.methods import METHODS, Method
from distkgd.models.model import Model, new_model
from distkgd.pipeline.config import RunConfig, parse_config
from distkgd.pipeline.stage_job import Run, build_job
from distkgd.pipeline.stages import Stage, build_plan
from distkgd.scorers import build_scorer
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.training.communication import forecast
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step


def toy_graph(entities: int = 41, relations: int = 5, triples: int = 400, seed: int = 0) -> Graph:
    """A random graph without repeated triples; 1/8 of it is valid, 1/8 test."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([entities, relations, entities])
    rows = torch.unique((torch.rand(triples, 3, generator=generator) * sizes).long(), dim=0)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    cut = len(rows) // 8
    names = [Vocabulary(pl.Series([f"{k}{i:03d}" for i in range(n)])) for k, n in (("e", entities), ("r", relations))]
    return Graph("toy", rows[2 * cut :], rows[:cut], rows[cut : 2 * cut], *names, f"{seed:064d}", ())


def labels_of(number: int, labels: dict[int, str]) -> pl.Series:
    """[number] labels by row; null for the others."""
    return pl.Series([labels.get(row) for row in range(number)], dtype=pl.String)


def toy_run(config: dict[str, Any], ranks: Ranks, folder: Path, graph: Graph | None = None) -> Run:
    """A Run on a toy graph, untracked and silent."""
    parsed: RunConfig = parse_config({"mlflow": {"enabled": False}, **config}, "test")
    graph = graph or toy_graph()
    everything = torch.cat([graph.train, graph.valid, graph.test])
    tracking = open_tracking(run_folder=folder, name="toy", uri=None, enabled=False, active=False)
    answers = (KnownAnswers(t.to(ranks.device), graph.num_entities) for t in (graph.train, everything))
    return Run(parsed, graph, folder, build_plan(parsed), ranks, tracking, Display(False), *answers)


def toy_teacher(run: Run, dim: int = 12, scorer: str = "complex", seed: int = 77) -> Model:
    """A model that was not trained, but whose scores are spread like a trained one's."""
    made = build_scorer(scorer, dim)
    graph = run.graph
    model = new_model(
        made,
        graph.num_entities,
        graph.num_relations,
        run.ranks,
        reciprocal=True,
        seed=seed,
        init_scale=0.7,
        dtype=run.dtype,
    )
    model.relation.mul_(5.0)
    return model


def toy_job(config: dict[str, Any], ranks: Ranks, folder: Path, graph: Graph | None = None) -> Job:
    """A job for the student of `config`; a method that needs a teacher gets `toy_teacher`, and a smaller one too if it
    is mulde, has weights of teachers, or config["two"] says so."""
    weighted = "weights" in config["student"].get("distill", {}) and config["student"]["method"] == "dualde"
    two = config.get("two", weighted or config["student"].get("method") == "mulde")
    config = {key: value for key, value in config.items() if key != "two"}
    method = config["student"].get("method", "scratch")
    taught = 0 not in METHODS[method].num_teachers and not config["student"].get("distill", {}).get("labels")
    given = {"teachers": {"toy": "toy", "other": "toy"}} if two else {"teacher": "toy"} if taught else {}
    run = toy_run(config | given, ranks, folder, graph)
    # Who begins from its teacher's rows needs one of the same scorer.
    scorer = run.config.student.scorer if run.config.student.start != "random" else "complex"
    teachers = [toy_teacher(run, scorer=scorer)] if taught else []
    if two:
        teachers.append(toy_teacher(run, 8, "distmult", seed=78))
    stage = Stage("student", run.config.student, ("toy",) * len(teachers))
    return build_job(run, stage, "digest", run.tracking.stage("student", {}, {}), teachers=teachers)


def forecast_for_auto(
    input_builder: StepInputBuilder, method: Method[Any], config: StageOptions
) -> dict[Move, dict[str, float]]:
    """In place of `communication.forecast`, which takes as long as several steps of a toy: only for a choice."""
    return forecast(input_builder, method, config) if config.move == "auto" else {}


def in_blocks(at_once: int | None) -> AbstractContextManager[Any]:
    """Candidates are met in blocks of so many numbers, on all ranks that are threads; None: as ever."""
    if at_once is None:
        return nullcontext()
    return patch.object(candidate_layout, "numbers_at_once", lambda _numbers, _device: at_once)


def train_some(ranks: Ranks, config: dict[str, Any], steps: int, folder: str = "/nonexistent") -> dict[str, Any]:
    """What `steps` steps of `toy_job` leave, as `take_steps` has it."""
    return take_steps(toy_job(config, ranks, Path(folder)), steps)


def take_steps(job: Job, steps: int) -> dict[str, Any]:
    """Losses of `steps` steps, then this rank's rows, the replicated tensors of every group, and validation metrics;
    and the epoch of the last step."""
    progress = Progress()
    losses = []
    for step in range(steps):
        progress.step = step
        if job.method.advance(step // 3, 2, False):
            progress.stale = 0
        losses.append(train_step(job, progress, 0)[0])
    tables = {g: o.table.weight.clone() for g, o in job.rows.items()}
    tensors = {f"{g}.{k}": t.detach().clone() for g, o in job.dense.items() for k, t in o.tensors.items()}
    assert job.validate is not None
    epoch = (steps - 1) // job.input_builder.sampler.steps_per_epoch
    return {"losses": losses, "tables": tables, "tensors": tensors, "valid": job.validate(), "epoch": epoch}
