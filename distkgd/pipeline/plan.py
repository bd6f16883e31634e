"""Running a plan: its stages in order, inside this process group.

runs/NAME/
  plan.yaml                      the resolved config and its stages
  stages/STAGE/checkpoint/       resumable state; model/ the finished model; metrics.jsonl; result.json
  report.json  report.md         what came out
  report.html  frontier.html     the same as a page, and the first chart of it alone
  examples.json                  the answers that the page shows
  run.log                        what was said while it ran, with the time, and the traceback of what ended it
  mlflow.json                    run ids, so that a resumed run continues its curves
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distkgd.common.console import Display
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
from distkgd.evaluation.ranking import protocol
from distkgd.models.model_folder import find_model, read_json, save_model, table_bytes
from distkgd.models.run_paths import stage_folder, teacher_folder
from distkgd.models.stage_result import Chosen, StageResult, read_result
from distkgd.pipeline.config import RunConfig, resolved
from distkgd.pipeline.foreign_reports import brought_result, rank_brought, warnings_of, with_brought
from distkgd.pipeline.foreign_teachers import bring_teachers
from distkgd.pipeline.overlap import early_starts, open_early
from distkgd.pipeline.registration import register_run, registered_stages
from distkgd.pipeline.run_folder import LOG, prepare_folder
from distkgd.pipeline.stage_job import Run, build_job, dtype_of, load_teacher
from distkgd.pipeline.stages import Plan, Stage, build_plan, check_plan
from distkgd.pipeline.storage import download_run, find_run, open_storage, upload_stage
from distkgd.reporting.html import write_html
from distkgd.reporting.report import write_report
from distkgd.reporting.run_report import MEASURED, Data, RunReport, Verdict
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.tracking.mlflow_store import resolve_uri
from distkgd.tracking.serving.entries import size_alias
from distkgd.tracking.tracker import Status, Tracking
from distkgd.training.job import Job, Progress, Watch
from distkgd.training.loop import train_stage

REPORTS = ("report.json", "report.md", "report.html", "frontier.html")


class Addition(NamedTuple):
    """What is added to a report once all stages of the plan are finished. remarks: said before all others.

    results: of further stages, or in place of those of the same names.
    """

    results: Sequence[StageResult] = ()
    remarks: Sequence[str] = ()
    budget: Verdict | None = None


def run_plan(
    config: RunConfig,
    graph: Graph,
    ranks: Ranks,
    folder: AnyPath,
    *,
    resume: bool,
    display: Display,
    stages: Sequence[Stage] | None = None,
    watch: Watch | None = None,
    write: Callable[[], None] = lambda: None,
    further: Callable[[Run, list[StageResult]], Addition] = lambda _run, _results: Addition(),
) -> RunReport:
    """Train every unfinished stage, write the report, and return it.

    stages: of a `checked_plan`, in place of those of `config`'s own. watch: see `Job`. write: puts more
        into the run folder than plan.yaml, on the first rank. further: what follows from the results of the stages.
    Raises ConfigError when `folder` already holds a run and resume is off, or another launch is at work in it.
    """
    folder = Path(folder)
    plan = checked_plan(config, graph, folder, ranks.world) if stages is None else Plan(config, graph, folder, stages)
    if config.mlflow.enabled:
        resolve_uri(config.mlflow.uri, folder)  # refused before anything is written
    tags, say = tags_of(config, ranks.world, str(ranks.device)), display.line
    with (
        owned(folder, ranks, say) as agents,
        opened(plan, ranks, resume, agents, tags, say, config.mlflow.uri, write) as tracking,
        display.kept(folder / LOG, ranks.rank),
    ):
        if any(stage.overlap for stage in plan.stages):
            say("chain.overlap: every teacher is finished before its student begins; distkgd chain overlaps them")
        run = open_run(plan, ranks, tracking, display, watch)
        results = [run_stage(run, stage) for stage in plan.stages]
        added = further(run, results)
        keys = {} if added.budget is None else {"budget": added.budget}
        results = list({one.name: one for one in (*results, *added.results)}.values())
        report = make_report(plan, results, ranks.world, str(ranks.device), added.remarks, **keys)
        # Asking the models of a large run may take longer than the other ranks would wait in a collective.
        on_first(ranks, partial(leave_reports, plan, report, tracking, say))
    return report


@contextmanager
def opened(
    plan: Plan,
    ranks: Ranks,
    resume: bool,
    agents: Sequence[str],
    tags: Mapping[str, str],
    say: Callable[[str], None],
    uri: str | None,
    write: Callable[[], None] = lambda: None,
) -> Iterator[Tracking]:
    """A run's folder made or taken up, its teachers brought, and its tracking, closed as the block ends.

    agents: as `owned` has them. uri: of MLflow's store. write: as `run_plan` has it. All ranks call it.
    """
    config, folder = plan.config, plan.folder
    storage = find_run(config, folder, ranks, resume)
    prepare_folder(plan, ranks, resume, agents, write)
    download_run(storage, [stage.name for stage in plan.stages], ranks)
    for line in bring_teachers(plan, plan.stages, ranks):
        say(line)
    enabled, active = config.mlflow.enabled, ranks.first
    tracking = open_tracking(run_folder=folder, name=config.name, uri=uri, enabled=enabled, active=active)
    tracking.start(resolved(config), tags, plan.graph.summary())
    with closing(tracking, folder, (*REPORTS, "plan.yaml")):
        yield tracking


def leave_reports(plan: Plan, report: RunReport, tracking: Tracking, say: Callable[[str], None]) -> None:
    """All that a finished plan leaves of `REPORTS`, and its models in the registry if its config asks for that."""
    folder, wanted = plan.folder, plan.config.report
    if (folder / MEASURED).is_file():
        report = report.model_copy(update={"serving": read_json(folder / MEASURED)})
    write_report(folder, report)
    if wanted.html:
        write_html(folder, report, lambda: plan.graph, wanted.queries)
    tracking.log(report.headline_metrics)
    register_run(plan, report, tracking, say)


def checked_plan(
    config: RunConfig, graph: Graph, folder: Path, world: int, stages: Sequence[Stage] | None = None
) -> Plan:
    """The plan of a run; ConfigError, UnsupportedError or ModelError for what could not work on this data.

    folder: of the run, where teachers may have been imported before. stages: in place of those of `config`'s own plan.
    """
    stages = build_plan(config) if stages is None else stages
    check_plan(config, stages, graph, world, folder)
    if config.engine.name == "deepspeed":
        tensors = {"relation": torch.empty(0, dtype=dtype_of(config))}
        for one in (one for stage in stages for one in stage.configs):
            check_supported(one.optimizer.name, config.engine.zero, tensors)
    return Plan(config, graph, folder, stages)


def open_run(plan: Plan, ranks: Ranks, tracking: Tracking, display: Display, watch: Watch | None = None) -> Run:
    """What stages of a plan share in one process group. All ranks call it."""
    graph, storage = plan.graph, open_storage(plan.config, plan.folder)
    train = shared_answers(ranks, [graph.train], graph.num_entities)
    everything = shared_answers(ranks, [graph.train, graph.valid, graph.test], graph.num_entities)
    shared = ranks, tracking, display, train, everything, watch, storage
    return Run(plan.config, graph, plan.folder, plan.stages, *shared)


def tags_of(config: RunConfig, world: int | str, device: str) -> dict[str, str]:
    """Of the plan's run: the code, the machine and the protocol."""
    tags = {"git_sha": git_sha(), "world": str(world), "device": device, "description": described(config)}
    return tags | {f"protocol.{key}": str(value) for key, value in protocol(config.ties, config.filter).items()}


