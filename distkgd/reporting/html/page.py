"""The page: what is said in words and tables, the figures in order, and the template they are put into.

Nothing is computed here that `report.json`, `plan.yaml`, a stage's `metrics.jsonl` or `examples.json` does not hold.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distkgd.common.files import write_atomic
from distkgd.common.paths import AnyPath
from distkgd.common.text import NONE, fixed, seconds_text
from distkgd.config.tree import read_yaml
from distkgd.data import Graph, load_graph
from distkgd.distributed.ownership import owned
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError
from distkgd.models.model_folder import find_model, read_json
from distkgd.models.run_paths import folder_of
from distkgd.reporting.endpoints import MEASURED, sentences
from distkgd.reporting.html.examples import examples
from distkgd.reporting.html.figures import (
    Section,
    answer_figures,
    parts_section,
    role_of,
    size_section,
    training_section,
)
from distkgd.reporting.html.pairs import Pair, pair_of, student_of
from distkgd.reporting.report import (
    HEADER,
    NUM_TEXT_COLUMNS,
    choices,
    comparisons,
    data_line,
    difference,
    is_direct,
    last_split,
    mrr_of,
    protocol_line,
    rows,
    trained,
    write_report,
)

FILE = "report.html"
QUERIES = 200


def write_html(folder: Path, report: Mapping[str, Any], load: Callable[[], Graph], queries: int = QUERIES) -> list[str]:
    """Write `report.html` into a run folder, and `examples.json` if models have to be asked for it.

    load: the run's graph, wanted only for that. queries: asked of the last split, of large tables fewer; 0: none.

    Returns what could not be shown, and why.
    """
    page, missing = render(folder, report, load, queries)
    write_atomic(folder / FILE, page)
    return missing


def remake(folder: AnyPath, data: str | None = None, queries: int | None = None) -> tuple[Path, list[str]]:
    """Write `report.html` of a run folder again: its path, and what could not be shown.

    data, queries: in place of those in plan.yaml.

    Raises ConfigError where there is no finished run, or a launch is at work in it.
    """
    folder = Path(folder)
    read_run(folder)
    notes: list[str] = []
    with owned(folder, Ranks(), notes.append):
        notes += _remade(folder, data, queries)
    return folder / FILE, notes


def keep_measured(folder: Path, measured: Mapping[str, Any]) -> list[str]:
    """Put what was measured of a run's endpoints into its reports, if it has any: what could not be shown."""
    if not (folder / "report.json").is_file():
        return []
    notes: list[str] = []
    with owned(folder, Ranks(), notes.append):
        write_atomic(folder / MEASURED, json.dumps(measured, indent=2) + "\n")
        write_report(folder, read_json(folder / "report.json"))
        notes += _remade(folder)
    return notes


def _remade(folder: Path, data: str | None = None, queries: int | None = None) -> list[str]:
    report, config = read_run(folder)
    given = (config.get("report") or {}).get("queries", QUERIES)  # runs of before have none
    load = partial(load_graph, str(config["data"]) if data is None else data)
    return write_html(folder, report, load, int(given) if queries is None else queries)


def read_run(folder: AnyPath) -> tuple[dict[str, Any], dict[str, Any]]:
    """report.json of a finished run, and its config, `data` found from anywhere; ConfigError where there is none."""
    folder = Path(folder)
    try:
        report, plan = read_json(folder / "report.json"), read_yaml(folder / "plan.yaml")
        config = plan["config"] | {"data": plan.get("source", plan["config"]["data"])}  # runs of before have no source
        for stage in report["stages"]:
            _ = stage["name"], stage["teachers"]
        _ = report["stages"][0], report["data"]["sha256"], report["protocol"]["ties"], config["data"]
    except (DistkgdError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder} is no folder of a finished run: report.json or plan.yaml is missing or damaged ({error}); "
            "give the folder that launch/distill.py or launch/chain.py wrote, with --resume to finish it first."
        ) from None
    return report, config


