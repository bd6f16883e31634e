"""The whole command: read, split, choose, forecast, write the choice down, train, judge."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.text import of_bits
from distkgd.config.tree import merge
from distkgd.data import Graph, load_graph
from distkgd.data.reading.formats import ABOUT, check_file, ending_of, expand
from distkgd.data.sharing import shared_graph
from distkgd.data.split import Split, copy_folder, split_file
from distkgd.distributed.checkpoint.tables import atomic_folder
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.autoconfig import rules
from distkgd.pipeline.autoconfig.budget import crop_dims, judge_student, out_of_reach, select_for_budget
from distkgd.pipeline.autoconfig.forecast import forecast, format_forecast, free_memory, held_memory
from distkgd.pipeline.autoconfig.request import DistillRequest
from distkgd.pipeline.autoconfig.same_bytes import beside_student
from distkgd.pipeline.autoconfig.sizes import most_ranked
from distkgd.pipeline.config import RunConfig, load_tree, parse_config
from distkgd.pipeline.plan import Addition, checked_plan, finished_result, open_run, run_plan
from distkgd.pipeline.run_folder import refuse_existing
from distkgd.pipeline.stage_job import Run
from distkgd.pipeline.stages import Plan, Stage
from distkgd.reporting.run_report import RunReport
from distkgd.tracking.tracker import NoTracking

NOT_REACHABLE = 3  # exit code: the budget cannot be met
CONFIG = "config.yaml"
DRY = "--dry-run: nothing was trained or written; without it the run goes to {}"


class Outcome(NamedTuple):
    """report: None where no training could have met the budget, and nothing was written; reason: why. code: of the
    process."""

    folder: Path
    report: RunReport | None
    code: int
    reason: str = ""


def run_config(
    config: RunConfig,
    ranks: Ranks,
    display: Display,
    out: Path | None = None,
    resume: bool = False,
    free: Collection[str] = (),
    dry_run: bool = False,
) -> Outcome:
    """Run the plan of a config on the data it names. All ranks call it.

    free: stages whose batches become smaller where the data does not fill them. dry_run: only say what it would take.
    """
    folder = out or Path("runs") / config.name
    on_first(ranks, partial(refuse_existing, folder, resume))
    graph = shared_graph(ranks, lambda: load_graph(config.data))
    config, changes = rules.fitted(config, len(graph.train), free)
    for warning in (*graph.warnings, *changes):
        display.warn(warning)
    if dry_run:
        plan = checked_plan(config, graph, folder, ranks.world)
        run = _described(plan, ranks, display)
        _say_forecast(run, _unfinished(plan) if resume else plan.stages)
        display.line(DRY.format(folder))
        return Outcome(folder, None, 0)
    return Outcome(folder, run_plan(config, graph, ranks, folder, resume=resume, display=display), 0)


def run_own(
    request: DistillRequest,
    ranks: Ranks,
    display: Display,
    out: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Do what `request` asks for in the run folder `out` (default runs/NAME). All ranks call it.

    Everything that can be refused is refused before the first file is written. dry_run: only say what it would take.
    """
    tree = load_tree(request.config, request.overrides)
    name = _data_name(request)
    size = f"{request.to or 'croppable'}" + (f"_{request.bits}bit" if request.bits < 32 else "")
    tree.setdefault("name", f"{name}_{size}")
    folder = out or Path("runs") / str(tree["name"])
    on_first(ranks, partial(refuse_existing, folder, resume))
    graph, split, notes = _data(request, name, ranks)
    for note in (*notes, *graph.warnings):
        display.warn(note)
    written = request.file or request.copied
    tree["data"] = request.data if written is None else str(folder / "data" / name)
    tree, croppable = _chosen(request, graph, tree)
    config = parse_config(tree, str(request.config or "the chosen config"))
    plan = checked_plan(config, graph, folder, ranks.world)
    _check_budget(request, config, graph, croppable)
    if dry_run or not (resume and (folder / "plan.yaml").exists()):
        reason = _announce(request, plan, ranks, display, croppable, _unfinished(plan) if resume else plan.stages)
        if reason is not None:
            display.error(reason)
            return Outcome(folder, None, NOT_REACHABLE, reason)
    if dry_run:
        display.line(DRY.format(folder))
        return Outcome(folder, None, 0)

    def write() -> None:
        if split is not None:
            write_split(split, Path(config.data))
        _write_config(tree, folder / CONFIG, request)

    further = partial(_further, request=request, croppable=croppable, notes=notes)
    run = partial(run_plan, config, graph, ranks, folder, resume=resume, display=display)
    report = run(stages=plan.stages, write=write, further=further)
    met = report.budget is None or report.budget.met
    return Outcome(folder, report, 0 if met else NOT_REACHABLE)


