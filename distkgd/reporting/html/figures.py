"""The figures of the report: which numbers of the run go into which chart, and what is said below it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distkgd.common.text import fixed
from distkgd.models.run_paths import stage_folder
from distkgd.models.stage_result import Parts, StageResult
from distkgd.reporting.html.charts import Bar, Bars, Chart, Matrix, Run, lines, scatter, timeline
from distkgd.reporting.html.curves import Curves, Points, read_curves
from distkgd.reporting.html.pairs import Pair
from distkgd.reporting.run_report import RunReport

RELATIONS = 12  # shown as bars; the table beside them has more
IN_TABLE = 200


@dataclass(frozen=True)
class Figure:
    """header, rows: the chart's numbers as a table, for reading and copying. full: across the page."""

    title: str
    chart: Chart
    caption: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    full: bool = False


@dataclass
class Section:
    """A part of the page. missing: sentences on what could not be shown, and why."""

    id: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def training_section(report: RunReport, folder: Path) -> Section:
    """Learning curves of all stages, then what only some methods have."""
    section = Section("training", "Training")
    curves = [read_curves(stage_folder(folder, one.name) / "metrics.jsonl", one.name) for one in report.stages]
    learned, lossy = [], []
    for stage, found in zip(report.stages, curves, strict=True):
        role = report.role_of(stage)
        if valid := found.of("valid/mrr"):
            best = max(valid, key=lambda point: (point[0] == stage.best_step, point[1]))
            learned.append(Run(role, found, valid, best if stage.best_step >= 0 else None))
        if loss := found.of("loss"):
            lossy.append(Run(role, found, loss))
    if learned:
        caption = (
            "Validation MRR of every stage in the order of the plan; a mark is the validation whose rows were kept."
        )
        section.figures.append(Figure("Learning curves", timeline(learned, "valid MRR"), caption, full=True))
    else:
        section.missing.append("No stage was validated while it trained: there are no learning curves.")
    if lossy:
        caption = (
            "Sum of the loss terms, averaged over a fifth of an epoch. Losses of different methods do not compare."
        )
        section.figures.append(Figure("Training loss", timeline(lossy, "training loss", log=True), caption, full=True))
    for stage, found in zip(report.stages, curves, strict=True):
        section.figures += method_figures(stage, found)
    return section


def method_figures(stage: StageResult, curves: Curves) -> list[Figure]:
    """Soft-label weights, lambda, w1 to w3, the mask: what the stage's method has."""
    learned, mask = curves.kind("evaluator"), curves.kind("mask")
    weights = {k.removesuffix("_positive").replace("_", " "): p for k, p in curves.kind("soft_weight").items()}
    crops = {_crop_of(key): p for key, p in curves.kind("valid").items() if key.startswith("mrr_")}
    found = [
        (
            "Soft-label weights",
            "mean weight",
            weights,
            "DualDE: mean weight of the soft label of true triples, by whose loss it is; the hard label has the rest.",
        ),
        *(_evaluators(kind, what, learned) for kind, what in (("alpha", "slopes \u03b1"), ("beta", "offsets \u03b2"))),
        (
            "Weight of the soft loss",
            "lambda",
            {"lambda": curves.of("lambda")},
            "IterDE: what the soft loss counts beside the hard one.",
        ),
        (
            "Learned exponents",
            "exponent",
            {word: learned.get(key, []) for key, word in _EXPONENTS.items()},
            "MED: how sharply hard examples (w1, w2) and dims (w3) are weighed.",
        ),
        (
            "Validation of the crops",
            "valid MRR",
            {
                f"first {dim}" + f" \u00d7 {bits} bit" * (bits > 0): crops[dim, bits]
                for dim, bits in _few(sorted(crops))
            },
            "MED: validation MRR of the sub-models made of the first numbers of every entity.",
        ),
        (
            "Mask",
            "share of all numbers",
            {"hidden": mask.get("hidden", []), "changed": mask.get("churn", [])},
            "MetaSD: the share of numbers that the mask hides, and the share that the last pruning hid or showed anew.",
        ),
    ]
    figures = []
    for title, what, series, caption in found:
        if shown := {name: points for name, points in series.items() if points}:
            figures.append(Figure(f"{title} of {stage.name}", lines(shown, curves.phases, what), caption))
    return figures


_EXPONENTS = {"w_1": "w1 positives", "w_2": "w2 negatives", "w_3": "w3 dims"}


def _evaluators(kind: str, what: str, learned: Mapping[str, Points]) -> tuple[str, str, dict[str, Points], str]:
    said = f"DualDE Eq. 8, 9, 12, 13: the learned {what} in \u03c3(\u03b1(f + \u03b2)), a soft label's quality."
    series: dict[str, Points] = {}
    for i in sorted(int(key.removeprefix(f"{kind}_")) for key in learned if key.startswith(f"{kind}_")):
        model, turn = divmod(i - 1, 2)
        whose = ("student", "teacher")[model] if model < 2 else f"teacher {model}"
        series[f"{what[-1]}{i} {whose}, {('true', 'false')[turn]}"] = learned[f"{kind}_{i}"]
    return f"Evaluators' {what}", kind, series, said