def described(config: RunConfig) -> str:
    """What a plan trains, in one line."""
    student = config.student
    bits = "" if student.bits == 32 else f" in {student.bits} bits"
    teachers = "" if student.method == "scratch" else f" by {student.method}"
    return f"{student.scorer}, {student.dim} numbers{bits}, on {config.data}{teachers}"


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


def run_stage(run: Run, stage: Stage) -> StageResult:
    """One stage's result; trains it unless it is finished."""
    stage, chosen = settled(run, stage)
    result = finished_result(run, stage)
    if result is not None:
        upload_stage(run.storage, stage.name, run.ranks)
        run.display.line(f"{stage.name}: finished before, valid MRR {fixed(result.mrr('valid'), 4)}")
    else:
        result = _train(run, stage, chosen)
        scores = ", ".join(f"{split} MRR {fixed(result.mrr(split), 4)}" for split in run.splits)
        run.display.line(f"{stage.name}: done in {result.seconds:.0f} s, {scores}")
    run.results[stage.name] = result
    return result


def _train(run: Run, stage: Stage, chosen: Chosen | None) -> StageResult:
    folder = run.stage_folder(stage.name)
    digest, course = stage_digest(run, stage), stage_digest(run, stage, epochs=False)
    params, tags = stage.config.model_dump(mode="json"), {"method": stage.config.method}
    title = f"{run.config.name}/{size_alias(stage.name, stage.config.dim, stage.config.bits)}"
    tracking = run.tracking.stage(stage.name, params, tags, title)
    status: Status = "FAILED"
    metrics: dict[str, float] = {}
    try:
        early = open_early(run, stage)
        teachers = [early.model] if early else [load_teacher(run, name) for name in stage.teachers]
        brought = () if early else rank_brought(run, stage, teachers)  # before a method may train them on
        job = build_job(run, stage, course, tracking, teachers)
        job.early = early
        progress = train_stage(job)
        result = finish_stage(run, stage, job, progress, brought, chosen).model_copy(update={"digest": digest})
        on_first(run.ranks, partial(result.write, folder))
        upload_stage(run.storage, stage.name, run.ranks)
        status, metrics = "FINISHED", result.final_metrics()
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        if run.storage is not None:
            run.storage.wait()
        # What is registered is not stored twice.
        sent = status == "FINISHED" and stage.name not in registered_stages(run)
        tracking.finish(status, folder / "model" if sent else None, metrics)
    return result


