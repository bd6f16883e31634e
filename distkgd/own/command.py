"""The whole command: read, split, choose, forecast, write the choice down, train, judge."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distkgd.config import RunConfig, alone, load_tree, parse_config, resized
from distkgd.config_tree import merge
from distkgd.display import Display
from distkgd.distributed.model_files import atomic_folder
from distkgd.distributed.nodes import on_first, shared_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from distkgd.graph import Graph, load_graph
from distkgd.graph.formats import ABOUT, check_file, ending_of, expand
from distkgd.graph.split import Split, copy_folder, split_file
from distkgd.own import rules
from distkgd.own.budget import judge_crops, judge_student, out_of_reach, smallest_dim
from distkgd.own.forecast import forecast, free_memory, held_memory, told
from distkgd.own.wishes import Wishes
from distkgd.plan import Row, checked_plan, open_run, run_plan
from distkgd.report import write_atomic
from distkgd.run_folder import refuse_existing
from distkgd.stage_job import Run
from distkgd.stages import Stage
from distkgd.tracking import NoTracking

NOT_REACHABLE = 3  # exit code: the budget cannot be met
CONFIG = "config.yaml"


class Outcome(NamedTuple):
    """report: None where no training could have met the budget, and nothing was written. code: of the process."""

    folder: Path
    report: dict[str, Any] | None
    code: int


def run_config(
    config: RunConfig,
    ranks: Ranks,
    display: Display,
    out: Path | None = None,
    resume: bool = False,
    free: Collection[str] = (),
) -> Outcome:
    """Run the plan of a config on the data it names. All ranks call it.

    free: stages whose batches become smaller where the data does not fill them.
    """
    folder = out or Path("runs") / config.name
    on_first(ranks, partial(refuse_existing, folder, resume))
    graph = shared_graph(ranks, lambda: load_graph(config.data))
    config, changes = rules.fitted(config, len(graph.train), free)
    for warning in (*graph.warnings, *changes):
        display.warn(warning)
    return Outcome(folder, run_plan(config, graph, ranks, folder, resume=resume, display=display), 0)


def run_own(wishes: Wishes, ranks: Ranks, display: Display, out: Path | None = None, resume: bool = False) -> Outcome:
    """Do what `wishes` ask for in the run folder `out` (default runs/NAME). All ranks call it.

    Everything that can be refused is refused before the first file is written.
    """
    tree = load_tree(wishes.config, wishes.overrides)
    name = _data_name(wishes)
    tree.setdefault("name", f"{name}_{wishes.to or 'croppable'}")
    folder = out or Path("runs") / str(tree["name"])
    on_first(ranks, partial(refuse_existing, folder, resume))
    graph, split, notes = _data(wishes, name, ranks)
    for note in (*notes, *graph.warnings):
        display.warn(note)
    written = wishes.file or wishes.copied
    tree["data"] = wishes.data if written is None else str(folder / "data" / name)
    tree, croppable = _chosen(wishes, graph, tree)
    config = parse_config(tree, str(wishes.config or "the chosen config"))
    stages = checked_plan(config, graph, ranks.world)
    _check_budget(wishes, config, graph, croppable)
    if not (resume and (folder / "plan.yaml").exists()):
        reason = _announce(wishes, config, graph, ranks, folder, display, stages, croppable)
        if reason is not None:
            display.error(reason)
            return Outcome(folder, None, NOT_REACHABLE)

    def write() -> None:
        if split is not None:
            write_split(split, Path(config.data))
        _write_config(tree, folder / CONFIG, wishes)

    further = partial(_further, wishes=wishes, croppable=croppable, notes=notes)
    run = partial(run_plan, config, graph, ranks, folder, resume=resume, display=display)
    report = run(stages=stages, write=write, further=further)
    met = report.get("budget", {"met": True})["met"]
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


def _data(wishes: Wishes, name: str, ranks: Ranks) -> tuple[Graph, Split | None, list[str]]:
    """The graph; on ranks that have split it, the split; what is odd about its file."""
    made: list[Split] = []

    def load() -> Graph:
        if wishes.copied is not None:
            made.append(copy_folder(wishes.copied, name, wishes.how))
            return made[0].graph
        if wishes.file is None:
            return load_graph(wishes.data)
        made.append(split_file(wishes.file, name, seed=wishes.seed, allow_unseen=wishes.allow_unseen, how=wishes.how))
        return made[0].graph

    graph = shared_graph(ranks, load)
    notes: list[str] = ranks.gather_objects(list(made[0].notes) if made else [])[0]
    return graph, made[0] if made else None, notes


def _data_name(wishes: Wishes) -> str:
    path = expand(wishes.data)
    text = path.resolve().name if path.exists() else wishes.data
    if wishes.file is not None:
        check_file(wishes.file)
        text = wishes.file.name[: -len(ending_of(wishes.file.name) or "")]
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "graph"


def _chosen(wishes: Wishes, graph: Graph, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options of the rules with what was given over them, and whether a croppable model is to be judged."""
    if wishes.config is not None:
        return given, False
    student = given.get("student")
    method = student.get("method") if isinstance(student, Mapping) else None
    if wishes.to is not None:
        tree = rules.choose(graph, wishes.to)
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
    return merge(first | tree, given), wishes.to is None