def write_split(split: Split, folder: Path) -> None:
    """Write a data set's folder, whole or not at all; one that is there must hold this very split."""
    if folder.exists():
        try:
            written = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, TypeError, KeyError):
            written = None
        if written == split.graph.sha256:
            return
        raise DataError(
            f"{folder} holds another split than {split.source} has now; choose another --out, or remove that folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, Ranks()) as part:
        for name, content in split.files.items():
            (part / f"{name}.tsv").write_bytes(content)
        (part / ABOUT).write_text(json.dumps(split.about(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _data(request: DistillRequest, name: str, ranks: Ranks) -> tuple[Graph, Split | None, list[str]]:
    """The graph; on ranks that have split it, the split; what is odd about its file."""
    made: list[Split] = []

    def load() -> Graph:
        if request.copied is not None:
            made.append(copy_folder(request.copied, name, request.how))
            return made[0].graph
        if request.file is None:
            return load_graph(request.data)
        made.append(
            split_file(request.file, name, seed=request.seed, allow_unseen=request.allow_unseen, how=request.how)
        )
        return made[0].graph

    graph = shared_graph(ranks, load)
    notes: list[str] = ranks.gather_objects(list(made[0].notes) if made else [])[0]
    return graph, made[0] if made else None, notes


def _data_name(request: DistillRequest) -> str:
    path = expand(request.data)
    text = path.resolve().name if path.exists() else request.data
    if request.file is not None:
        check_file(request.file)
        text = request.file.name[: -len(ending_of(request.file.name) or "")]
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "graph"


def _chosen(request: DistillRequest, graph: Graph, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options of the rules with what was given over them, and whether a croppable model is to be judged."""
    if request.config is not None:
        return given, False
    student = given.get("student")
    method = student.get("method") if isinstance(student, Mapping) else None
    if request.to is not None:
        tree = rules.choose(graph, request.to, request.bits)
        if method not in (None, tree["student"]["method"]):
            del tree["student"]["distill"]  # it is of the chosen method
    else:
        if method not in (None, "med"):
            raise ConfigError(
                f"a budget without --to is judged by the crops of one model, which student.method={method} does not "
                "make; leave it out, or add --to."
            )
        tree = rules.choose_croppable(graph)
    first = {"name": given["name"], "data": given["data"]}
    return merge(first | tree, given), request.to is None


def _check_budget(request: DistillRequest, config: RunConfig, graph: Graph, croppable: bool) -> None:
    """ConfigError where a budget could not be judged in the end."""
    if not request.budget:
        return
    student = config.student
    if croppable and (min(student.bits, student.relation_bits) < 32 or student.distill.nested_bits):
        raise ConfigError(
            "a budget without --to chooses the bits itself: leave student.bits, student.relation_bits and "
            "student.distill.bits out, or say --to and --bits."
        )
    if not len(graph.valid):
        raise ConfigError(
            f"{graph.name} has no valid triples to judge a budget by; give one file, which is then split."
        )
    if not croppable and request.budget.min_retained is not None and config.teacher is None:
        raise ConfigError("--min-retained compares with the teacher, and there is none; leave teacher alone.")


def _unfinished(plan: Plan) -> list[Stage]:
    return [stage for stage in plan.stages if finished_result(plan, stage) is None]


def _described(plan: Plan, ranks: Ranks, display: Display) -> Run:
    """The run of a plan that is not trained yet; says what its data are."""
    graph = plan.graph
    sizes = f"{graph.num_entities:,} entities, {graph.num_relations:,} relations"
    held = ", ".join(f"{len(getattr(graph, split)):,} {split}" for split in ("train", "valid", "test"))
    display.line(f"{graph.name}: {sizes}; triples: {held}")
    return open_run(plan, ranks, NoTracking(), display)


def _say_forecast(run: Run, stages: Sequence[Stage], rankings: int = 0) -> None:
    """rankings: further ones than those of the stages."""
    if not stages:
        run.display.line("every stage is finished")
        return
    for line in format_forecast(forecast(run, stages), held_memory(), free_memory(), rankings):
        run.display.line(line)


def _announce(
    request: DistillRequest, plan: Plan, ranks: Ranks, display: Display, croppable: bool, stages: Sequence[Stage]
) -> str | None:
    """Say what will be done, in what memory and time; the reason why nothing can be, if the budget excludes it."""
    config, folder = plan.config, plan.folder
    run = _described(plan, ranks, display)
    if request.budget:
        reason = out_of_reach(run, config.student, request.budget, croppable)
        if reason is not None:
            return reason
    rankings = 0
    if croppable:
        size, rankings = (config.student.dim, 2), most_ranked(len(crop_dims(config.student)))
        taught = Stage("student_few_bits", rules.few_bits(config.student, *size), ("student",))
        stages = [*stages, taught, Stage("direct", rules.direct_of(config.student, *size), ())]
    _say_forecast(run, stages, rankings)
    if croppable:
        display.line(
            "student_few_bits and direct have the dim and bits of the choice in the end, so they take less than that; "
            "where the choice has 32 bits only direct is trained"
        )
    display.line(f"goes to {folder}; the choice is in {folder / CONFIG}, to be changed by key=value or by hand")
    return None


def _further(
    run: Run, results: list[StageResult], *, request: DistillRequest, croppable: bool, notes: list[str]
) -> Addition:
    """Judge the budget, say what a student's bytes would carry besides, and remark what is odd about the data."""
    judge = select_for_budget if croppable else judge_student
    added = judge(run, results, budget=request.budget) if request.budget else Addition()
    beside = Addition() if request.to is None else beside_student(run, results)
    remarks = [*added.remarks, *beside.remarks, *(f"Data: {note}." for note in notes)]
    return added._replace(results=[*added.results, *beside.results], remarks=remarks)


def _write_config(tree: dict[str, Any], path: Path, request: DistillRequest) -> None:
    """The config of this run, ready for `distkgd distill`; one that is there is left to `plan.yaml`'s check."""
    if path.exists():
        return
    budget = f", {request.budget}" if request.budget else ""
    asked = f"{request.to} numbers per entity{of_bits(request.bits)}{budget}" if request.to else str(request.budget)
    head = f"# Chosen for {request.data}: {asked}.\n# Again, or changed: distkgd distill {path} --out runs/again\n"
    if request.config is not None:
        head = f"# {request.config} on {request.data}.\n"
    write_atomic(path, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
