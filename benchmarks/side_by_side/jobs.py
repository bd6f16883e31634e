"""Jobs without names or files: what a step costs, and nothing else."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distkgd.common.console import Display
from distkgd.data import power_law_graph
from distkgd.data.filters import KnownAnswers
from distkgd.data.sampling import Balanced, Sampler
from distkgd.data.sharing import shared_graph
from distkgd.data.step_inputs import StepInputBuilder
from distkgd.distributed.ranks import Ranks
from distkgd.methods import Setup, build_method
from distkgd.models.model import Model, new_model
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.stages import rounding_of
from distkgd.scorers import build_scorer
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step


def random_triples(entities: int, triples: int, relations: int, ranks: Ranks, skew: float = 0.0) -> Tensor:
    """[triples, 3] int64; skew: of a power-law graph, made once per node, 0: uniform triples."""
    if skew:
        return shared_graph(ranks, lambda: power_law_graph(entities, triples, relations, skew=skew, seed=0)).train
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([entities, relations, entities])
    return (torch.rand(triples, 3, generator=generator, dtype=torch.float64) * sizes).long()


def seconds_in_turn(jobs: Sequence[Job], repeats: int) -> list[list[float]]:
    """Wall seconds of `repeats` steps of each job, the jobs taking turns, after two that are not counted."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for index in range(repeats + 2):
        for job, mine in zip(jobs, seconds, strict=True):
            started = time.monotonic()
            train_step(job, Progress(step=index), 0)
            mine.append(time.monotonic() - started)
    return [mine[2:] for mine in seconds]


def bare_job(
    stage: Mapping[str, Any], train: Tensor, entities: int, relations: int, ranks: Ranks, teacher_dim: int = 0
) -> Job:
    """A job on `train` ([n, 3] int64).

    stage: a student's config, as in YAML. teacher_dim: of an untrained teacher with the student's scorer.
    """
    taught = {"teacher": "untrained"} if teacher_dim else {}
    config = parse_config({**taught, "student": dict(stage)}, "benchmark").student

    def fresh(dim: int, seed: int) -> Model:
        scorer = build_scorer(config.scorer, dim, config.margin, config.norm)
        rows = torch.bfloat16 if config.row_dtype == "bfloat16" else None
        return new_model(scorer, entities, relations, ranks, reciprocal=config.reciprocal, seed=seed, row_dtype=rows)

    negatives = config.negatives
    size, parts = config.batch_size, config.accumulate
    balanced = Balanced(train, ranks.bounds(entities), size, parts, seed=0) if config.balanced else None
    sides, left_out = negatives.sides, config.distill.left_out
    sampler = Sampler(
        train, entities, relations, batch_size=size, sides=sides, seed=0, balanced=balanced, left_out=left_out
    )
    input_builder = StepInputBuilder(
        sampler,
        KnownAnswers(train[:0], entities),
        ranks,
        kind=negatives.kind,
        num=negatives.num,
        chunk=negatives.chunk,
        filtered=negatives.filtered,
        label_shares=False,
        drawn_anchors=negatives.anchors,
        move=config.move if config.move != "auto" else "rows" if negatives.kind in ("chunk", "triple") else "queries",
    )
    folder = Path(tempfile.gettempdir()) / "distkgd-benchmark"
    tracking = open_tracking(run_folder=folder, name="benchmark", uri=None, enabled=False, active=False)
    input_builder.together = config.distill.triples_together
    setup = Setup(sampler.steps_per_epoch, config.epochs, lambda dim, _name: fresh(dim, 2), input_builder)
    teachers = [fresh(teacher_dim, 1)] if teacher_dim else []
    method = build_method(config, fresh(config.dim, 0).quantised(rounding_of(config)), teachers, setup)
    return Job(
        name="student",
        config=config,
        method=method,
        input_builder=input_builder,
        ranks=ranks,
        folder=folder,
        digest="",
        keep=2,
        validate=None,
        tracking=tracking.stage("student", {}, {}),
        display=Display(False),
    )
