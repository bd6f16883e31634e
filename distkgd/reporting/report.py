"""The table of a finished plan, `report.md` and on a terminal.

The Markdown and the terminal table are two renderings of one list of rows (`rows`) and one list of
sentences (`notes`), so that they cannot disagree. Nothing here computes a metric: the report holds them.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.metrics import Metrics
from distkgd.common.text import NONE, count_text, fixed, seconds_text, size_text
from distkgd.models.stage_result import StageResult
from distkgd.reporting.run_report import RunReport

HEADER = (
    "stage",
    "method",
    "scorer",
    "dim",
    "size",
    "B each",
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


def write_report(run_folder: Path, report: RunReport) -> None:
    """Write `report.json` (all keys, also those no table shows) and `report.md` into the run folder."""
    text = markdown(report)  # before anything is written
    report.write(run_folder)
    write_atomic(run_folder / "report.md", text)


def markdown(report: RunReport) -> str:
    """The table as GitHub Markdown, the sentences below it as paragraphs."""
    body = _markdown_table(HEADER, rows(report), NUM_TEXT_COLUMNS)
    parts = [body, *notes(report), *(_curve(stage) for stage in report.stages if stage.curve)]
    return "# Report\n\n" + "\n\n".join(parts) + "\n"


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], num_text_columns: int) -> str:
    align = ["---" if column < num_text_columns else "---:" for column in range(len(header))]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, align, *escaped))


def table(report: RunReport) -> Table:
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


def show(report: RunReport, folder: Path, display: Display) -> None:
    """Print the table of a finished plan, and where its page lies."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table(report))
    for stage in (stage for stage in report.stages if stage.curve):
        head, lines = _crops(stage)
        drawn = Table(*head, box=box.SIMPLE_HEAD, title=f"Crops of {stage.name}", title_justify="left")
        for line in lines:
            drawn.add_row(*line)
        console.print(drawn)
    page = folder / "report.html"
    display.line(f"report: {page if page.exists() else folder / 'report.md'}")


def rows(report: RunReport) -> list[list[str]]:
    """One row of texts per stage, in the order of the plan; the columns are `HEADER`."""
    return [_row(stage, report.teacher_of(stage)) for stage in report.stages]


def notes(report: RunReport) -> list[str]:
    """The protocol, the data, each student beside the direct model of its dim, what was chosen, the long tail, and
    whatever the one who ran the plan remarks."""
    return [
        protocol_line(report),
        data_line(report),
        *comparisons(report),
        *choices(report.stages),
        *few_bits(report),
        *_long_tail(report),
        *served(report.serving),
        *report.remarks,
    ]


def _curve(stage: StageResult) -> str:
    """The crops of a stage's model as Markdown."""
    return f"Crops of {stage.name}:\n\n{_markdown_table(*_crops(stage), 0)}"


def _crops(stage: StageResult) -> tuple[list[str], list[list[str]]]:
    """The crops of a stage's model, head and rows: dim (and bits and bytes), and MRR and H@10 on each split."""
    figures = [f"{split} {name}" for split in stage.curve for name in ("MRR", "H@10")]

    def texts(found: Iterable[Metrics]) -> list[str]:
        return [fixed(one[key]) for one in found for key in ("mrr", "hits_at_10")]

    if stage.bits_curve:
        head, lines = ["dim", "bits", "size", *figures], []
        for bits, sizes in stage.bits_bytes.items():
            for dim, size in sizes.items():
                found = (of_bits[bits][dim] for of_bits in stage.bits_curve.values())
                lines.append([str(dim), str(bits), size_text(size), *texts(found)])
    else:
        head, first = ["dim", *figures], next(iter(stage.curve.values()))
        lines = [[str(dim), *texts(of_dim[dim] for of_dim in stage.curve.values())] for dim in first]
    return head, lines


def _row(stage: StageResult, teacher: StageResult | None) -> list[str]:
    test = stage.metrics("test")
    retained = smaller = None
    if teacher is not None:
        retained = _ratio(stage.mrr("test"), teacher.mrr("test"))
        smaller = _ratio(teacher.bytes, stage.bytes)
    return [
        stage.name,
        stage.method,
        stage.scorer,
        numbers_text(stage),
        size_text(stage.bytes),
        fixed(stage.bytes_per_entity, 1),
        fixed(stage.mrr("valid")),
        fixed(stage.mrr("test")),
        *[fixed(test.get(f"hits_at_{k}")) for k in (1, 3, 10)],
        NONE if retained is None else f"{100 * retained:.1f}%",
        NONE if smaller is None else f"{smaller:.1f}×",
        seconds_text(stage.seconds),
    ]


def numbers_text(stage: StageResult) -> str:
    """Numbers per entity, biases apart, and their bits where these are few: 256, 32+1, 256 × 2 bit."""
    dim = f"{stage.dim}+{stage.biases}" if stage.biases else str(stage.dim)
    return dim if stage.bits == 32 else f"{dim} × {stage.bits} bit"


