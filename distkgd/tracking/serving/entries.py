"""Which finished models of a run are registered, under which alias, and what the registry is told of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distkgd.common.paths import AnyPath
from distkgd.config.tree import read_yaml
from distkgd.errors import ConfigError, ModelError
from distkgd.models.model_folder import bytes_on_disk, find_model, read_config, read_json, read_result, sha256_of
from distkgd.reporting.report import mrr_of, told_better

Role = Literal["teacher", "student", "direct"]
NAME = re.compile(r"[\w.\- ]+")  # of a registered model


@dataclass(frozen=True)
class Entry:
    """A finished model that is to be registered.

    alias: teacher, or teacher-NAME of several; student-DIM; direct-DIM. chosen: by the budget of its run.
    folder: of the stage, or of the model itself.
    num_bytes: of its tables; of the sizes that a budget was to choose from, of the export, as that budget counts.
    valid_mrr: None where it is not known. protocol: which figures may be compared with it.
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

    @property
    def sha256(self) -> str:
        """What tells this model from all others: its config.json holds the sha256 of its tables."""
        return sha256_of(find_model(self.folder) / "config.json")

    def tags(self) -> dict[str, str]:
        """What a version in the registry says of it."""
        found = {"model_sha256": self.sha256, "stage": self.stage, "role": self.role, "dim": str(self.dim)}
        found |= {"bytes": str(self.num_bytes), "data_sha256": self.data_sha256, "protocol": self.protocol}
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
    found: dict[str, Role] = {}
    seen, ahead = set(), ["student"] if "student" in teachers else []
    while ahead:
        name = ahead.pop()
        if name in seen or name not in teachers:  # a path of a model elsewhere
            continue
        seen.add(name)
        ahead += teachers[name]
        if name != "student" and not teachers[name]:
            found[name] = "teacher"
    found |= {name: role for name, role in (("student", "student"), ("direct", "direct")) if name in teachers}  # type: ignore[misc]
    return {name: found[name] for name in teachers if name in found}


def entries_at(path: AnyPath) -> tuple[list[Entry], Path, str]:
    """(entries, the run's folder, a name for them) of a run, a stage or a model; ModelError where there is none.

    Of a model that is in no run the folder is the one that holds the model.
    """
    path = Path(path)
    if (path / "plan.yaml").is_file():
        entries, run = entries_of_run(path), path
    else:
        entries = [entry_of_model(path)]
        run = _run_of(find_model(path))
    if not (run / "plan.yaml").is_file():
        return entries, run, registered_name(find_model(path).name)
    config = read_yaml(run / "plan.yaml")["config"]
    return entries, run, config["mlflow"].get("registered_as") or registered_name(config["name"])


def entries_of_run(run_folder: AnyPath) -> list[Entry]:
    """Of a run's finished stages; ModelError where there is no run or none of them is finished.

    Where a budget has chosen a crop, that is the student, and the model that it was cut from a teacher.
    """
    run_folder = Path(run_folder)
    roles, data, protocol = _plan(run_folder)
    budget = budget_of(run_folder) or {}
    judged: dict[int, int] = {}
    chosen = "student" if budget.get("met") else None
    crop = f"student_{budget.get('chosen')}"
    if chosen and (_row(run_folder, crop) or {}).get("method") == "crop":
        chosen, roles = crop, {crop: "student", "student": "teacher"}
        judged = {one["dim"]: one["bytes"] for one in budget["sizes"]}
    several = sum(role == "teacher" for role in roles.values()) > 1
    entries = []
    for name, role in roles.items():
        row = _row(run_folder, name)
        if row is None:
            continue
        alias = (f"teacher-{name}" if several else "teacher") if role == "teacher" else f"{role}-{row['dim']}"
        folder, mrr = run_folder / "stages" / name, mrr_of(row, "valid")
        size = judged.get(row["dim"], row["bytes"])
        entries.append(Entry(name, role, alias, folder, row["dim"], size, mrr, data, protocol, name == chosen))
    if not entries:
        raise ModelError(f"{run_folder} has no finished stage; train it to its end: launch/distill.py --resume.")
    return entries


def champion_limit(run_folder: Path, given: float | None) -> float | None:
    """MB that a champion may have: as `given`, else what a budget asked for that no model of the run has met."""
    budget = budget_of(run_folder)
    return budget["wanted"]["max_mb"] if given is None and budget is not None and not budget["met"] else given


def entry_of_model(folder: AnyPath) -> Entry:
    """Of a model folder by itself: a student, unless its config.json says that it was a teacher or the direct model.

    Its valid MRR is not known, unless it lies in the folder of its stage, in a run.
    """
    folder = Path(folder)
    model = find_model(folder)
    run = _run_of(model)
    row = _row(run, model.parent.name) if (run / "plan.yaml").is_file() else None
    if row is not None:
        found = [entry for entry in entries_of_run(run) if entry.stage == model.parent.name]
        if found:
            return replace(found[0], chosen=False)
    config = read_config(model)
    name = str(config.get("stage", "student"))
    role: Role = "teacher" if name == "teacher" else "direct" if name == "direct" else "student"
    dim = int(config["scorer"]["dim"])
    alias = "teacher" if role == "teacher" else f"{role}-{dim}"
    if row is not None:  # a stage that is not registered with its run
        _, sha256, protocol = _plan(run)
        return Entry(name, role, alias, folder, dim, row["bytes"], mrr_of(row, "valid"), sha256, protocol)
    data = config.get("data")
    sha256 = str(data.get("sha256", "")) if isinstance(data, Mapping) else ""
    return Entry(name, role, alias, model, dim, bytes_on_disk(model), None, sha256, "")


def better_direct(run_folder: Path, entries: Sequence[Entry]) -> list[str]:
    """A line where the directly trained model of the student's size is better. entries: of what is registered."""
    row = _row(run_folder, "direct")
    student = next((entry for entry in entries if entry.role == "student"), None)
    if student is None or row is None or row["dim"] != student.dim:
        return []
    told = told_better(mrr_of(row, "valid"), student.valid_mrr, student.stage)
    if told is not None and all(entry.role != "direct" for entry in entries):
        told += f" launch/register.py {run_folder / 'stages' / 'direct'} registers it."
    return [told] if told else []


def budget_of(run_folder: Path) -> dict[str, Any] | None:
    """What a finished run's report says of its budget, None where it had none."""
    return _report(run_folder).get("budget")


def _plan(run_folder: Path) -> tuple[dict[str, Role], str, str]:
    """Roles of the stages that are registered, sha256 of the data, and the protocol."""
    path = run_folder / "plan.yaml"
    try:
        plan = read_yaml(path)
        roles = roles_of([(stage["name"], stage["teachers"]) for stage in plan["stages"]])
        config = plan["config"]
        return roles, str(plan["data_sha256"]), f"{config['filter']}, {config['ties']}"
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is missing or damaged ({error!r}); give the folder of a run.") from None


def _run_of(model: Path) -> Path:
    """The folder of the run whose stage made a model; of a model elsewhere, the folder above it."""
    model = model.resolve()
    inside = model.name == "model" and model.parent.parent.name == "stages"
    return model.parent.parent.parent if inside else model.parent


def _row(run_folder: Path, name: str) -> dict[str, Any] | None:
    """A finished stage's result, or what the report says of a crop; None of a stage that is not finished."""
    row = read_result(run_folder / "stages" / name)
    if row is not None:
        return row
    rows = _report(run_folder).get("stages", [])
    return next((row for row in rows if row["name"] == name and row["method"] == "crop"), None)


def _report(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "report.json"
    return read_json(path) if path.is_file() else {}
