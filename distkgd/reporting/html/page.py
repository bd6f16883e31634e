"""The page: what is said in words and tables, the figures in order, and the template they are put into.

Nothing is computed here that `report.json`, `plan.yaml`, a stage's `metrics.jsonl` or `examples.json` does not hold.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from distkgd.common.files import write_atomic
from distkgd.common.paths import AnyPath
from distkgd.common.text import NONE, count_text, fixed, of_bits, redact, seconds_text
from distkgd.config.tree import read_yaml
from distkgd.data import Graph, load_graph
from distkgd.distributed.ownership import owned
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError
from distkgd.models.model_folder import find_model, read_json
from distkgd.reporting.html.examples import examples
from distkgd.reporting.html.figures import Section, answer_figures, parts_section, training_section
from distkgd.reporting.html.frontier import frontier_section
from distkgd.reporting.html.pairs import Pair, pair_of
from distkgd.reporting.report import (
    HEADER,
    choices,
    comparisons,
    data_line,
    difference,
    few_bits,
    protocol_line,
    rows,
    served,
    write_report,
)
from distkgd.reporting.run_report import MEASURED, REPORT, RunReport, read_report

FILE, FRONTIER = "report.html", "frontier.html"
QUERIES = 200
FIRST = {"stage": 0, "test MRR": 1, "valid MRR": 2}  # columns that a telephone shows without scrolling


def write_html(folder: Path, report: RunReport, load: Callable[[], Graph], queries: int = QUERIES) -> list[str]:
    """Write `report.html` and `frontier.html`, the first chart of it alone, into a run folder.

    `examples.json` too, if models have to be asked for the page.

    load: the run's graph, wanted only for that. queries: asked of the last split, of large tables fewer; 0: none.

    Returns what could not be shown, and why.
    """
    page, missing = render(folder, report, load, queries)
    write_atomic(folder / FILE, page)
    write_atomic(folder / FRONTIER, page_of(report, frontier_section(report)))
    return missing


def page_of(report: RunReport, section: Section) -> str:
    """A page of some figures alone."""
    return _template().render(report=report, sections=[section], alone=True)


def remake(folder: AnyPath, data: str | None = None, queries: int | None = None) -> tuple[Path, list[str]]:
    """Write `report.html` of a run folder again: its path, and what could not be shown.

    data, queries: in place of those in plan.yaml.

    Raises ConfigError where there is no finished run, or a launch is at work in it.
    """
    folder, notes = Path(folder), list[str]()
    read_run(folder)
    with owned(folder, Ranks(), notes.append):
        report, config = read_run(folder)
        notes += _remade(folder, report, config, data, queries)
    return folder / FILE, notes


def keep_measured(folder: Path, measured: Mapping[str, Any]) -> list[str]:
    """Put what was measured of a run's endpoints into its reports, if it has any: what could not be shown."""
    if not (folder / REPORT).is_file():
        return []
    notes: list[str] = []
    with owned(folder, Ranks(), notes.append):
        report, config = read_run(folder)
        write_atomic(folder / MEASURED, json.dumps(measured, indent=2) + "\n")
        report = report.model_copy(update={"serving": dict(measured)})
        write_report(folder, report)
        notes += _remade(folder, report, config)
    return notes


def _remade(
    folder: Path, report: RunReport, config: Mapping[str, Any], data: str | None = None, queries: int | None = None
) -> list[str]:
    given = (config.get("report") or {}).get("queries", QUERIES)  # runs of before have none
    load = partial(load_graph, str(config["data"]) if data is None else data)
    return write_html(folder, report, load, int(given) if queries is None else queries)


def read_run(folder: AnyPath) -> tuple[RunReport, dict[str, Any]]:
    """report.json of a finished run, and its config, `data` found from anywhere; ConfigError where there is none."""
    folder = Path(folder)
    try:
        report, plan = read_report(folder), read_yaml(folder / "plan.yaml")
        config = plan["config"] | {"data": plan.get("source", plan["config"]["data"])}  # runs of before have no source
        _ = report.protocol["ties"], report.protocol["filter"]
    except (DistkgdError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder} is no folder of a finished run: report.json or plan.yaml is missing or damaged ({error}); "
            "give the folder that distkgd distill or distkgd chain wrote, with --resume to finish it first."
        ) from None
    return report, config


def render(folder: Path, report: RunReport, load: Callable[[], Graph], queries: int = QUERIES) -> tuple[str, list[str]]:
    """The page of a run, and what could not be shown; see `write_html`."""
    pair = pair_of(report, folder)
    asked, missing = _asked(folder, report, load, pair, queries)
    answers = Section("answers", "Question by question", missing=missing)
    if asked is not None and pair is not None:
        answers.figures += answer_figures(asked, pair)
    sections = [frontier_section(report), training_section(report, folder), parts_section(report, pair), answers]
    order = sorted(range(len(HEADER)), key=lambda column: FIRST.get(HEADER[column], len(FIRST)))
    page = _template().render(
        report=report,
        alone=False,
        split=report.shown_split,
        lead=_lead(report),
        keys=_keys(report),
        header=[HEADER[column] for column in order],
        results=[[row[column] for column in order] for row in rows(report)],
        uses=_uses(report),
        roles=[report.role_of(stage) for stage in report.stages],
        remarks=[
            *comparisons(report),
            *choices(report.stages),
            *few_bits(report),
            *served(report.serving),
            *report.remarks,
        ],
        sections=sections,
        asked=asked,
        pair=pair,
        protocol=protocol_line(report),
        data=data_line(report),
        took=_took(report),
        facts=_facts(report),
        hashes=_hashes(folder, report),
        config=_config(folder),
    )
    return page, [sentence for section in sections for sentence in section.missing]


