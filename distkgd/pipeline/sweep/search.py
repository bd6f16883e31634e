"""A search as data: its two arms, what each may draw, and how often."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distkgd.errors import ConfigError
from distkgd.pipeline.config import parse_config, resolved
from distkgd.pipeline.sweep.config import Domain, SweepConfig, Tree, expand, put_over
from distkgd.pipeline.sweep.trials import DIRECT, Kind, Trial, baseline_of, make_trial, single

OF_TEACHERS = ("teacher", "teachers", "chain", "assistant")


@dataclass(frozen=True)
class Arm:
    """One side of a search: the taught student, or the direct model of its size.

    space: those keys of the sweep's that this arm has, as keys of `tree`. data: sha256 of the graph.
    """

    name: Kind
    tree: Tree
    space: Mapping[str, Domain]
    seed: int
    data: str

    @property
    def drawn(self) -> dict[str, Domain]:
        """The keys that are not derived from others."""
        return {key: domain for key, domain in self.space.items() if domain.of is None}

    @property
    def first(self) -> dict[str, Any]:
        """A draw."""
        return {key: domain.examples[0] for key, domain in self.drawn.items()}

    @property
    def num_points(self) -> int:
        """Combinations of its grids."""
        return math.prod(len(domain.grid) for domain in self.space.values() if domain.grid is not None)

    @property
    def shares_teachers(self) -> bool:
        """Whether all its trials have the same teachers."""
        return not any(key.split(".")[0] in (*OF_TEACHERS, "seed", "dtype", "data") for key in self.space)

    def trial(self, drawn: Mapping[str, Any]) -> Trial:
        """The trial of a draw."""
        values = {key: drawn[key] for key in self.drawn}
        values |= {key: d.derived(values[d.of]) for key, d in self.space.items() if d.of is not None}
        said = ", ".join(f"{key.removeprefix('student.')}={_brief(value)}" for key, value in values.items())
        tree = put_over(self.tree, expand(values))
        trial = make_trial(f"{self.name}: {said}", "", self.name, tree, self.seed, lambda _: self.data)
        trial = replace(trial, overrides=values)
        return trial if self.name == "student" else replace(trial, kind="direct", stage=DIRECT)

    def check(self) -> None:
        """ConfigError unless every key takes values from both ends of its domain."""
        for key, domain in self.drawn.items():
            for value in domain.examples:
                self.trial(self.first | {key: value})


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def search_arms(sweep: SweepConfig, base: Tree, data: Callable[[str], str]) -> list[Arm]:
    """The arms of a search; nothing in it reads the test split. data: name of a data set -> sha256.

    Keys of the student (but for how it is taught) and of the baseline are those of the direct arm.
    """
    assert sweep.space is not None
    tree = put_over(base, {"test": False})
    config = parse_config(tree, sweep.name)
    sha, seed = data(config.data), sweep.seeds[0]
    of_student = {key: domain for key, domain in sweep.space.items() if not key.startswith("baseline.")}
    arms = [Arm("student", tree, of_student, seed, sha)]
    if sweep.equal_budget and config.student.method != "scratch":
        space = _of_direct(sweep.space)
        if not space:
            raise ConfigError(
                f"{sweep.name}: no key of the space concerns the direct model, so it cannot have an equal budget; add "
                "one such as student.optimizer.lr, or set equal_budget: false."
            )
        arms.append(Arm("direct", resolved(single(baseline_of(config), config)), space, seed, sha))
    for arm in arms:
        arm.check()
    return arms


def _of_direct(space: Mapping[str, Domain]) -> dict[str, Domain]:
    found: dict[str, Domain] = {}
    for prefix in ("student", "baseline"):  # the latter's own domain goes over the former's
        for key, domain in space.items():
            first, _, rest = key.partition(".")
            if first == prefix and rest.split(".")[0] not in ("method", "distill", "start"):
                of = None if domain.of is None else f"student.{domain.of.partition('.')[2]}"
                found[f"student.{rest}"] = domain.model_copy(update={"of": of})
    return {key: domain for key, domain in found.items() if domain.of is None or domain.of in found}


def budgets(sweep: SweepConfig, arms: Sequence[Arm]) -> list[int]:
    """For each arm, draws of each point of its grids, so that all have the same number of trials.

    An arm of grids alone goes through them once, however many they are. ConfigError where it does not come out even.
    """
    total = sweep.trials or arms[0].num_points
    found = []
    for arm in arms:
        if all(domain.grid is not None for domain in arm.drawn.values()):
            found.append(1)
            continue
        if total % arm.num_points:
            raise ConfigError(
                f"{sweep.name}: {total} trials are no multiple of the {arm.num_points} points of the grids of arm "
                f"{arm.name}; change trials or a grid."
            )
        found.append(total // arm.num_points)
    return found


def note_draw(path: Path, arm: str, drawn: Mapping[str, Any]) -> None:
    """Add a draw of an arm to the list of those that were begun."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"arm": arm, "drawn": dict(drawn)}) + "\n")


def read_draws(path: Path, arm: Arm) -> list[Trial]:
    """The trials of an arm that were begun, in their order; a line that was cut short is left out."""
    trials: dict[str, Trial] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["arm"] == arm.name and row["drawn"].keys() >= arm.drawn.keys():
            trial = arm.trial(row["drawn"])
            trials[trial.digest] = trial
    return list(trials.values())