def _crop_of(metric: str) -> tuple[int, int]:
    # (dim, bits or 0) of a name that `crop_metric` gave.
    dim, _, bits = metric.removeprefix("mrr_").removesuffix("bit").partition("_")
    return int(dim), int(bits or 0)


def _few(crops: Sequence[tuple[int, int]], most: int = 6) -> list[tuple[int, int]]:
    if len(crops) <= most:
        return list(crops)
    return [crops[round(i * (len(crops) - 1) / (most - 1))] for i in range(most)]


def parts_section(report: RunReport, pair: Pair | None) -> Section:
    """Where the student is good and where it is not: relations, the long tail, directions, categories."""
    split, student = report.shown_split, report.student
    chosen = {"student": student}
    teacher = None if pair is None else pair.stages[0]
    if teacher is not None and teacher != student:
        chosen = {"teacher": teacher} | chosen
    direct = report.direct_of(student)
    if direct is not None:
        chosen["direct"] = direct
    found = {role: parts for role, stage in chosen.items() if (parts := stage.parts(split))}
    names = {role: chosen[role].name for role in found}
    section = Section("parts", "Where it is kept and where it is lost")
    if "student" not in found or student.mrr(split) is None:
        section.missing.append("This run's report.json has no results by relation.")
        return section
    legend = ", ".join(
        f"{shape} {names[role]}" for role, shape in zip(found, ("broad bar", "slim bar", "tick"), strict=False)
    )
    relations = sorted(_rows(found, "relation", "num_triples"), key=lambda row: (-(row.count or 0), row.name))
    few = f" The {RELATIONS} of {len(relations)} with the most triples." if len(relations) > RELATIONS else ""
    caption = f"{split.capitalize()} MRR by relation ({legend}); beside the name, its {split} triples.{few}"
    section.figures.append(_bars("By relation", relations[:RELATIONS], relations, names, caption))
    tail = [
        *_rows(found, "relation_frequency", "num_triples", lambda key: f"relations {_sign(key)}"),
        *_rows(found, "answer_degree", "num_queries", lambda key: f"seen {key}\u00d7"),
    ]
    caption = (
        f"{split.capitalize()} MRR on relations with few and many training triples, and by the number of training "
        "triples that hold the answer; beside the name, triples or queries."
    )
    if tail:
        section.figures.append(_bars("The long tail", tail, tail, names, caption))
    kinds = [
        *_rows(found, "direction", "", lambda key: f"{key} asked"),
        *_rows(found, "category", "num_triples", lambda key: f"{key} relations"),
    ]
    caption = f"{split.capitalize()} MRR by what is asked for, and by how many heads and tails a relation joins."
    section.figures.append(_bars("Directions and categories", kinds, kinds, names, caption))
    return section


def _sign(key: str) -> str:
    return key.replace(">=", "\u2265 ").replace("<", "< ")


def _rows(found: Mapping[str, Parts], part: str, count: str, name: Callable[[str], str] = str) -> list[Bar]:
    rows = []
    for key in found["student"].get(part, {}):
        cells = {role: by[part][key] for role, by in found.items() if key in by.get(part, {})}
        number = cells["student"].get(count)
        if number != 0:
            values = {role: mrr for role, cell in cells.items() if (mrr := cell["mrr"]) is not None}
            rows.append(Bar(name(key), number, values))
    return rows


def _bars(title: str, shown: Sequence[Bar], every: Sequence[Bar], names: Mapping[str, str], caption: str) -> Figure:
    roles = list(names)
    rows = [[row.name, row.note, *(fixed(row.values.get(role)) for role in roles)] for row in every[:IN_TABLE]]
    header = ("", "number", *(names[role] for role in roles))
    return Figure(title, Bars(shown, names), caption, header, rows)


def answer_figures(found: Mapping[str, Any], pair: Pair) -> list[Figure]:
    """Scores and ranks of two models for the same queries; nothing where none were asked."""
    if not found["points"]:
        return []
    names = pair.teacher.name, pair.student.name
    linked = (
        "" if found["correlation"] is None else f" Scores of the true ones correlate by {found['correlation']:.2f}."
    )
    scores = (
        f"{found['queries']:,} of the {found['num_split']:,} {found['split']} queries, each with its true answer and "
        f"with one drawn at random.{linked}"
    )
    ranks = (
        f"The same queries by the rank of their true answer: {names[0]} decides the row, {names[1]} the column. "
        f"Right of the shaded squares {names[1]} is behind."
    )
    return [
        Figure("Scores", scatter(found["points"], names), scores),
        Figure("Ranks", Matrix(found["ranks"], names), ranks),
    ]