def finished_result(plan: Plan, stage: Stage) -> StageResult | None:
    """The result of a stage that is finished in the run folder, None of one that is not.

    Raises ConfigError when the stage was made by another config, data set or teacher.
    """
    made = stage_folder(plan.folder, stage.name)
    result = read_result(made)
    if result is None:
        return None
    if stage.choice is not None and result.chosen is not None:
        stage = replace(stage, config=stage.choice.configs[result.chosen.winner], choice=None)
    if result.digest != stage_digest(plan, stage):
        if result.course == stage_digest(plan, stage, epochs=False):
            return None  # it has come to have more epochs
        raise ConfigError(f"{made} was made by another config, data set or teacher; use another --out.")
    return result


def settled(run: Run, stage: Stage) -> tuple[Stage, Chosen | None]:
    """`stage` with its choice made, and what its result says of that; finished stages always settle it the same way.

    The rule is that of DualDE sec. 4.1.3: the assistant whose directly trained model has the valid MRR nearest to the
    mean of the teacher's and the direct student's.
    """
    choice = stage.choice
    if choice is None:
        return stage, None
    ends = {name: valid_mrr(run, name) for name in choice.between}
    candidates = {name: valid_mrr(run, name) for name in choice.configs}
    middle = sum(ends.values()) / 2
    winner = min(candidates, key=lambda name: abs(candidates[name] - middle))
    config = choice.configs[winner]
    chosen = Chosen(between=ends, middle=middle, candidates=candidates, winner=winner, dim=config.dim)
    return replace(stage, config=config, choice=None), chosen


