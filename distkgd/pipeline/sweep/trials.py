"""The trials of a sweep: what each one trains, the teachers they share, and the folders in which both are kept.

OUT/
  trials/DIGEST/      a run folder: plan.yaml, stages/, report.json; and trial.json (`distkgd.pipeline.sweep.worker`)
  teachers/DIGEST/    the same; its one stage is the teacher

DIGEST is that of everything which determines the result, so that nothing is ever trained twice, and rows, groups and
seeds may be added to a sweep, or taken away, between one call and its resumption.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

from distkgd.config.tree import short
from distkgd.errors import ConfigError
from distkgd.pipeline.config import RunConfig, StageConfig, alone, parse_config, resolved
from distkgd.pipeline.run_folder import FREE_ON_RESUME
from distkgd.pipeline.stages import Stage, build_plan
from distkgd.pipeline.sweep.config import SweepConfig, Tree, expand, put_over

Kind = Literal["student", "direct", "teacher"]
Figure = float | str | None  # of a paper
DIRECT = "direct"


@dataclass(frozen=True)
class Trial:
    """One plan to be run, whose teachers are finished models or will be.

    name: for people: group, row and seed. config: whose student is what it is about; of kind direct or teacher, all
        there is. stage: the name of the stage that is scored; it also seeds that stage.
    data: sha256 of the graph. paper: the paper's figure.
    """

    name: str
    group: str
    row: str
    kind: Kind
    config: RunConfig
    stage: str
    data: str
    paper: Figure = None
    overrides: Tree = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of the config."""
        return self.config.seed

    @property
    def digest(self) -> str:
        """Of all that determines the result."""
        plain = {key: value for key, value in resolved(self.config).items() if key not in FREE_ON_RESUME}
        plain["data"] = self.data  # wherever it lies
        content = {"config": plain, "stage": self.stage, "kind": self.kind}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        return out / ("teachers" if self.kind == "teacher" else "trials") / self.digest

    @property
    def scored(self) -> StageConfig:
        """The config of the stage that is scored."""
        return self.config.student

    def teachers(self) -> dict[str, "Trial"]:
        """Stage name -> the trial that makes this teacher; nothing for those that are paths of models."""
        config = self.config
        stages = {name: stage for name, stage in config.all_teachers().items() if isinstance(stage, StageConfig)}
        return {name: teacher_trial(name, stage, config, self.data) for name, stage in stages.items()}

    def with_teachers(self, out: Path) -> RunConfig:
        """The config whose teachers are the finished models in `out`."""
        made = {name: str(trial.folder(out) / "stages" / name) for name, trial in self.teachers().items()}
        config = self.config
        if config.teachers is not None:
            return config.model_copy(update={"teachers": {**config.teachers, **made}})
        return config.model_copy(update=made)

    def plan(self, config: RunConfig) -> list[Stage]:
        """The stages of `config`, which is `with_teachers`."""
        return build_plan(config) if self.kind == "student" else [Stage(self.stage, config.student, ())]


def teacher_trial(name: str, stage: StageConfig, config: RunConfig, data: str) -> Trial:
    """What trains a teacher of `config` exactly as `config`'s own plan would."""
    bare = single(stage, config)
    return Trial(f"{name} {stage.scorer} {stage.dim}, seed {config.seed}", "", name, "teacher", bare, name, data)


def single(stage: StageConfig, config: RunConfig) -> RunConfig:
    """A config of one stage without teacher, in all else as `config`."""
    gone = {"teacher": None, "teachers": None, "chain": None, "assistant": None, "baseline": False, "name": "run"}
    return config.model_copy(update={"student": stage, **gone})


def baseline_of(config: RunConfig) -> StageConfig:
    """The direct model beside the student of a config, also where the config has none."""
    if isinstance(config.baseline, StageConfig):
        return config.baseline
    last = list(config.students().values())[-1] if config.chain is not None else config.student
    return alone(last)


def needs_own_baseline(config: RunConfig) -> bool:
    """Whether the plan chooses an assistant by its direct model."""
    return config.assistant is not None and len(config.assistant.dims) > 1


