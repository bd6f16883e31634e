"""Which two models of a run are held beside each other."""

from dataclasses import dataclass
from pathlib import Path

from distkgd.models.run_paths import teacher_folder
from distkgd.models.stage_result import StageResult
from distkgd.reporting.run_report import RunReport


@dataclass(frozen=True)
class Speaker:
    """A model that is asked. dim: of its crop that is asked, None: all of it."""

    name: str
    folder: Path
    dim: int | None = None


@dataclass(frozen=True)
class Pair:
    """The larger or teaching model, and the other one. stages: theirs in the report, None of a model from elsewhere."""

    teacher: Speaker
    student: Speaker
    stages: tuple[StageResult | None, StageResult]


def pair_of(report: RunReport, folder: Path) -> Pair | None:
    """Head of its chain and student; without a teacher the whole model and its smallest crop, or student and direct.

    None where the run has one model and nothing to hold beside it.
    """
    student = report.student

    def own(stage: StageResult, dim: int | None = None) -> Speaker:
        name = stage.name if dim is None else f"{stage.name} crop {dim}"
        return Speaker(name, stage.folder_in(folder), dim)

    source = report.head_of(student)
    if source is not None:
        head = report.teacher_of(student)
        teacher = Speaker(source, teacher_folder(folder, source)) if head is None else own(head)
        return Pair(teacher, own(student), (head, student))
    smallest = min((dim for of_dim in student.curve.values() for dim in of_dim), default=student.dim)
    if smallest < student.dim:
        return Pair(own(student), own(student, smallest), (student, student))
    direct = next((stage for stage in report.stages if stage.is_direct), None)
    return None if direct is None else Pair(own(student), own(direct), (student, direct))
