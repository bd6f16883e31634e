"""A sweep as data: many plans that differ from one base config in a few keys.

    base: ../wn18rr/dualde_complex.yaml       # a plan's config, from the sweep's folder; or the config itself
    data: wn18rr                              # in place of the base's
    set: {student.epochs: 20}                 # keys put over the base, for all
    seeds: [0, 1, 2]

    rows:                                     # either a table: name -> keys put over the base
      DS: {}
      -SEM: {student.distill.evaluation: false, paper: .362}

    space:                                    # or a search: key -> grid, choice, uniform, loguniform or sample_from
      student.optimizer.lr: {loguniform: [0.01, 1.0]}
    trials: 16
    search: optuna
    scheduler: {name: asha, grace: 2, reduction: 3}

`grid` in place of `rows` makes a row of every combination, and two keys a heat map. `groups` repeats the rows on other
bases. Keys are those of a plan's config, as a.b.c or nested.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from distkgd.common.paths import AnyPath, check_name
from distkgd.config.fields import Count, Frozen, Positive, Real
from distkgd.config.shipped import find_config
from distkgd.config.tree import merge, read_yaml, short
from distkgd.errors import ConfigError

Tree = dict[str, Any]
KINDS = ("grid", "choice", "uniform", "loguniform", "sample_from")


def expand(overrides: Mapping[str, Any]) -> Tree:
    """{"a.b": 1} as {"a": {"b": 1}}; a step that is a number becomes one, as YAML reads it."""
    tree: Tree = {}
    for key, value in overrides.items():
        node: Any = expand(value) if isinstance(value, Mapping) else value
        for step in reversed(str(key).split(".")):
            node = {int(step) if step.isdecimal() else step: node}
        tree = merge(tree, node)
    return tree


def put_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`base` with `over` merged in; a stage that gets another method loses the options of the old one."""
    plain = dict(base)
    for name, stage in over.items():
        old = plain.get(name)
        if isinstance(stage, Mapping) and isinstance(old, Mapping) and "distill" in old:
            before = old.get("method", "scratch")
            if stage.get("method", before) != before:
                plain[name] = {key: value for key, value in old.items() if key != "distill"}
    return merge(plain, over)


class Domain(Frozen):
    """What a key of a search space may be: exactly one of these.

    grid: every value, in combination with those of other grids. choice: one of some values, drawn.
    uniform, loguniform: a number of [low, high), drawn evenly, or evenly in its logarithm.
    sample_from: a rule by name that says it by another key: same_as its value, or times it by a factor.
    of: that other key. by: that factor.
    """

    grid: list[Any] | None = Field(default=None, min_length=1)
    choice: list[Any] | None = Field(default=None, min_length=1)
    uniform: tuple[Real, Real] | None = None
    loguniform: tuple[Real, Real] | None = None
    sample_from: Literal["same_as", "times"] | None = None
    of: str | None = None
    by: Real | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "Domain":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)} (given: {', '.join(given) or 'none'})")
        for kind in ("uniform", "loguniform"):
            ends = getattr(self, kind)
            if ends is not None and not ends[0] < ends[1]:
                raise ValueError(f"{kind} is [low, high] with low < high (given: {list(ends)})")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs low > 0 (given: {self.loguniform[0]})")
        if (self.sample_from is None) != (self.of is None):
            raise ValueError("sample_from and of belong together: {sample_from: same_as, of: student.optimizer.lr}")
        if (self.sample_from == "times") != (self.by is not None):
            raise ValueError("by is the factor of sample_from: times, and only of that")
        return self

    @property
    def examples(self) -> list[Any]:
        """Values at its ends, to check that the key takes them."""
        listed = self.grid or self.choice
        return listed if listed is not None else list(self.uniform or self.loguniform or ())

    def derived(self, value: Any) -> Any:
        """By the rule of `sample_from`, from the value of the key `of`; whole numbers stay whole."""
        if self.sample_from == "same_as":
            return value
        assert self.by is not None
        return round(value * self.by) if isinstance(value, int) else value * self.by


class AshaConfig(Frozen):
    """Asynchronous successive halving (Li et al. 2020) on validation MRR.

    name: asha, or none: every trial runs to its end. grace: the epoch at which trials are compared first, then at
        `reduction` times it, and so on. reduction: only the best 1/`reduction` go on.
    """

    name: Literal["asha", "none"] = "none"
    grace: Positive = 1
    reduction: Annotated[int, Field(ge=2)] = 3


