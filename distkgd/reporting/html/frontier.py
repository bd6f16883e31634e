"""The first figure of the report: what MRR which bytes buy, of every model of the run in all its forms."""

from collections import defaultdict

from distkgd.common.text import fixed
from distkgd.models.stage_result import StageResult
from distkgd.reporting.html.charts import Dot, frontier
from distkgd.reporting.html.figures import Figure, Section
from distkgd.reporting.records import records_beside
from distkgd.reporting.run_report import RunReport

Line = tuple[str, list[Dot]]  # what comes before the names of its dots, in words


def frontier_section(report: RunReport) -> Section:
    """MRR against table bytes per entity: models, crops, rounded forms, and published records of the data."""
    split, stages, entities = report.shown_split, report.stages, report.data.num_entities
    dots = [
        Dot(stage.name, report.role_of(stage), stage.bytes / entities, mrr)
        for stage in stages
        if (mrr := stage.mrr(split)) is not None
    ]
    section = Section("size", "The frontier")
    if not dots:
        section.missing.append(f"No model of this run has bytes and {split} MRR.")
        return section
    crops = [line for stage in stages for line in _crops(report, stage) if len(line[1]) > 1]
    rounded = [line for stage in stages if (line := _rounded(report, stage))[1]]
    looked_at = _looked_at(report)
    data, records = report.data, records_beside(report)
    published = [
        Dot(one.name, "record", one.bytes_per_entity(entities, data.num_relations), one.mrr) for one in records
    ]
    rows = [_row("", dot) for dot in dots]
    rows += [_row(before, dot) for before, line in (*crops, *rounded, *looked_at) for dot in line]
    sources = [f"{one.name} ({one.source})" for one in records]
    rows += [[f"published: {name}", *_row("", dot)[1:]] for name, dot in zip(sources, published, strict=True)]
    caption = (
        f"{split.capitalize()} MRR of every finished model against the bytes of its tables, relations included, for "
        "each entity, on a scale of ratios."
    )
    if crops:
        caption += " The small marks are crops: the first numbers of every entity, as many as are written below."
    if any(stage.bits_bytes for stage in stages):
        caption += " Crops in fewer of the same numbers' bits have a line for each number of bits."
    if rounded:
        caption += " Marks with bits are the teacher merely rounded to so many, without training."
    if looked_at:
        caption += " Crops merely rounded, which the budget chose from, have a line for each number of bits, too."
    if records:
        caption += f" Rings are published models, measured as here and counted in float32: {', '.join(sources)}."
    lines = [line for _, line in (*crops, *rounded, *looked_at)]
    header = ("model", "bytes per entity", f"{split} MRR")
    chart = frontier(dots, lines, published, split)
    section.figures.append(Figure("What the bytes buy", chart, caption, header, rows, full=True))
    lost = [stage.name for stage in stages if stage.curve and not stage.crop_bytes and not stage.bits_bytes]
    if lost:
        section.missing.append(f"The bytes of the crops of {', '.join(lost)} are not in this run's report.json.")
    return section


def _row(before: str, dot: Dot) -> list[str]:
    return [f"{before}{dot.name}", f"{dot.size:,.1f}", fixed(dot.mrr)]


def _rounded(report: RunReport, stage: StageResult) -> Line:
    split, role = report.shown_split, report.role_of(stage)
    line = [
        Dot(f"{bits} bit", role, one.bytes / report.data.num_entities, mrr)
        for bits, one in sorted(stage.rounded.items())
        if (mrr := one.mrr(split)) is not None
    ]
    return f"{stage.name}, only rounded, ", line


def _crops(report: RunReport, stage: StageResult) -> list[Line]:
    # A line, or where the numbers have nested widths one for each.
    split, role, entities = report.shown_split, report.role_of(stage), report.data.num_entities
    curves = [("", stage.crop_bytes, stage.curve.get(split, {}))]
    for bits, curve in stage.bits_curve.get(split, {}).items():
        curves.append((f" \u00d7 {bits} bit", stage.bits_bytes[bits], curve))
    found = []
    for name, size, curve in curves:
        line = [
            Dot(f"{dim}{name} numbers", role, size[dim] / entities, mrr, short=str(dim))
            for dim, metrics in sorted(curve.items())
            if dim in size and (mrr := metrics["mrr"]) is not None
        ]
        found.append((f"{stage.name}, first ", line))
    return found


def _looked_at(report: RunReport) -> list[Line]:
    # Rounded crops that a budget has chosen from, by bits; what has become a stage is shown as that.
    student, made = report.stage("student"), {(stage.dim, stage.bits) for stage in report.stages}
    by_bits: dict[int, list[Dot]] = defaultdict(list)
    for one in () if report.budget is None else report.budget.sizes:
        mrr = one.test if report.shown_split == "test" else one.valid
        if student is None or one.bits == 32 or one.tables is None or mrr is None or (one.dim, one.bits) in made:
            continue
        name, size = f"{one.dim} \u00d7 {one.bits} bit", one.tables / report.data.num_entities
        by_bits[one.bits].append(Dot(name, report.role_of(student), size, mrr, short=f"{one.dim}\u00d7{one.bits}"))
    return [("student, only rounded, ", sorted(dots, key=lambda dot: dot.size)) for dots in by_bits.values()]