def make_trial(name: str, group: str, row: str, tree: Tree, seed: int, data: Callable[[str], str]) -> Trial:
    """The trial of a config tree; its baseline, if any, is a trial of its own. data: name of a data set -> sha256."""
    config = parse_config({**tree, "seed": seed}, name)
    config = config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"enabled": False})})
    if not needs_own_baseline(config):
        config = config.model_copy(update={"baseline": False})
    return Trial(name, group, row, "student", config, "student", data(config.data))


def table_trials(sweep: SweepConfig, base: Tree, data: Callable[[str], str]) -> list[Trial]:
    """All trials of rows or a grid, with the direct models at the end of each group.

    Raises ConfigError naming the row.
    """
    rows = {name: dict(over) for name, over in (sweep.rows or grid_rows(sweep.grid or {})).items()}
    papers = {name: over.pop("paper", None) for name, over in rows.items()}
    trials: list[Trial] = []
    for group, over in (sweep.groups or {"": {}}).items():
        below = put_over(base, expand(over))
        direct: dict[str, tuple[str, list[Trial]]] = {}
        for row, own in rows.items():
            tree = put_over(below, expand(own))
            where = " / ".join(filter(None, (sweep.name, group, row)))
            baseline = parse_config(tree, where)
            for seed in sweep.seeds:
                name = f"{' / '.join(filter(None, (group, row)))}, seed {seed}"
                trial = make_trial(name, group, row, tree, seed, data)
                trials.append(replace(trial, paper=of_group(papers[row], group), overrides=own))
            if baseline.baseline is not False:
                stage = baseline_of(baseline)
                found = [_direct(trial, stage) for trial in trials[-len(sweep.seeds) :]]
                direct.setdefault(found[0].digest, (row, found))
        trials += _named_directs(direct, group, of_group(sweep.paper_direct, group))
    seen: dict[str, str] = {}
    for trial in trials:
        if (before := seen.setdefault(trial.digest, trial.name)) != trial.name:
            raise ConfigError(f"{sweep.name}: {before} and {trial.name} are the same config; change one, or drop it.")
    return trials


def with_teachers(trials: Sequence[Trial], paper: Figure | Mapping[str, Figure]) -> list[Trial]:
    """The trials, and at the end of each group the teachers of its first row, with the paper's figure of them."""
    found = []
    for group, some in groupby(trials, key=lambda one: one.group):
        members = list(some)
        first = [one for one in members if one.row == members[0].row]
        taught = [teacher for one in first for teacher in one.teachers().values()]
        shown = sorted(taught, key=lambda one: one.row)
        found += [*members, *(replace(one, group=group, paper=of_group(paper, group)) for one in shown)]
    return found


def of_group(figure: Figure | Mapping[str, Figure], group: str) -> Figure:
    """A paper's figure, of a group if it is given by group."""
    return figure.get(group) if isinstance(figure, Mapping) else figure


def _direct(trial: Trial, stage: StageConfig) -> Trial:
    config = single(stage, trial.config)
    return Trial(trial.name, trial.group, DIRECT, "direct", config, DIRECT, trial.data)


def _named_directs(direct: Mapping[str, tuple[str, list[Trial]]], group: str, paper: Figure) -> list[Trial]:
    """Direct models with names of their own: by their dim if that tells them apart, else by their first row.

    The paper's figure is the first one's: later ones have another loss.
    """
    dims = [found[0].scored.dim for _, found in direct.values()]
    named: list[Trial] = []
    for row, found in direct.values():
        own = f"{DIRECT} of {row}" if len(set(dims)) < len(dims) else f"{DIRECT} {found[0].scored.dim}"
        own = DIRECT if len(direct) == 1 else own
        for trial in found:
            name = f"{' / '.join(filter(None, (group, own)))}, seed {trial.seed}"
            named.append(replace(trial, row=own, name=name, paper=None if len(named) >= len(found) else paper))
    return named


def grid_rows(grid: Mapping[str, Sequence[Any]]) -> dict[str, Tree]:
    """Every combination as a row, named after what it sets."""
    for key, values in grid.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(f"grid.{key} must be a list of values (given: {short(values)}).")
    rows = {}
    for values in product(*grid.values()):
        over = dict(zip(grid, values, strict=True))
        rows[", ".join(f"{key}={value}" for key, value in over.items())] = over
    return rows