def valid_mrr(run: Run, name: str) -> float:
    """Of a finished stage of this run, which another process may have trained, or of a model elsewhere, ranked now.

    Raises ConfigError where there are no valid triples: nothing is chosen on none.
    """
    result = run.results.get(name) or read_result(run.stage_folder(name))
    found = (result or brought_result(run, name, load_teacher(run, name))).mrr("valid")
    if found is None:
        raise ConfigError(f"{name} has no valid MRR, for {run.graph.name} has no valid triples.")
    return found


def finish_stage(
    run: Run, stage: Stage, job: Job, progress: Progress, brought: tuple[StageResult, ...], chosen: Chosen | None
) -> StageResult:
    """Save the model, evaluate it, and say what the stage was."""
    folder, config, student = run.stage_folder(stage.name), stage.config, job.method.output_model
    about = {"data": run.graph.summary(), "source": anchored(run.config.data), "commit": git_sha()}
    about |= {"stage": stage.name, "method": config.method}
    save_model(folder / "model", student, run.graph, about)
    found = run.measured(student, folder)
    found |= job.method.report(partial(run.curve, student), run.splits)
    dims = list(next(iter(found.get("curve", {}).values()), {}))
    if dims and not student.quantisers:  # a crop of packed rows has no files of its own
        headers = found["bytes"] - table_bytes(student)
        found["crop_bytes"] = {dim: headers + table_bytes(student, dim) for dim in dims}
    if nested := config.distill.nested_bits:
        seen = {bits: student.in_bits(bits) for bits in nested}
        found["bits_bytes"] = {bits: {dim: table_bytes(one, dim) for dim in dims} for bits, one in seen.items()}
    found |= {} if chosen is None else {"chosen": chosen}
    if stage.name in run.config.all_teachers() and not student.quantisers:
        found |= {"rounded": {bits: run.rounded(student, bits) for bits in run.config.report.rounded}}
    found |= {"early_steps": progress.early_steps} if stage.overlap else {}
    return StageResult(
        name=stage.name,
        method=config.method,
        teachers=stage.teachers,
        seconds=progress.seconds,
        joules=progress.joules,
        train_seconds=progress.train_seconds,
        steps=progress.step,
        triples_per_second=progress.step * config.batch_size / max(progress.train_seconds, 1e-9),
        best_step=progress.best_step,
        brought=brought,
        course=job.digest,
        **found,
    )


def make_report(
    plan: Plan,
    results: Sequence[StageResult],
    world: int | str,
    device: str,
    remarks: Sequence[str] = (),
    **further: Any,
) -> RunReport:
    """What a finished plan tells. remarks: said before all others. further: fields of `RunReport`."""
    config, graph = plan.config, plan.graph
    report = RunReport(
        name=config.name,
        data=Data.model_validate(graph.summary()),
        protocol=protocol(config.ties, config.filter),
        seed=config.seed,
        world=world,
        device=device,
        machine=machine(),
        stages=tuple(with_brought(results)),
        **further,
    )
    data = (f"Data: {one}." for one in graph.warnings)
    said = (*remarks, *warnings_of(report), *early_starts(results), *data)
    return report.model_copy(update={"remarks": said}) if said else report


def stage_digest(plan: Plan, stage: Stage, *, epochs: bool = True) -> str:
    """sha256 of what determines a stage's result: its config, seed, dtype, data, and the teachers' files.

    epochs: whether their number is part of it; without, it is that of all checkpoints on the way to any number of them.
    A teacher that may still be in training has no files yet: what determines its own result stands for them.
    """
    teachers = {}
    for name in stage.teachers:
        if stage.overlap and (teacher := plan.stage(name)) is not None:
            teachers[name] = stage_digest(plan, teacher)
            continue
        folder = find_model(teacher_folder(plan.folder, name))
        teachers[name] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    without = None if epochs else {"epochs"}
    content = {
        "stage": stage.config.model_dump(mode="json", exclude=without)
        | ({"overlap": stage.overlap} if stage.overlap else {}),
        "seed": plan.config.seed,
        "dtype": plan.config.dtype,
        "data": plan.graph.identity,
        "teachers": teachers,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