def comparisons(report: RunReport) -> list[str]:
    """Each student beside the direct model of its dim."""
    sentences = []
    for stage in report.stages:
        if stage.is_direct or not stage.teachers:
            continue
        direct = report.direct_of(stage)
        if direct is not None:
            parts = [difference(stage.mrr(split), direct.mrr(split), split) for split in ("valid", "test")]
            sentences.append(f"{stage.name} − {direct.name}: {', '.join(parts)} (one seed).")
        elif stage.name not in report.teaching:
            size = numbers_text(stage)
            sentences.append(
                f"{stage.name}: no directly trained model of dim {size} stands beside it, so its gain is unknown."
            )
    return sentences


def difference(ours: float | None, theirs: float | None, split: str) -> str:
    """Of two MRRs on a split, in words: of the figures as they are shown, so that these add up."""
    if ours is None or theirs is None:
        return f"no {split} MRR"
    gain = round(float(fixed(ours)) - float(fixed(theirs)), 3) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{gain:+.3f} {split} MRR".replace("-", "−", 1)


def told_better(direct: float | None, student: float | None, name: str) -> str | None:
    """A sentence where the direct model of the student's size is the better one by their valid MRRs."""
    if direct is None or student is None or direct <= student:
        return None
    return (
        f"The directly trained model of that size is the better one: direct has a valid MRR of {fixed(direct, 4)}, "
        f"{name} of {fixed(student, 4)}."
    )


def choices(stages: Sequence[StageResult]) -> list[str]:
    """Why each assistant has the dim that it has, where there was a choice."""
    sentences = []
    for name, chosen in ((stage.name, stage.chosen) for stage in stages):
        if chosen is not None:
            ends = " and ".join(f"{end} {fixed(mrr)}" for end, mrr in chosen.between.items())
            found = ", ".join(f"{candidate} {fixed(mrr)}" for candidate, mrr in chosen.candidates.items())
            sentences.append(
                f"{name}: dim {chosen.dim} of {chosen.winner}, whose valid MRR is nearest to "
                f"{fixed(chosen.middle)}, the middle of {ends} ({found})."
            )
    return sentences


def few_bits(report: RunReport) -> list[str]:
    """Of each model of few bits its row bytes, how many rows differ and answers are tied; those only rounded."""
    split, sentences = report.shown_split, []
    for stage in report.stages:
        if stage.distinct_rows is not None:
            # Entities of equal rows have equal scores.
            rows_text = f"{count_text(stage.distinct_rows)} distinct rows of {count_text(stage.num_entities)} entities"
            tied = stage.metrics(split).get("tied")
            ties = "" if tied is None else f"; {100 * tied:.1f}% of the {split} answers tied with another candidate"
            size = "" if stage.row_bytes is None else f"{stage.row_bytes} bytes a row; "
            sentences.append(f"{stage.name}: {size}{rows_text}{ties}.")
        if stage.rounded:
            each = [
                f"{bits} bit ({size_text(one.bytes)}) {fixed(one.mrr(split))}" for bits, one in stage.rounded.items()
            ]
            sentences.append(f"{stage.name}, only rounded, {split} MRR: {', '.join(each)}.")
    return sentences


def _long_tail(report: RunReport) -> list[str]:
    """One line: MRR on rare relations, and by the degree of the answer, of every stage that has it."""
    split = report.shown_split
    parts = {stage.name: stage.parts(split) for stage in report.stages}
    parts = {name: part for name, part in parts.items() if "relation_frequency" in part and "answer_degree" in part}
    if not parts or not next(iter(parts.values()))["answer_degree"]:
        return []
    first = next(iter(parts.values()))
    rare, row = next(iter(first["relation_frequency"].items()))
    rares = [f"{name} {fixed(part['relation_frequency'][rare]['mrr'])}" for name, part in parts.items()]
    told = "; ".join(
        f"{bucket} ({count_text(found['num_queries'])} queries) "
        + ", ".join(f"{name} {fixed(part['answer_degree'][bucket]['mrr'])}" for name, part in parts.items())
        for bucket, found in first["answer_degree"].items()
    )
    return [
        f"Long tail, {split} MRR: relations of {rare} training triples ({count_text(row['num_triples'])} triples) "
        f"{', '.join(rares)}. By training triples that hold the answer: {told}."
    ]


def served(measured: Mapping[str, Any]) -> list[str]:
    """How quickly each model answers over HTTP; nothing where that was not measured."""
    rows = measured.get("rows")
    if not rows:
        return []
    told = "; ".join(
        f"{row['stage']} p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, {row['per_second']:.0f} requests/s"
        for row in rows
    )
    return [f"Served over HTTP (latency with 1 client, throughput with {rows[0]['clients']}): {told}."]


def protocol_line(report: RunReport) -> str:
    """What the metrics mean."""
    rules = ", ".join(f"{key}: {value}" for key, value in report.protocol.items())
    return f"Protocol: {rules}; world: {report.world}, device: {report.device}; H@k are test figures."


def data_line(report: RunReport) -> str:
    """What they were measured on."""
    data = report.data
    return (
        f"Data: {data.name} (sha256 {data.sha256[:12]}): {data.num_entities:,} entities, {data.num_relations:,} "
        f"relations, triples: {data.num_train:,} train, {data.num_valid:,} valid, {data.num_test:,} test."
    )


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom
