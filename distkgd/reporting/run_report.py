"""What a finished plan tells: report.json, and the questions that its table, its page and the registry ask of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from distkgd.common.files import write_atomic
from distkgd.common.metrics import Metrics, crop_metric, known_figures
from distkgd.common.paths import AnyPath
from distkgd.common.text import of_bits
from distkgd.errors import ModelError
from distkgd.models.model_folder import read_json
from distkgd.models.stage_result import Record, StageResult, what_is_wrong

REPORT = "report.json"
MEASURED = "serving.json"  # what was measured of the models' endpoints; beside it in the run folder


@dataclass(frozen=True)
class Figures:
    """Of one size of student. bytes: of its export. ms: median of single queries. valid, test: MRR.

    retained: share of the teacher's valid MRR. These three are None where that was not ranked. bits: of the entities'
    numbers. tables: bytes of its tables alone; None in reports of earlier versions.
    """

    dim: int
    bytes: int
    ms: float
    valid: float | None = None
    test: float | None = None
    retained: float | None = None
    bits: int = 32
    tables: int | None = None

    def __str__(self) -> str:
        kept = "" if self.retained is None else f", {100 * self.retained:.1f}% of the teacher's valid MRR"
        mrr = "" if self.valid is None else f" (valid MRR {self.valid:.4f}"
        mrr += "" if self.valid is None else ")" if self.test is None else f", test {self.test:.4f})"
        size = f"{self.dim} numbers per entity{of_bits(self.bits)}"
        return f"{size}: {self.bytes / 1e6:.2f} MB, {self.ms:.2f} ms per query{kept}{mrr}"


class Verdict(Record):
    """What became of a budget. wanted: its limits by name (max_mb, max_ms, min_retained), None: anything.

    chosen, bits: the size that meets it, None and 32 where none does. stage: the model of that size; None: not told.
    sizes: those that were looked at, to choose from.
    """

    wanted: dict[str, float | None]
    met: bool
    chosen: int | None
    bits: int = 32
    stage: str | None = None
    sizes: tuple[Figures, ...]


class Data(Record):
    """The graph of a run, as `Graph.summary` has it. num_train and the like: triples."""

    name: str
    sha256: str
    num_entities: int
    num_relations: int
    num_train: int
    num_valid: int
    num_test: int


class RunReport(Record):
    """A finished plan. protocol: what its metrics mean, in words.

    world: of how many ranks, or the least and the most ("1–2"). stages: brought teachers first, then as planned.
    remarks: sentences for the reader. timeline: attempts at stages on Ray (`distkgd.pipeline.ray.schedule`). serving:
    what was measured of the models' endpoints (`distkgd.tracking.serving.speed`).
    """

    name: str
    data: Data
    protocol: dict[str, str | float]
    seed: int
    world: int | str
    device: str
    machine: dict[str, Any] = Field(default={})
    stages: tuple[StageResult, ...] = Field(min_length=1)
    remarks: tuple[str, ...] = ()
    budget: Verdict | None = None
    timeline: list[dict[str, Any]] = Field(default=[])
    serving: dict[str, Any] = Field(default={})

    @property
    def shown_split(self) -> str:
        """The split whose figures are shown: test where it was read and has triples."""
        return "test" if any(stage.mrr("test") is not None for stage in self.stages) else "valid"

    @property
    def trained(self) -> list[StageResult]:
        """What the run has made itself: not the teachers that came from elsewhere."""
        return [stage for stage in self.stages if stage.source is None]

    @property
    def teaching(self) -> set[str]:
        """The names of those that teach others."""
        return {name for stage in self.stages for name in stage.teachers}

    @property
    def student(self) -> StageResult:
        """The stage that the run is about: the last that is no baseline and teaches nobody."""
        ends = [stage for stage in self.stages if not stage.is_direct and stage.name not in self.teaching]
        return (ends or self.stages)[-1]

    @property
    def headline_metrics(self) -> dict[str, float]:
        """By flat names, as a tracker has them: the student's, those of each stage under its name, and those of each
        size that a budget looked at.

        retained: share of its first teacher's MRR on the split that is shown.
        """
        figures: Metrics = {}
        for stage in self.stages:
            own = {f"{split}_mrr": stage.mrr(split) for split in ("valid", "test")}
            own["bytes_per_entity"] = stage.bytes_per_entity
            figures |= {f"{stage.name}/{name}": value for name, value in own.items()}
            if stage.name == self.student.name:
                figures |= own
        teacher = next((self.stage(name) for name in self.student.teachers), None)
        kept, whole = (None if one is None else one.mrr(self.shown_split) for one in (self.student, teacher))
        figures["retained"] = kept / whole if kept is not None and whole else None
        for one in () if self.budget is None else self.budget.sizes:
            size = None if one.tables is None else one.tables / self.data.num_entities
            each = {"valid/mrr": one.valid, "test/mrr": one.test, "bytes_per_entity": size, "ms_per_query": one.ms}
            bits = None if one.bits == 32 else one.bits  # as crops in full precision are named elsewhere
            figures |= {crop_metric(one.dim, bits, f"budget/{name}"): value for name, value in each.items()}
        return known_figures(figures)

    def stage(self, name: str) -> StageResult | None:
        """By its name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def direct_of(self, stage: StageResult) -> StageResult | None:
        """The directly trained model of a stage's dim and bits."""
        size = stage.dim, stage.bits
        return next((other for other in self.stages if other.is_direct and (other.dim, other.bits) == size), None)

    def role_of(self, stage: StageResult) -> str:
        """teacher, assistant (is taught, and teaches), student or direct."""
        if stage.is_direct:
            return "direct"
        if stage.name not in self.teaching:
            return "student"
        return "assistant" if stage.teachers else "teacher"

    def head_of(self, stage: StageResult) -> str | None:
        """The name or path at which a stage's teaching begins: in a chain not the assistant, its first teacher's first
        teacher, and so on; None of a stage that is not taught."""
        seen, head, names = {stage.name}, None, stage.teachers
        while names and names[0] not in seen:
            head = names[0]
            seen.add(head)
            teacher = self.stage(head)
            names = () if teacher is None else teacher.teachers
        return head

    def teacher_of(self, stage: StageResult) -> StageResult | None:
        """The model a stage is measured against; None for the teacher itself and for one that is not here.

        It is the head of its chain: otherwise the shares of a chain's student and of the direct model beside it would
        have different denominators.
        """
        if stage.is_direct:
            taught = next((other for other in self.stages if other.teachers and not other.is_direct), None)
            return None if taught is None else self.teacher_of(taught)
        head = self.head_of(stage)
        return None if head is None else self.stage(head)

    def write(self, run_folder: Path) -> None:
        """As report.json, whole or not at all."""
        run_folder.mkdir(parents=True, exist_ok=True)
        write_atomic(run_folder / REPORT, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")


def read_report(run_folder: AnyPath) -> RunReport:
    """Of report.json in a run's folder; ModelError where it is missing or damaged."""
    path = Path(run_folder) / REPORT
    try:
        report = RunReport.model_validate(read_json(path))
    except ValueError as error:
        raise ModelError(f"{path} is missing or damaged ({what_is_wrong(error)}).") from None
    return report
