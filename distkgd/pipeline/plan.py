"""Running a plan: its stages in order, inside this process group.

runs/NAME/
  plan.yaml                      the resolved config and its stages
  stages/STAGE/checkpoint/       resumable state; model/ the finished model; metrics.jsonl; result.json
  report.json  report.md         what came out
  report.html  examples.json     the same as a page, and the answers that it shows
  mlflow.json                    run ids, so that a resumed run continues its curves
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.metrics import known_figures
from distkgd.common.paths import AnyPath
from distkgd.common.provenance import git_sha, machine
from distkgd.common.text import fixed
from distkgd.data import Graph, anchored
from distkgd.data.sharing import shared_answers
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.optim.deepspeed_engine import check_supported
from distkgd.distributed.ownership import owned
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, Stopped
from distkgd.evaluation.breakdowns import in_parts
from distkgd.evaluation.ranking import protocol
from distkgd.models.model import Model
from distkgd.models.model_folder import bytes_on_disk, crop_bytes, find_model, read_result, save_model, sparse_bytes
from distkgd.models.run_paths import RESULT, stage_folder, teacher_folder
from distkgd.pipeline.config import RunConfig, resolved
from distkgd.pipeline.foreign_reports import brought_row, rank_brought, warnings_of, with_brought
from distkgd.pipeline.foreign_teachers import bring_teachers
from distkgd.pipeline.overlap import open_early, remarks
from distkgd.pipeline.registration import register_run, registered_stages
from distkgd.pipeline.run_folder import prepare_folder
from distkgd.pipeline.stage_job import Run, build_job, dtype_of, load_teacher
from distkgd.pipeline.stages import Stage, build_plan, check_plan
from distkgd.pipeline.storage import download_run, find_run, open_storage, upload_stage
from distkgd.reporting.html import write_html
from distkgd.reporting.report import mrr_of, write_report
from distkgd.scorers import SCORERS
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.tracking.mlflow_store import resolve_uri
from distkgd.tracking.tracker import Status, Tracking
from distkgd.training.job import Progress, Watch
from distkgd.training.loop import train_stage

Row = dict[str, Any]
REPORTS = ("report.json", "report.md", "report.html")


def run_plan(
    config: RunConfig,
    graph: Graph,
    ranks: Ranks,
    folder: AnyPath,
    *,
    resume: bool,
    display: Display,
    stages: list[Stage] | None = None,
    watch: Watch | None = None,
    write: Callable[[], None] = lambda: None,
    further: Callable[[Run, list[Row]], tuple[list[Row], dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Train every unfinished stage, write the report, and return it.

    stages: in place of those of `config`'s own plan. watch: see `Job`. write: puts more into the run folder than
        plan.yaml, on the first rank. further: what becomes of the rows of the finished stages: more rows, and more
        keys of the report.
    Raises ConfigError when `folder` already holds a run and resume is off, or another launch is at work in it.
    """
    folder = Path(folder)
    stages = checked_plan(config, graph, ranks.world, stages, folder)
    if config.mlflow.enabled:
        resolve_uri(config.mlflow.uri, folder)  # refused before anything is written
    with owned(folder, ranks, display.line) as agents:
        storage = find_run(config, folder, ranks, resume)
        prepare_folder(config, stages, graph, folder, ranks, resume, agents, write)
        download_run(storage, [stage.name for stage in stages], ranks)
        source, trust = anchored(config.data), config.trust_pickle
        for line in bring_teachers(stages, graph, folder, ranks, data=source, trust=trust):
            display.line(line)
        if any(stage.overlap for stage in stages):
            display.line(
                "chain.overlap: every teacher is finished before its student begins; launch/chain.py overlaps them"
            )
        track = config.mlflow
        tracking = open_tracking(
            run_folder=folder, name=config.name, uri=track.uri, enabled=track.enabled, active=ranks.first
        )
        run = open_run(config, graph, ranks, folder, tracking, display, watch)
        tracking.start(resolved(config), tags_of(config, ranks.world, str(ranks.device)), graph.summary())
        with closing(tracking, folder, REPORTS):
            rows = [run_stage(run, stage) for stage in stages]
            more, keys = ([], {}) if further is None else further(run, rows)
            report = make_report(config, graph, [*rows, *more], ranks.world, str(ranks.device))
            keys |= {"remarks": said} if (said := [*keys.get("remarks", []), *report.get("remarks", [])]) else {}
            report |= keys
            # Asking the models of a large run may take longer than the other ranks would wait in a collective.
            on_first(ranks, partial(_leave, run, report))
    return report