def _a_name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class SweepConfig(Frozen):
    """A sweep: many plans that differ from one base in a few keys. It has rows, or a grid, or a space.

    name: its own, and its folder's in runs/; default: folder and name of the file. base: a plan's config, from this
        file's folder; or the config itself. data: in place of the base's. set: keys put over the base, for all.
    seeds: each row is trained at each. rows: name -> keys put over the base, and the paper's figure as `paper`.
    grid: key -> values; a row of every combination. space: key -> domain, for a search. search: who draws.
    groups: name -> keys put over the base; the rows stand once in each group.
    reference: the row (default: the first) that differences are taken to; direct: the first row's direct model.
    paper: which of the paper's figures the rows' `paper` are; paper_direct: that of the first row's direct model;
        paper_teacher: that of the teacher, which is then shown as a row. They may be numbers, texts, or mappings from
        group to either.
    cpu: keys put over this file itself by `distkgd reproduce --size cpu`: a table of a paper at a size for two cores.
    long_tail: test figures are those of relations with few training triples (MetaSD, Table 2).
    trials: of each arm of a search. equal_budget: the direct model of the student's size gets as many.
    """

    name: Annotated[str, AfterValidator(check_name)] = "sweep"
    base: str | Tree
    data: str | None = None
    set: Tree = Field(default_factory=dict)
    seeds: list[Count] = Field(default=[0], min_length=1)
    groups: dict[str, Tree] = Field(default_factory=dict)
    rows: dict[str, Tree] | None = Field(default=None, min_length=1)
    grid: dict[str, list[Any]] | None = Field(default=None, min_length=1)
    reference: str | None = None
    paper: str | None = None
    paper_direct: float | str | dict[str, float | str] | None = None
    paper_teacher: float | str | dict[str, float | str] | None = None
    cpu: Tree | None = None
    long_tail: bool = False
    space: dict[str, Domain] | None = Field(default=None, min_length=1)
    trials: Positive | None = None
    search: Literal["random", "optuna"] = "random"
    scheduler: Annotated[AshaConfig, BeforeValidator(_a_name_alone, json_schema_input_type=AshaConfig | str)] = (
        AshaConfig()
    )
    equal_budget: bool = True

    @model_validator(mode="after")
    def _is_a_table_or_a_search(self) -> "SweepConfig":
        given = [name for name in ("rows", "grid", "space") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of rows, grid and space (given: {', '.join(given) or 'none'})")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ (given: {self.seeds})")
        if self.space is None:
            if self.trials is not None or self.search != "random" or self.scheduler.name != "none":
                raise ValueError("trials, search and scheduler belong to a space; rows and grid run each row once")
        else:
            self._check_space(self.space)
        if self.rows is not None and self.reference not in (None, "direct", *self.rows):
            raise ValueError(f"reference {short(self.reference)} is none of the rows {', '.join(self.rows)}")
        return self

    def _check_space(self, space: Mapping[str, Domain]) -> None:
        if self.groups or self.reference or self.paper:
            raise ValueError("groups, reference and paper belong to rows or grid; a space has none")
        drawn = [key for key, domain in space.items() if domain.grid is None and domain.sample_from is None]
        if drawn and self.trials is None:
            raise ValueError(f"{drawn[0]} is drawn: say how often with trials")
        if not drawn and self.trials is not None:
            raise ValueError("trials is for drawn keys; grids alone are gone through once")
        for key, domain in space.items():
            if domain.of is not None and (domain.of not in space or space[domain.of].of is not None):
                raise ValueError(f"{key}: of {short(domain.of)} must be a key of the space that is not sample_from")
        if self.search == "optuna" and (grids := [key for key, domain in space.items() if domain.grid is not None]):
            raise ValueError(f"{grids[0]}: Optuna draws every value itself; use choice in place of grid")


def load_sweep(path: AnyPath, cpu: bool = False) -> tuple[SweepConfig, Tree]:
    """A sweep's file, or a shipped one by its name, and the tree of its base config with `data` and `set` put over it.

    cpu: with the file's own `cpu` put over it first. Raises ConfigError naming the file and the key.
    """
    path = find_config(path)
    plain = read_yaml(path)
    if cpu and isinstance(plain.get("cpu"), Mapping):
        plain = merge(plain, plain["cpu"])
    plain.setdefault("name", "_".join(part for part in path.with_suffix("").parts[-2:] if part != path.anchor))
    try:
        sweep = SweepConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_told(error)}.") from None
    base = read_yaml(path.parent / sweep.base) if isinstance(sweep.base, str) else expand(sweep.base)
    base = put_over(base, expand(sweep.set))
    if sweep.data is not None:
        base["data"] = sweep.data
    return sweep, base


def _told(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            nodes: dict[Any, type[Frozen]] = {"space": Domain, "scheduler": AshaConfig}
            allowed = nodes.get(item["loc"][0], SweepConfig)
            message = f"no such option; allowed here: {', '.join(allowed.model_fields)}"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(dict.fromkeys(lines))


def with_seeds(sweep: SweepConfig, text: str) -> SweepConfig:
    """A sweep at the seeds of a text such as "0,1,2"; ConfigError when it is none."""
    try:
        seeds = [int(part) for part in text.split(",")]
        return SweepConfig.model_validate(sweep.model_dump() | {"seeds": seeds})
    except ValidationError as error:
        raise ConfigError(f"--seeds {text}: {_told(error)}.") from None
    except ValueError:
        raise ConfigError(f"--seeds {text} must be whole numbers with commas between, such as 0,1,2.") from None
