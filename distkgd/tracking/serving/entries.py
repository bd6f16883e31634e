"""Which finished models of a run are registered, under which alias, and what the registry is told of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distkgd.common.paths import AnyPath
from distkgd.config.tree import read_yaml
from distkgd.errors import ConfigError, ModelError
from distkgd.models.model_folder import bytes_on_disk, find_model, read_config, sha256_of
from distkgd.models.stage_result import StageResult, read_result
from distkgd.reporting.report import told_better
from distkgd.reporting.run_report import REPORT, Verdict, read_report

Role = Literal["teacher", "student", "direct"]
NAME = re.compile(r"[\w.\- ]+")  # of a registered model


@dataclass(frozen=True)
class Entry:
    """A finished model that is to be registered.

    alias: teacher, or teacher-NAME of several; student-DIM; direct-DIM. chosen: by the budget of its run.
    folder: of the stage, or of the model itself.
    num_bytes: of its tables; of the sizes that a budget was to choose from, of the export, as that budget counts.
    valid_mrr: None where it is not known. protocol: which figures may be compared with it.
    known: whether the triples of its data set go along.
    """

    stage: str
    role: Role
    alias: str
    folder: Path
    dim: int
    num_bytes: int
    valid_mrr: float | None
    data_sha256: str
    protocol: str
    chosen: bool = False
    known: bool = False

    @property
    def sha256(self) -> str:
        """What tells this model from all others: its config.json holds the sha256 of its tables."""
        return sha256_of(find_model(self.folder) / "config.json")

    def tags(self) -> dict[str, str]:
        """What a version in the registry says of it."""
        found = {"model_sha256": self.sha256, "stage": self.stage, "role": self.role, "dim": str(self.dim)}
        found |= {"bytes": str(self.num_bytes), "data_sha256": self.data_sha256, "protocol": self.protocol}
        found |= {"known": "true"} if self.known else {}
        return found if self.valid_mrr is None else found | {"valid_mrr": repr(self.valid_mrr)}


def registered_name(text: str) -> str:
    """`text` as the name of a registered model; other characters than letters, digits, _ . - and space become -."""
    return "".join(sign if NAME.fullmatch(sign) else "-" for sign in text).strip() or "model"


def roles_of(stages: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Role]:
    """stage -> role, of those stages (name, names of its teachers) of a plan that are registered.

    These are the student, the stages that its teaching begins at, and the direct model; what lies between in a chain
    and the candidates of an assistant are not.
    """
    teachers = dict(stages)
    seen, ahead = {"student"}, ["student"]
    while ahead:
        further = set(teachers.get(ahead.pop(), ())) - seen  # a path of a model elsewhere is no stage
        seen |= further
        ahead += further
    found: dict[str, Role] = {}
    for name, own in teachers.items():
        match name:
            case "student" | "direct":
                found[name] = name
            case _ if name in seen and not own:
                found[name] = "teacher"
    return found


@dataclass(frozen=True)
class RegisteredRun:
    """What the registry is told of a run.

    name: of the registered model, unless it is given another. roles: as `roles_of` has them. results: by name; of the
    stages that are finished, and of what a budget has made of the student. data_sha256: the graph's identity.
    protocol: of its figures.
    """

    folder: Path
    name: str
    roles: Mapping[str, Role]
    results: Mapping[str, StageResult]
    budget: Verdict | None
    data_sha256: str
    protocol: str

    def entries(self) -> list[Entry]:
        """Of the stages that are finished; ModelError where none is.

        Where a budget has chosen what was made of a croppable model, that is the student, and this model a teacher.
        """
        roles, sizes, chosen = self.roles, dict[tuple[int, int], int](), None
        if self.budget is not None and self.budget.met:
            chosen, crop = "student", self.results.get(self.budget.stage or f"student_{self.budget.chosen}")
            if crop is not None and crop.teachers == ("student",):
                chosen, roles = crop.name, {crop.name: "student", "student": "teacher"}
                sizes = {(one.dim, one.bits): one.bytes for one in self.budget.sizes}
        several = sum(role == "teacher" for role in roles.values()) > 1
        found = []
        for name, role in roles.items():
            result = self.results.get(name)
            if result is None:
                continue
            alias = f"teacher-{name}" if several else "teacher"
            if role != "teacher":
                alias = size_alias(role, result.dim, result.bits)
            folder, size = self.folder / "stages" / name, sizes.get((result.dim, result.bits), result.bytes)
            about = self.data_sha256, self.protocol, name == chosen
            found.append(Entry(name, role, alias, folder, result.dim, size, result.mrr("valid"), *about))
        if not found:
            raise ModelError(f"{self.folder} has no finished stage; train it to its end: distkgd distill --resume.")
        return found

    def champion_limit(self, given: float | None) -> float | None:
        """MB that a champion may have: as `given`, else what a budget asked for that no model of the run has met."""
        if given is None and self.budget is not None and not self.budget.met:
            return self.budget.wanted["max_mb"]
        return given

    def better_direct(self, entries: Sequence[Entry]) -> list[str]:
        """A line where the directly trained model of the student's size is better. entries: of what is registered."""
        direct = self.results.get("direct")
        student = next((entry for entry in entries if entry.role == "student"), None)
        if student is None or direct is None:
            return []
        taught = self.results.get(student.stage)
        if direct.dim != student.dim or direct.bits != (32 if taught is None else taught.bits):
            return []
        told = told_better(direct.mrr("valid"), student.valid_mrr, student.stage)
        if told is not None and all(entry.role != "direct" for entry in entries):
            told += f" distkgd register {self.folder / 'stages' / 'direct'} registers it."
        return [told] if told else []