def _check_budget(wishes: Wishes, config: RunConfig, graph: Graph, croppable: bool) -> None:
    """ConfigError where a budget could not be judged in the end."""
    if not wishes.budget:
        return
    if not len(graph.valid):
        raise ConfigError(
            f"{graph.name} has no valid triples to judge a budget by; give one file, which is then split."
        )
    if not croppable and wishes.budget.min_retained is not None and config.teacher is None:
        raise ConfigError("--min-retained compares with the teacher, and there is none; leave teacher alone.")


def _announce(
    wishes: Wishes,
    config: RunConfig,
    graph: Graph,
    ranks: Ranks,
    folder: Path,
    display: Display,
    stages: list[Stage],
    croppable: bool,
) -> str | None:
    """Say what will be done, in what memory and time; the reason why nothing can be, if the budget excludes it."""
    sizes = f"{graph.num_entities:,} entities, {graph.num_relations:,} relations"
    held = ", ".join(f"{len(getattr(graph, split)):,} {split}" for split in ("train", "valid", "test"))
    display.line(f"{graph.name}: {sizes}; triples: {held}")
    run = open_run(config, graph, ranks, folder, NoTracking(), display)
    if wishes.budget:
        reason = out_of_reach(run, config.student, smallest_dim(config.student), wishes.budget)
        if reason is not None:
            return reason
    if croppable:
        direct = alone(resized(config.student, config.student.dim, {"method": "scratch"}, "direct"))
        stages = [*stages, Stage("direct", direct, ())]
    lines = told(forecast(run, stages), held_memory(), free_memory())
    for line in lines:
        display.line(line)
    if croppable:
        display.line("direct has the dim of the chosen crop in the end, so it takes less than that")
    display.line(f"goes to {folder}; the choice is in {folder / CONFIG}, to be changed by key=value or by hand")
    return None


def _further(
    run: Run, rows: list[Row], *, wishes: Wishes, croppable: bool, notes: list[str]
) -> tuple[list[Row], dict[str, Any]]:
    """Judge the budget, and remark what is odd about the data."""
    judge: Callable[..., tuple[list[Row], dict[str, Any]]] = judge_crops if croppable else judge_student
    more, keys = judge(run, rows, budget=wishes.budget) if wishes.budget else ([], {})
    remarks = [*keys.get("remarks", []), *(f"Data: {note}." for note in notes)]
    return more, keys | ({"remarks": remarks} if remarks else {})


def _write_config(tree: dict[str, Any], path: Path, wishes: Wishes) -> None:
    """The config of this run, ready for `launch/distill.py`; one that is there is left to `plan.yaml`'s check."""
    if path.exists():
        return
    budget = f", {wishes.budget}" if wishes.budget else ""
    asked = f"{wishes.to} numbers per entity{budget}" if wishes.to else str(wishes.budget)
    head = (
        f"# Chosen for {wishes.data}: {asked}.\n# Again, or changed: python launch/distill.py {path} --out runs/again\n"
    )
    if wishes.config is not None:
        head = f"# {wishes.config} on {wishes.data}.\n"
    write_atomic(path, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
