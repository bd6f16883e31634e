"""Which two models of a run are held beside each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distkgd.models.run_paths import folder_of, teacher_folder
from distkgd.reporting.report import is_direct, teacher_of

Stage = Mapping[str, Any]


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
    stages: tuple[Stage | None, Stage]


def student_of(stages: list[Stage]) -> Stage:
    """The stage that the run is about: the last that is no baseline and teaches nobody."""
    teaching = {name for stage in stages for name in stage["teachers"]}
    ends = [stage for stage in stages if not is_direct(stage) and stage["name"] not in teaching]
    return (ends or stages)[-1]


def pair_of(report: Mapping[str, Any], folder: Path) -> Pair | None:
    """Head of its chain and student; without a teacher the whole model and its smallest crop, or student and direct.

    None where the run has one model and nothing to hold beside it.
    """
    stages = report["stages"]
    student = student_of(stages)

    def own(stage: Stage, dim: int | None = None) -> Speaker:
        name = stage["name"] if dim is None else f"{stage['name']} crop {dim}"
        return Speaker(name, folder_of(folder, stage), dim)

    if student["teachers"]:
        head = teacher_of(student, stages)
        if head is None:
            source = _outside(student, stages)
            return Pair(Speaker(source, teacher_folder(folder, source)), own(student), (None, student))
        return Pair(own(head), own(student), (head, student))
    if student.get("curve"):
        dims = [int(dim) for dim in next(iter(student["curve"].values()))]
        if min(dims) < student["dim"]:
            return Pair(own(student), own(student, min(dims)), (student, student))
    direct = next((stage for stage in stages if is_direct(stage)), None)
    return None if direct is None else Pair(own(student), own(direct), (student, direct))


def _outside(student: Stage, stages: list[Stage]) -> str:
    # The head of a chain that begins at a finished model.
    by_name = {stage["name"]: stage for stage in stages}
    name = student["teachers"][0]
    while name in by_name and by_name[name]["teachers"]:
        name = by_name[name]["teachers"][0]
    return str(name)
