"""The report of a finished plan: `report.json` for programs, `report.md` and a terminal table for people.

The Markdown and the terminal table are two renderings of one list of rows (`rows`) and one list of
sentences (`notes`), so that they cannot disagree. Nothing here computes a metric: the report holds them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from distkgd.common.files import write_atomic
from distkgd.common.text import NONE, count_text, fixed, seconds_text, size_text
from distkgd.reporting.endpoints import sentences, with_measured

HEADER = (
    "stage",
    "method",
    "scorer",
    "dim",
    "size",
    "valid MRR",
    "test MRR",
    "H@1",
    "H@3",
    "H@10",
    "retained",
    "smaller",
    "seconds",
)
NUM_TEXT_COLUMNS = 3  # stage, method, scorer; every other column is a number, aligned right

Stage = Mapping[str, Any]


def write_report(run_folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` (all keys, also those no table shows) and `report.md` into the run folder."""
    run_folder.mkdir(parents=True, exist_ok=True)
    report = with_measured(report, run_folder)
    text = markdown(report)  # before anything is written
    write_atomic(run_folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, default=_plain) + "\n")
    write_atomic(run_folder / "report.md", text)


def markdown(report: Mapping[str, Any]) -> str:
    """The table as GitHub Markdown, the sentences below it as paragraphs."""
    align = ["---" if column < NUM_TEXT_COLUMNS else "---:" for column in range(len(HEADER))]
    lines = [list(HEADER), align, *[[_escape(cell) for cell in row] for row in rows(report)]]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [body, *notes(report), *map(_curve, (stage for stage in report["stages"] if stage.get("curve")))]
    return "# Report\n\n" + "\n\n".join(parts) + "\n"


def table(report: Mapping[str, Any]) -> Table:
    """The same table for a terminal of 100 columns, the sentences as its caption."""
    drawn = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, caption_justify="left")
    drawn.caption = Text("\n" + "\n".join(notes(report)), style="not italic")
    for column, title in enumerate(HEADER):
        header = title.replace(" ", "\n")
        if column < NUM_TEXT_COLUMNS:
            drawn.add_column(header, overflow="fold")
        else:
            drawn.add_column(header, justify="right", no_wrap=True)
    for row in rows(report):
        drawn.add_row(*[Text(cell) for cell in row])
    return drawn


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row of texts per stage, in the order of the plan; the columns are `HEADER`."""
    stages = report["stages"]
    return [_row(stage, teacher_of(stage, stages)) for stage in stages]


def notes(report: Mapping[str, Any]) -> list[str]:
    """The protocol, the data, each student beside the direct model of its dim, what was chosen, the long tail, and
    whatever the one who ran the plan remarks."""
    stages, remarks = report["stages"], report.get("remarks", [])
    return [
        protocol_line(report),
        data_line(report["data"]),
        *comparisons(stages),
        *choices(stages),
        *_long_tail(stages),
        *sentences(report),
        *remarks,
    ]


def _curve(stage: Stage) -> str:
    """The crops of a stage's model as a table: dim, and MRR and H@10 on each split."""
    splits = list(stage["curve"])
    # JSON has made texts of the dims of a stage that was finished before.
    by_split = {split: {int(dim): found for dim, found in stage["curve"][split].items()} for split in splits}
    head = ["dim", *(f"{split} {name}" for split in splits for name in ("MRR", "H@10"))]
    lines = [head, ["---:"] * len(head)]
    for dim in by_split[splits[0]]:
        found = [by_split[split][dim] for split in splits]
        lines.append([str(dim), *(fixed(one[key]) for one in found for key in ("mrr", "hits_at_10"))])
    return f"Crops of {stage['name']}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(stage: Stage, teacher: Stage | None) -> list[str]:
    test = stage.get("test") or {}
    retained = smaller = None
    if teacher is not None:
        retained = _ratio(mrr_of(stage, "test"), mrr_of(teacher, "test"))
        smaller = _ratio(teacher.get("bytes"), stage.get("bytes"))
    return [
        str(stage["name"]),
        _text(stage.get("method")),
        _text(stage.get("scorer")),
        dim_text(stage),
        size_text(stage.get("bytes")),
        fixed(mrr_of(stage, "valid")),
        fixed(mrr_of(stage, "test")),
        *[fixed(test.get(f"hits_at_{k}")) for k in (1, 3, 10)],
        NONE if retained is None else f"{100 * retained:.1f}%",
        NONE if smaller is None else f"{smaller:.1f}×",
        seconds_text(stage.get("seconds")),
    ]