def _leave(run: Run, report: Mapping[str, Any]) -> None:
    write_reports(run.config, run.graph, run.folder, report)
    register_run(run.config, run.folder, run.tracking, run.display.line)


def write_reports(config: RunConfig, graph: Graph, folder: Path, report: Mapping[str, Any]) -> None:
    """All that a finished plan leaves of `REPORTS`."""
    write_report(folder, report)
    if config.report.html:
        write_html(folder, report, lambda: graph, config.report.queries)


def checked_plan(
    config: RunConfig, graph: Graph, world: int, stages: list[Stage] | None = None, folder: Path | None = None
) -> list[Stage]:
    """The stages of a run; ConfigError, UnsupportedError or ModelError for what could not work on this data.

    stages: in place of those of `config`'s own plan. folder: of the run, where teachers may have been imported before.
    """
    stages = build_plan(config) if stages is None else stages
    check_plan(config, stages, graph, world, folder)
    if config.engine.name == "deepspeed":
        tensors = {"relation": torch.empty(0, dtype=dtype_of(config))}
        for one in (one for stage in stages for one in stage.configs):
            check_supported(one.optimizer.name, config.engine.zero, tensors)
    return stages


def open_run(
    config: RunConfig,
    graph: Graph,
    ranks: Ranks,
    folder: Path,
    tracking: Tracking,
    display: Display,
    watch: Watch | None = None,
) -> Run:
    """What stages of a plan share in one process group. All ranks call it."""
    train = shared_answers(ranks, [graph.train], graph.num_entities)
    everything = shared_answers(ranks, [graph.train, graph.valid, graph.test], graph.num_entities)
    return Run(config, graph, ranks, folder, tracking, display, train, everything, watch, open_storage(config, folder))


def tags_of(config: RunConfig, world: int | str, device: str) -> dict[str, str]:
    """Of the plan's run: the code, the machine and the protocol."""
    tags = {"git_sha": git_sha(), "world": str(world), "device": device}
    return tags | {f"protocol.{key}": str(value) for key, value in protocol(config.ties, config.filter).items()}