@cache
def _template() -> Template:
    """Compiled once a process: that takes four times as long as a page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fixed"] = fixed
    environment.filters["rank"] = _rank
    return environment.get_template("page.html.j2")


def _asked(
    folder: Path, report: RunReport, load: Callable[[], Graph], pair: Pair | None, queries: int
) -> tuple[dict[str, Any] | None, list[str]]:
    if pair is None:
        return None, ["This run has one model, and nothing to hold beside it."]
    if pair.stages[1].mrr(report.shown_split) is None:
        return None, ["This run's data has neither test nor valid triples to ask for."]
    if not queries:
        return None, ["No questions were asked for this page (report.queries: 0)."]
    try:
        return examples(folder, report, load, pair, queries), []
    except DistkgdError as error:
        return None, [f"The models could not be asked: {str(error).rstrip('.')}."]


def _lead(report: RunReport) -> str:
    student, data = report.student, report.data.name
    size = f"{student.dim} numbers per entity"
    size += of_bits(student.bits)
    if student.teachers:
        pupils = "distilled" if student.method != "iterde" else "distilled step by step"
        return f"{student.scorer}, {pupils} to {size} by {student.method}, on {data}."
    return f"{student.scorer} of {size}, trained by {student.method}, on {data}."


def _keys(report: RunReport) -> list[tuple[str, str]]:
    """(figure, what it is) of the student: at most four."""
    split, student = report.shown_split, report.student
    texts = dict(zip(HEADER, rows(report)[report.stages.index(student)], strict=True))
    found = [(fixed(student.mrr(split)), f"{split} MRR of {student.name}")]
    if texts["retained"] != NONE:
        found.append((texts["retained"], "of the teacher's test MRR kept"))
    if texts["smaller"] != NONE:
        found.append((texts["smaller"], "smaller than the teacher, on disk"))
    # A crop of a model is held beside the direct model of its own dim.
    crops = {dim: metrics["mrr"] for dim, metrics in student.curve.get(split, {}).items()}
    for direct in (stage for stage in report.stages if stage.is_direct):
        if direct is report.direct_of(student):
            words = f"{split} MRR over {direct.name}, equally small and trained without a teacher; one seed"
            found.append((difference(student.mrr(split), direct.mrr(split), split).split()[0], words))
        elif direct.dim in crops:
            words = f"{split} MRR of the first {direct.dim} numbers over {direct.name}, trained at that size; one seed"
            found.append((difference(crops[direct.dim], direct.mrr(split), split).split()[0], words))
    return found[:4]


def _uses(report: RunReport) -> str:
    """Commands, and lines of Python, that use the student, in the run folder."""
    model = report.student.folder_in(Path())
    path = shlex.quote(str(model))
    return f"""distkgd predict {path} --head ENTITY --relation RELATION --top 10
distkgd export {path} exported --format numpy
distkgd register .

import distkgd
model = distkgd.load({str(model)!r})
model.predict(head="ENTITY", relation="RELATION")"""


def _took(report: RunReport) -> list[list[str]]:
    """Rows: stage, wall-clock seconds, those in training steps, steps, triples per second, energy."""
    return [
        [
            stage.name,
            seconds_text(stage.seconds),
            seconds_text(stage.train_seconds),
            count_text(stage.steps),
            count_text(stage.triples_per_second),
            "not known" if stage.joules is None else f"{stage.joules / 1000:,.2f} kJ",
        ]
        for stage in report.trained
    ]


def _facts(report: RunReport) -> list[tuple[str, str]]:
    machine = report.machine
    joules = [stage.joules for stage in report.trained]
    known = [one for one in joules if one is not None]
    energy = "not known (the machine shows no energy counters)"
    if known and len(known) == len(joules):
        energy = f"{sum(known) / 1000:,.2f} kJ: processors and memory of the first rank's machine, all that ran on it"
    elif known:
        energy = "known of some stages only"
    return [
        ("seed", str(report.seed)),
        ("processes", str(report.world)),
        ("device", report.device),
        ("processor", f"{machine.get('cpu', 'not known')}, {machine.get('cores', '?')} cores"),
        ("versions", f"Python {machine.get('python', '?')}, torch {machine.get('torch', '?')}"),
        ("commit of the code", str(machine.get("commit", "not known"))),
        ("wall-clock, all stages", f"{seconds_text(sum(stage.seconds or 0.0 for stage in report.stages))} s"),
        ("energy, all stages", energy),
    ]


def _hashes(folder: Path, report: RunReport) -> list[tuple[str, str]]:
    """(what, sha256) of the data and of every model's table files."""
    found = [(f"data {report.data.name}", report.data.sha256)]
    for stage in report.stages:
        try:
            config = read_json(find_model(stage.folder_in(folder)) / "config.json")
        except DistkgdError:
            found.append((stage.name, "the model is no longer in the run folder"))
            continue
        found += [(f"{stage.name} / {file}", str(digest)) for file, digest in config.get("sha256", {}).items()]
    return found


def _config(folder: Path) -> str:
    try:
        text = (folder / "plan.yaml").read_text(encoding="utf-8")
    except OSError:
        return "plan.yaml is no longer in the run folder."
    return redact(text)


def _rank(value: float) -> str:
    """1, 12.5: a rank among equals is a mean."""
    return f"{value:,.1f}".removesuffix(".0")