def render(
    folder: Path, report: Mapping[str, Any], load: Callable[[], Graph], queries: int = QUERIES
) -> tuple[str, list[str]]:
    """The page of a run, and what could not be shown; see `write_html`."""
    pair = pair_of(report, folder)
    asked, missing = _asked(folder, report, load, pair, queries)
    answers = Section("answers", "Question by question", missing=missing)
    if asked is not None and pair is not None:
        answers.figures += answer_figures(asked, pair)
    sections = [size_section(report), training_section(report, folder), parts_section(report, pair)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markup"] = Markup  # of our own charts, which escape what they write
    environment.filters["fixed"] = fixed
    environment.filters["rank"] = _rank
    stages = report["stages"]
    page = environment.get_template("page.html.j2").render(
        report=report,
        split=last_split(stages),
        lead=_lead(report),
        keys=_keys(report),
        header=HEADER,
        text_columns=NUM_TEXT_COLUMNS,
        table=[(role_of(stage, stages), row) for stage, row in zip(stages, rows(report), strict=True)],
        remarks=[*comparisons(stages), *choices(stages), *sentences(report), *report.get("remarks", [])],
        sections=sections,
        answers=answers,
        asked=asked,
        pair=pair,
        protocol=protocol_line(report),
        data=data_line(report["data"]),
        took=_took(report),
        facts=_facts(report),
        hashes=_hashes(folder, report),
        config=_config(folder),
    )
    return page, [sentence for section in (*sections, answers) for sentence in section.missing]


def _asked(
    folder: Path, report: Mapping[str, Any], load: Callable[[], Graph], pair: Pair | None, queries: int
) -> tuple[dict[str, Any] | None, list[str]]:
    if pair is None:
        return None, ["This run has one model, and nothing to hold beside it."]
    if mrr_of(pair.stages[1], last_split(report["stages"])) is None:
        return None, ["This run's data has neither test nor valid triples to ask for."]
    if not queries:
        return None, ["No questions were asked for this page (report.queries: 0)."]
    try:
        return examples(folder, report, load, pair, queries), []
    except DistkgdError as error:
        return None, [f"The models could not be asked: {str(error).rstrip('.')}."]


def _lead(report: Mapping[str, Any]) -> str:
    student = student_of(report["stages"])
    size = f"{student['dim']} numbers per entity"
    data = report["data"]["name"]
    if student["teachers"]:
        pupils = "distilled" if student["method"] != "iterde" else "distilled step by step"
        return f"{student['scorer']}, {pupils} to {size} by {student['method']}, on {data}."
    return f"{student['scorer']} of {size}, trained by {student['method']}, on {data}."


def _keys(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it is) of the student: at most four."""
    stages = report["stages"]
    split = last_split(stages)
    student = student_of(stages)
    texts = dict(zip(HEADER, rows(report)[stages.index(student)], strict=True))
    found = [(fixed(mrr_of(student, split)), f"{split} MRR of {student['name']}")]
    if texts["retained"] != NONE:
        found.append((texts["retained"], "of the teacher's test MRR kept"))
    if texts["smaller"] != NONE:
        found.append((texts["smaller"], "smaller than the teacher, on disk"))
    # A crop of a model is held beside the direct model of its own dim.
    crops = {int(dim): {split: found} for dim, found in (student.get("curve") or {}).get(split, {}).items()}
    for direct in (stage for stage in stages if is_direct(stage)):
        if direct["dim"] == student["dim"]:
            words = f"{split} MRR over {direct['name']}, equally small and trained without a teacher"
            found.append((difference(student, direct, split).split()[0], words))
        elif direct["dim"] in crops:
            words = f"{split} MRR of the first {direct['dim']} numbers over {direct['name']}, trained at that size"
            found.append((difference(crops[direct["dim"]], direct, split).split()[0], words))
    return found[:4]


def _took(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows: stage, wall-clock seconds, those in training steps, steps, triples per second, energy."""
    found = []
    for stage in trained(report["stages"]):
        joules = stage.get("joules")
        found.append(
            [
                str(stage["name"]),
                seconds_text(stage.get("seconds")),
                seconds_text(stage.get("train_seconds")),
                f"{stage['steps']:,}" if "steps" in stage else NONE,
                f"{stage['triples_per_second']:,.0f}" if "triples_per_second" in stage else NONE,
                "not known" if joules is None else f"{joules / 1000:,.2f} kJ",
            ]
        )
    return found


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = report.get("machine") or {}
    seconds = [stage["seconds"] for stage in report["stages"] if stage.get("seconds") is not None]
    joules = [stage.get("joules") for stage in trained(report["stages"])]
    known = [one for one in joules if one is not None]
    energy = "not known (the machine shows no energy counters)"
    if known and len(known) == len(joules):
        energy = f"{sum(known) / 1000:,.2f} kJ: processors and memory of the first rank's machine, all that ran on it"
    elif known:
        energy = "known of some stages only"
    return [
        ("seed", str(report.get("seed", NONE))),
        ("processes", str(report.get("world", NONE))),
        ("device", str(report.get("device", NONE))),
        ("processor", f"{machine.get('cpu', 'not known')}, {machine.get('cores', '?')} cores"),
        ("versions", f"Python {machine.get('python', '?')}, torch {machine.get('torch', '?')}"),
        ("commit of the code", str(machine.get("commit", "not known"))),
        ("wall-clock, all stages", f"{seconds_text(sum(seconds))} s"),
        ("energy, all stages", energy),
    ]


def _hashes(folder: Path, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, sha256) of the data and of every model's table files."""
    found = [(f"data {report['data']['name']}", str(report["data"].get("sha256", "not known")))]
    for stage in report["stages"]:
        try:
            config = read_json(find_model(folder_of(folder, stage)) / "config.json")
        except DistkgdError:
            found.append((str(stage["name"]), "the model is no longer in the run folder"))
            continue
        found += [(f"{stage['name']} / {file}", str(digest)) for file, digest in config.get("sha256", {}).items()]
    return found


def _config(folder: Path) -> str:
    try:
        text = (folder / "plan.yaml").read_text(encoding="utf-8")
    except OSError:
        return "plan.yaml is no longer in the run folder."
    return re.sub(r"(://[^/:@\s]*:)[^@/\s]+@", r"\1***@", text)  # the password of a database


def _rank(value: float) -> str:
    """1, 12.5: a rank among equals is a mean."""
    return f"{value:,.1f}".removesuffix(".0")