def read_run(folder: AnyPath) -> RegisteredRun:
    """Of a run's folder, whose plan need not have come to its end; ModelError where it is none, or damaged."""
    folder = Path(folder)
    path = folder / "plan.yaml"
    try:
        plan = read_yaml(path)
        teachers = {str(stage["name"]): stage["teachers"] for stage in plan["stages"]}
        roles = roles_of(list(teachers.items()))
        config, sha256 = plan["config"], str(plan["data_sha256"])
        called = config["mlflow"].get("registered_as") or registered_name(config["name"])
        protocol = f"{config['filter']}, {config['ties']}"
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is missing or damaged ({error!r}); give the folder of a run.") from None
    report = read_report(folder) if (folder / REPORT).is_file() else None
    added = () if report is None else report.stages  # a budget adds to its plan
    results = {stage.name: stage for stage in added if stage.teachers == ("student",)}
    for name in (*teachers, "direct"):
        if (result := read_result(folder / "stages" / name)) is not None:
            results[name] = result
    return RegisteredRun(folder, called, roles, results, None if report is None else report.budget, sha256, protocol)


def entries_at(path: AnyPath) -> tuple[list[Entry], RegisteredRun]:
    """Of a run, a stage or a model, and its run; ModelError where there is none.

    A model that is in no run is a run of its own, whose folder is the one that holds the model.
    """
    path = Path(path)
    if (path / "plan.yaml").is_file():
        run = read_run(path)
        return run.entries(), run
    model = find_model(path)
    inside = model.resolve()
    folder = inside.parents[2] if inside.name == "model" and inside.parents[1].name == "stages" else inside.parent
    if not (folder / "plan.yaml").is_file():
        return [entry_of_model(model)], RegisteredRun(folder, registered_name(model.name), {}, {}, None, "", "")
    run = read_run(folder)
    entry, result = entry_of_model(model), run.results.get(inside.parent.name)
    if result is None:
        return [entry], run
    # A stage may not be registered with its run.
    entry = replace(entry, valid_mrr=result.mrr("valid"), data_sha256=run.data_sha256, protocol=run.protocol)
    return [next((replace(one, chosen=False) for one in run.entries() if one.stage == result.name), entry)], run


def size_alias(role: str, dim: int, bits: int) -> str:
    """student-32, or student-256-2bit where an entity's numbers have few bits."""
    return f"{role}-{dim}" if bits == 32 else f"{role}-{dim}-{bits}bit"


def entry_of_model(folder: Path) -> Entry:
    """Of a model folder by itself: a student, unless its config.json says that it was a teacher or the direct model.

    Its valid MRR is not known.
    """
    config = read_config(folder)
    name = str(config.get("stage", "student"))
    role: Role = "teacher" if name == "teacher" else "direct" if name == "direct" else "student"
    dim = int(config["scorer"]["dim"])
    bits = config.get("packed", {}).get("entity", {}).get("bits", 32)
    alias = "teacher" if role == "teacher" else size_alias(role, dim, bits)
    data = config.get("data")
    sha256 = str(data.get("sha256", "")) if isinstance(data, Mapping) else ""
    return Entry(name, role, alias, folder, dim, bytes_on_disk(folder), None, sha256, "")