@contextmanager
def closing(tracking: Tracking, folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Close a run as its block ends; with those files of `folder` that are there, where the block came to its end."""
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        files = [folder / name for name in names if (folder / name).exists()]
        tracking.finish(status, files if status == "FINISHED" else [])


def run_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """One stage's row of the report; trains it unless it is finished."""
    folder = run.stage_folder(stage.name)
    stage, chosen = settled(run, stage)
    row = finished_row(run.config, run.graph.identity, run.folder, stage)
    if row is not None:
        upload_stage(run.storage, stage.name, run.ranks)
        run.display.line(f"{stage.name}: finished before, valid MRR {fixed(mrr_of(row, 'valid'), 4)}")
        return row
    digest = stage_digest(run.config, run.graph.identity, run.folder, stage)
    tracking = run.tracking.stage(stage.name, stage.config.model_dump(mode="json"), {"method": stage.config.method})
    status: Status = "FAILED"
    try:
        early = open_early(run, stage)
        teachers = [early.model] if early else [load_teacher(run, name) for name in stage.teachers]
        brought = [] if early else rank_brought(run, stage, teachers)  # before a method may train them on
        job = build_job(run, stage, digest, tracking, teachers)
        job.early = early
        progress = train_stage(job)
        row = finish_stage(run, stage, job.method.output_model, progress) | chosen
        row |= {"brought": brought} if brought else {}
        row |= {"early_steps": progress.early_steps} if stage.overlap else {}
        row |= job.method.report(partial(run.curve, job.method.output_model), run.splits)
        if "curve" in row:
            dims = next(iter(row["curve"].values()))
            row["crop_bytes"] = crop_bytes(job.method.output_model, [int(dim) for dim in dims], row["bytes"])
        result = json.dumps({**row, "digest": digest}, indent=2) + "\n"
        on_first(run.ranks, partial(write_atomic, folder / RESULT, result))
        upload_stage(run.storage, stage.name, run.ranks)
        status = "FINISHED"
    finally:
        if run.storage is not None:
            run.storage.wait()
        found = {} if status != "FINISHED" else flatten_metrics(row or {})
        # What is registered is not stored twice.
        sent = status == "FINISHED" and stage.name not in registered_stages(run.config)
        tracking.finish(status, folder / "model" if sent else None, found)
    scores = ", ".join(f"{split} MRR {fixed(mrr_of(row, split), 4)}" for split in run.splits)
    run.display.line(f"{stage.name}: done in {row['seconds']:.0f} s, {scores}")
    return row


def finished_row(config: RunConfig, sha256: str, folder: Path, stage: Stage) -> dict[str, Any] | None:
    """The row of a stage that is finished in the run folder, None of one that is not.

    sha256: the data's `identity`. Raises ConfigError when the stage was made by another config, data set or teacher.
    """
    made = stage_folder(folder, stage.name)
    row = read_result(made)
    if row is None:
        return None
    if stage.choice is not None:
        stage = replace(stage, config=stage.choice.configs[row["chosen"]["winner"]], choice=None)
    if row.pop("digest") != stage_digest(config, sha256, folder, stage):
        raise ConfigError(f"{made} was made by another config, data set or teacher; use another --out.")
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
    """Of a finished stage of this run as its result says, or of a model elsewhere, ranked now.

    Raises ConfigError where there are no valid triples: nothing is chosen on none.
    """
    row = read_result(run.stage_folder(name))
    found = mrr_of(row or brought_row(run, name, load_teacher(run, name)), "valid")
    if found is None:
        raise ConfigError(f"{name} has no valid MRR, for {run.graph.name} has no valid triples.")
    return found


def finish_stage(run: Run, stage: Stage, student: Model, progress: Progress) -> dict[str, Any]:
    """Save the model, evaluate it, and say what the stage was."""
    folder = run.stage_folder(stage.name)
    config = stage.config
    about = {"data": run.graph.summary(), "source": anchored(run.config.data), "commit": git_sha()}
    about |= {"stage": stage.name, "method": config.method}
    save_model(folder / "model", student, run.graph, about)
    found = {split: run.evaluate(student, split) for split in run.splits}
    last = run.shown_split
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
        "joules": progress.joules,
        "train_seconds": progress.train_seconds,
        "steps": progress.step,
        "triples_per_second": triples / max(progress.train_seconds, 1e-9),
        "best_step": progress.best_step,
        **{split: found[split][0] for split in run.splits},
        f"{last}_by": details,
    }


def make_report(
    config: RunConfig, graph: Graph, rows: list[dict[str, Any]], world: int | str, device: str
) -> dict[str, Any]:
    """report.json's content."""
    rows = with_brought(rows)
    said = [*warnings_of(rows), *remarks(rows), *(f"Data: {one}." for one in graph.warnings)]
    return {
        "name": config.name,
        "data": graph.summary(),
        "protocol": protocol(config.ties, config.filter),
        "seed": config.seed,
        "world": world,
        "device": device,
        "machine": machine(),
        "stages": rows,
        **({"remarks": said} if said else {}),
    }


def stage_digest(config: RunConfig, data_sha256: str, run_folder: Path, stage: Stage) -> str:
    """sha256 of what determines a stage's result: its config, seed, dtype, data, and the teachers' files.

    A teacher that may still be in training has no files yet: what determines its own result stands for them.
    """
    recipes = {one.name: one for one in build_plan(config)} if stage.overlap else {}
    teachers = {}
    for name in stage.teachers:
        if name in recipes:
            teachers[name] = stage_digest(config, data_sha256, run_folder, recipes[name])
            continue
        folder = find_model(teacher_folder(run_folder, name))
        teachers[name] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    content = {
        "stage": stage.config.model_dump(mode="json") | ({"overlap": stage.overlap} if stage.overlap else {}),
        "seed": config.seed,
        "dtype": config.dtype,
        "data": data_sha256,
        "teachers": teachers,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flatten_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """valid and test metrics of a report row as flat names; of an empty split none."""
    found = {split: known_figures(row.get(split, {})) for split in ("valid", "test")}
    return {f"final/{split}/{name}": float(value) for split in found for name, value in found[split].items()}
