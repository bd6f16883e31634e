"""Running a plan: its stages in order, inside this process group.

runs/NAME/
  plan.yaml                      the resolved config and its stages
  stages/STAGE/checkpoint/       resumable state; model/ the finished model; metrics.jsonl; result.json
  report.json  report.md         what came out
  mlflow.json                    run ids, so that a resumed run continues its curves
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distkgd.config import RunConfig, resolved
from distkgd.display import Display
from distkgd.distributed.deepspeed_engine import check_supported
from distkgd.distributed.nodes import shared_answers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, Stopped
from distkgd.evaluate import protocol
from distkgd.graph import Graph
from distkgd.job import Progress, Watch
from distkgd.long_tail import in_parts
from distkgd.model import Model
from distkgd.model_folder import bytes_on_disk, find_model, save_model, sparse_bytes
from distkgd.report import write_atomic, write_report
from distkgd.run_folder import prepare_folder
from distkgd.scorers import SCORERS
from distkgd.stage_job import Run, build_job, dtype_of, load_teacher, teacher_folder
from distkgd.stages import Stage, build_plan, check_plan
from distkgd.tracking import Status, open_tracking
from distkgd.train import train_stage


def run_plan(
    config: RunConfig,
    graph: Graph,
    ranks: Ranks,
    folder: Path,
    *,
    resume: bool,
    display: Display,
    stages: list[Stage] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train every unfinished stage, write the report, and return it.

    stages: in place of those of `config`'s own plan. watch: see `Job`.
    Raises ConfigError when `folder` already holds a run and resume is off.
    """
    stages = build_plan(config) if stages is None else stages
    check_plan(config, stages, graph, ranks.world)
    if config.engine.name == "deepspeed":
        tensors = {"relation": torch.empty(0, dtype=dtype_of(config))}
        for one in (one for stage in stages for one in stage.configs):
            check_supported(one.optimizer.name, config.engine.zero, tensors)
    prepare_folder(config, stages, graph, folder, ranks, resume)
    track = config.mlflow
    tracking = open_tracking(
        run_folder=folder, name=config.name, uri=track.uri, enabled=track.enabled, active=ranks.first
    )
    run = Run(
        config,
        graph,
        ranks,
        folder,
        tracking,
        display,
        shared_answers(ranks, [graph.train], graph.num_entities),
        shared_answers(ranks, [graph.train, graph.valid, graph.test], graph.num_entities),
        watch,
    )
    tags = {"git_sha": git_sha(), "world": str(ranks.world), "device": str(ranks.device)}
    tags |= {f"protocol.{key}": str(value) for key, value in protocol(config.ties, config.filter).items()}
    tracking.start(resolved(config), tags, graph.summary())
    status: Status = "FAILED"
    try:
        results = [run_stage(run, stage) for stage in stages]
        report = make_report(run, results)
        if ranks.first:
            write_report(folder, report)
        ranks.barrier()
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        done = status == "FINISHED"
        tracking.finish(status, [folder / "report.json", folder / "report.md"] if done else [])
    return report


def run_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """One stage's row of the report; trains it unless it is finished."""
    folder = run.stage_folder(stage.name)
    result = folder / "result.json"
    stage, chosen = settled(run, stage)
    digest = stage_digest(run, stage)
    if result.exists():
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if row.pop("digest") != digest:
            raise ConfigError(f"{folder} was made by another config, data set or teacher; use another --out.")
        run.display.line(f"{stage.name}: finished before, valid MRR {row['valid']['mrr']:.4f}")
        return row
    tracking = run.tracking.stage(stage.name, stage.config.model_dump(mode="json"), {"method": stage.config.method})
    status: Status = "FAILED"
    try:
        teachers = [load_teacher(run, name) for name in stage.teachers]
        job = build_job(run, stage, digest, tracking, teachers)
        progress = train_stage(job)
        row = finish_stage(run, stage, job.method.product, progress) | chosen
        row |= job.method.report(partial(run.curve, job.method.product), run.splits)
        if run.ranks.first:
            write_atomic(result, json.dumps({**row, "digest": digest}, indent=2) + "\n")
        run.ranks.barrier()
        status = "FINISHED"
    finally:
        found = {} if status != "FINISHED" else flatten_metrics(row)
        tracking.finish(status, folder / "model" if status == "FINISHED" else None, found)
    scores = ", ".join(f"{split} MRR {row[split]['mrr']:.4f}" for split in run.splits)
    run.display.line(f"{stage.name}: done in {row['seconds']:.0f} s, {scores}")
    return row