def teacher_of(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """The model a stage is measured against; None for the teacher itself and for one that is not here.

    In a chain (teacher, assistant, student) it is the head of the chain, not the assistant: otherwise the
    shares of a chain's student and of the direct model beside it would have different denominators.
    """
    by_name = {other["name"]: other for other in stages}
    if is_direct(stage):
        taught = next((other for other in stages if other.get("teachers") and not is_direct(other)), None)
        return None if taught is None else teacher_of(taught, stages)
    seen = {stage["name"]}
    teacher: Stage | None = None
    names = stage.get("teachers") or []
    while names and names[0] not in seen:
        teacher = by_name.get(names[0])
        if teacher is None:
            return None
        seen.add(names[0])
        names = teacher.get("teachers") or []
    return teacher


def is_direct(stage: Stage) -> bool:
    """Is this a model of a student's dim, trained without a teacher? Told by its name: direct, direct-64, and
    assistant_64, a candidate that was only trained to be measured."""
    name = str(stage["name"])
    return name == "direct" or name.startswith(("direct-", "direct_", "assistant_"))


def comparisons(stages: Sequence[Stage]) -> list[str]:
    directs = [stage for stage in stages if is_direct(stage)]
    teaching = {name for stage in stages for name in stage.get("teachers") or []}
    sentences = []
    for stage in stages:
        if is_direct(stage) or not stage.get("teachers"):
            continue
        direct = next((other for other in directs if other.get("dim") == stage.get("dim")), None)
        if direct is not None:
            parts = [difference(stage, direct, split) for split in ("valid", "test")]
            sentences.append(f"{stage['name']} − {direct['name']}: {', '.join(parts)}.")
        elif stage["name"] not in teaching:
            sentences.append(
                f"{stage['name']}: no directly trained model of dim {_text(stage.get('dim'))} "
                "stands beside it, so its gain is unknown."
            )
    return sentences


def difference(stage: Stage, direct: Stage, split: str) -> str:
    ours, theirs = mrr_of(stage, split), mrr_of(direct, split)
    if ours is None or theirs is None:
        return f"no {split} MRR"
    gain = round(ours - theirs, 3) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{gain:+.3f} {split} MRR".replace("-", "−", 1)


def trained(stages: Sequence[Stage]) -> list[Stage]:
    """The stages that a run has trained: not a teacher that came from elsewhere."""
    return [stage for stage in stages if "source" not in stage]


def told_better(direct: float | None, student: float | None, name: str) -> str | None:
    """A sentence where the direct model of the student's size is the better one by their valid MRRs."""
    if direct is None or student is None or direct <= student:
        return None
    return (
        f"The directly trained model of that size is the better one: direct has a valid MRR of {fixed(direct, 4)}, "
        f"{name} of {fixed(student, 4)}."
    )


def choices(stages: Sequence[Stage]) -> list[str]:
    sentences = []
    for stage in stages:
        if chosen := stage.get("chosen"):
            ends = " and ".join(f"{name} {fixed(mrr)}" for name, mrr in chosen["between"].items())
            found = ", ".join(f"{name} {fixed(mrr)}" for name, mrr in chosen["candidates"].items())
            sentences.append(
                f"{stage['name']}: dim {chosen['dim']} of {chosen['winner']}, whose valid MRR is nearest to "
                f"{fixed(chosen['middle'])}, the middle of {ends} ({found})."
            )
    return sentences


def _long_tail(stages: Sequence[Stage]) -> list[str]:
    """One line: MRR on rare relations, and by the degree of the answer, of every stage that has it."""
    split = last_split(stages)
    parts = {str(stage["name"]): stage.get(f"{split}_by") or {} for stage in stages}
    parts = {name: part for name, part in parts.items() if "relation_frequency" in part and "answer_degree" in part}
    if not parts or not next(iter(parts.values()))["answer_degree"]:
        return []
    first = next(iter(parts.values()))
    rare, row = next(iter(first["relation_frequency"].items()))
    rares = [f"{name} {fixed(part['relation_frequency'][rare]['mrr'])}" for name, part in parts.items()]
    buckets = {
        bucket: [f"{name} {fixed(part['answer_degree'][bucket]['mrr'])}" for name, part in parts.items()]
        for bucket in first["answer_degree"]
    }
    told = "; ".join(
        f"{bucket} ({count_text(int(first['answer_degree'][bucket]['num_queries']))} queries) {', '.join(found)}"
        for bucket, found in buckets.items()
    )
    return [
        f"Long tail, {split} MRR: relations of {rare} training triples ({count_text(int(row['num_triples']))} triples) "
        f"{', '.join(rares)}. By training triples that hold the answer: {told}."
    ]


def protocol_line(report: Mapping[str, Any]) -> str:
    rules = ", ".join(f"{key}: {value}" for key, value in (report.get("protocol") or {}).items())
    where = f"world: {_text(report.get('world'))}, device: {_text(report.get('device'))}"
    return f"Protocol: {rules or NONE}; {where}; H@k are test figures."


def data_line(data: Mapping[str, Any]) -> str:
    digest = f" (sha256 {str(data['sha256'])[:12]})" if data.get("sha256") else ""
    triples = ", ".join(f"{count_text(data.get(f'num_{split}'))} {split}" for split in ("train", "valid", "test"))
    sizes = f"{count_text(data.get('num_entities'))} entities, {count_text(data.get('num_relations'))} relations"
    return f"Data: {_text(data.get('name'))}{digest}: {sizes}, triples: {triples}."


def last_split(stages: Sequence[Stage]) -> str:
    """The split whose figures are shown: test where it was read and has triples."""
    return "test" if any(mrr_of(stage, "test") is not None for stage in stages) else "valid"


def mrr_of(stage: Stage, split: str) -> float | None:
    value = (stage.get(split) or {}).get("mrr")
    return None if value is None else float(value)


def dim_text(stage: Stage) -> str:
    """Coordinates per entity, and its biases beside them: 32+1."""
    biases = stage.get("biases")
    return f"{_text(stage.get('dim'))}+{biases}" if biases else _text(stage.get("dim"))


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def _text(value: object) -> str:
    return NONE if value is None else str(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a report holds plain values only, not {type(value).__name__}: {value!r}")