def settled(run: Run, stage: Stage) -> tuple[Stage, dict[str, Any]]:
    """`stage` with its choice made, and what its row says of that; finished stages always settle it the same way.

    The rule is that of DualDE sec. 4.1.3: the assistant whose directly trained model has the valid MRR nearest to the
    mean of the teacher's and the direct student's.
    """
    choice = stage.choice
    if choice is None:
        return stage, {}
    ends = {name: valid_mrr(run, name) for name in choice.between}
    candidates = {name: valid_mrr(run, name) for name in choice.configs}
    middle = sum(ends.values()) / 2
    winner = min(candidates, key=lambda name: abs(candidates[name] - middle))
    config = choice.configs[winner]
    said = {"between": ends, "middle": middle, "candidates": candidates, "winner": winner, "dim": config.dim}
    return replace(stage, config=config, choice=None), {"chosen": said}


def valid_mrr(run: Run, name: str) -> float:
    """Of a finished stage of this run as its result says, or of a model elsewhere, ranked now."""
    result = run.stage_folder(name) / "result.json"
    if result.exists():
        return float(json.loads(result.read_text(encoding="utf-8"))["valid"]["mrr"])
    return run.evaluate(load_teacher(run, name), "valid")[0]["mrr"]


def finish_stage(run: Run, stage: Stage, student: Model, progress: Progress) -> dict[str, Any]:
    """Save the model, evaluate it, and say what the stage was."""
    folder = run.stage_folder(stage.name)
    config = stage.config
    source = run.config.data
    if source != run.graph.name and Path(source).is_dir():
        source = str(Path(source).resolve())  # found again from any working directory
    about = {"data": run.graph.summary(), "source": source, "stage": stage.name, "method": config.method}
    save_model(folder / "model", student, run.graph, about)
    found = {split: run.evaluate(student, split) for split in run.splits}
    last = run.splits[-1]
    details = in_parts(found[last][1], getattr(run.graph, last), run.graph)
    triples = progress.step * config.batch_size
    return {
        "name": stage.name,
        "method": config.method,
        "scorer": config.scorer,
        "dim": student.scorer.dim,
        "biases": SCORERS[config.scorer].biases,
        "bytes": bytes_on_disk(folder),
        "sparse_bytes": sparse_bytes(student),
        "num_parameters": student.num_parameters,
        "teachers": list(stage.teachers),
        "seconds": progress.seconds,
        "steps": progress.step,
        "triples_per_second": triples / max(progress.train_seconds, 1e-9),
        "best_step": progress.best_step,
        **{split: found[split][0] for split in run.splits},
        f"{last}_by": details,
    }


def make_report(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """report.json's content."""
    return {
        "name": run.config.name,
        "data": run.graph.summary(),
        "protocol": protocol(run.config.ties, run.config.filter),
        "seed": run.config.seed,
        "world": run.ranks.world,
        "device": str(run.ranks.device),
        "stages": rows,
    }


def stage_digest(run: Run, stage: Stage) -> str:
    """sha256 of what determines a stage's result: its config, seed, dtype, data, and the teachers' files."""
    teachers = {}
    for name in stage.teachers:
        folder = find_model(teacher_folder(run, name))
        teachers[name] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    content = {
        "stage": stage.config.model_dump(mode="json"),
        "seed": run.config.seed,
        "dtype": run.config.dtype,
        "data": run.graph.sha256,
        "teachers": teachers,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flatten_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """valid and test metrics of a report row as flat names."""
    return {f"final/{split}/{k}": float(v) for split in ("valid", "test") for k, v in row.get(split, {}).items()}


def git_sha() -> str:
    """The commit this code is run from, or "unknown" outside a checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
        return out.stdout.strip()
    return "unknown"
