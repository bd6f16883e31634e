"""The run's configuration: a frozen typed tree. Defaults, then a YAML file, then `a.b=c` overrides; no unknown keys.

    data: wn18rr                      # a public set, pystdlib, or a folder
    teacher: {scorer: complex, dim: 256, epochs: 40}       # or a path to a finished model, or absent
    student: {scorer: complex, dim: 32, method: bkd, epochs: 40}
    baseline: true                    # the student's config without its teacher; a mapping overrides keys of it

`teachers` in place of `teacher`, `chain` and `assistant` make longer plans (`distkgd.pipeline.plan_config`,
`distkgd.pipeline.stages`). `dim` is always real numbers per entity. A stage without a teacher must use a method that
needs none (`scratch`, `dml`).
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from distkgd.common.paths import AnyPath, check_name
from distkgd.config.fields import Count, Frozen, Positive
from distkgd.config.run_options import EngineConfig, MlflowConfig, ReportConfig
from distkgd.config.shipped import find_config
from distkgd.config.stage import StageOptions
from distkgd.config.tree import apply, merge, read_yaml, short
from distkgd.errors import ConfigError
from distkgd.methods import Method, MethodSettings, check_teachers, method_class
from distkgd.pipeline.plan_config import AssistantConfig, ChainConfig
from distkgd.scorers import scorer_class


def _known_method(name: str) -> str:
    method_class(name)
    return name


def _known_scorer(name: str) -> str:
    scorer_class(name)
    return name


# The options are those of `StageOptions`; docstrings of configs are read there.
class StageConfig(StageOptions):
    scorer: Annotated[str, AfterValidator(_known_scorer)] = "complex"
    method: Annotated[str, AfterValidator(_known_method)] = "scratch"

    @model_validator(mode="after")
    def _fits_its_method(self) -> "StageConfig":
        kind = method_class(self.method).Settings
        given = (
            self.distill.model_dump()
            if isinstance(self.distill, Frozen)
            else ({} if self.distill is None else self.distill)
        )
        # The node's own type depends on `method`, so it is parsed here; frozen models need the back door.
        try:
            object.__setattr__(self, "distill", kind.model_validate(given))
        except ValidationError as error:
            raise ValueError(_explain(error, kind, f"distill (method {self.method})")) from None
        if self.start != "random" and method_class(self.method).num_teachers[-1] == 0:
            raise ValueError(
                f"start: {self.start} begins from a teacher's rows and method {self.method} has none; use start: random"
            )
        self.distill.check(self)
        return self


def resized(stage: StageConfig, dim: int, over: Mapping[str, Any], where: str) -> StageConfig:
    """`stage` at another dim, with the keys of `over` put over it; `where` names those in errors."""
    tree = stage.model_dump() | {"dim": dim}
    if over.get("method", stage.method) != stage.method:
        del tree["distill"]  # the options of another method
    try:
        return StageConfig.model_validate(merge(tree, over))
    except ValidationError as error:
        raise ValueError(_explain(error, StageConfig, where)) from None


def alone(stage: StageConfig) -> StageConfig:
    """`stage` without teacher."""
    return stage.model_copy(update={"method": "scratch", "distill": MethodSettings(), "start": "random"})


def _stage_or(tag: str) -> Callable[[Any], str]:
    # Which branch of a union a value means, so that errors speak of that branch alone.
    return lambda value: "stage" if isinstance(value, Mapping | StageConfig) else tag


StageOrPath = Annotated[
    Annotated[StageConfig, Tag("stage")] | Annotated[str, Tag("path")], Discriminator(_stage_or("path"))
]
StageOrFlag = Annotated[
    Annotated[StageConfig, Tag("stage")] | Annotated[bool, Tag("flag")], Discriminator(_stage_or("flag"))
]


class RunConfig(Frozen):
    """A whole run: whom it trains, on what, and how that is judged.

    name: the run's, and its folder's in runs/; a config file that gives none is called after its folder and itself.
    data: a public set by name, pystdlib, a made graph (powerlaw:…), or a folder.
    seed: of everything that is drawn. device: auto takes a GPU where there is one.
    dtype: of tables and arithmetic; float64 for comparisons.
    teacher: a stage, the path or URI (s3://…) of a finished model, LIBRARY:PATH of another library's, or nothing.
    teachers: name -> stage or path, in place of `teacher`
        for methods that have several; the student gets them in this order.
    chain, assistant: models between teacher and student (`distkgd.pipeline.plan_config`).
    baseline: also train the student's config without its teacher; a mapping puts keys over it.
    ties: how equal scores rank: realistic (mean of best and worst), optimistic, pessimistic.
    filter: filtered, or raw (known answers compete too).
    test: off leaves the test split unread (for tuning).
    trust_pickle: a teacher `pykeen:PATH` may be a pickle, which runs what it says when it is read.
    keep: newest checkpoints kept beside the best one; with 1, a damaged one may leave none to go back to.
    storage: URI of a place for finished stages and newest checkpoints, for machines that share no disk
        (`distkgd.pipeline.storage`); null: the run folder is on a disk that all share.
    threads: CPU threads per rank, 0: torch's default.
    """

    name: Annotated[str, AfterValidator(check_name)] = "run"
    data: str = "pystdlib"
    seed: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: Count = 0
    teacher: StageOrPath | None = None
    teachers: dict[str, StageOrPath] | None = Field(default=None, min_length=1)
    chain: ChainConfig | None = None
    assistant: AssistantConfig | None = None
    student: StageConfig = StageConfig()
    baseline: StageOrFlag = False
    ties: Literal["realistic", "optimistic", "pessimistic"] = "realistic"
    filter: Literal["filtered", "raw"] = "filtered"
    test: bool = True
    trust_pickle: bool = False
    keep: Positive = 2
    storage: str | None = None
    engine: EngineConfig = EngineConfig()
    mlflow: MlflowConfig = MlflowConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _teachers_and_methods_agree(self) -> "RunConfig":
        if self.teacher is not None and self.teachers is not None:
            raise ValueError("teacher and teachers are both given; put the one among the others, or drop it")
        if wrong := [name for name in self.teachers or {} if not _TEACHER_NAME.fullmatch(name) or len(name) > 100]:
            raise ValueError(
                f"teachers: {short(wrong[0])} cannot name a stage; use at most 100 letters, digits, _ and -, and "
                "neither student, assistant nor direct at the beginning"
            )
        given = {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers or {})
        for name, teacher in given.items():
            if isinstance(teacher, StageConfig) and 0 not in method_class(teacher.method).num_teachers:
                raise ValueError(
                    f"{name}.method must be scratch or another that needs no teacher (it has none itself), "
                    f"not {teacher.method}"
                )
        _check_number(self.student, len(given))
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        between = [key for key in ("chain", "assistant") if getattr(self, key) is not None]
        if len(between) > 1:
            raise ValueError("chain and assistant are both given; an assistant is a chain of three, use one of them")
        if between and self.teacher is None:
            raise ValueError(f"{between[0]} begins at one teacher; give `teacher:` a stage or a path")
        for student in self.students().values():
            _check_number(student, 1)
        first = self.first_teacher()
        if isinstance(first, StageConfig) and 0 not in method_class(first.method).num_teachers:
            raise ValueError(
                f"chain.per_dim.{first.dim}: the teacher's method must need no teacher, not {first.method}"
            )
        top = self.teacher.dim if isinstance(self.teacher, StageConfig) else None
        if self.chain is not None:
            _check_overlap(self)
            for key, end in list(self.chain.students(self.student.dim).values())[-1].items():
                if end != (given := getattr(self.student, key)):
                    raise ValueError(f"chain ends at {end} and student.{key} is {given}; leave student.{key} out")
            if self.chain.dims and top not in (start := self.chain.dims[0], None):
                raise ValueError(f"chain begins at {start} and teacher.dim is {top}; leave teacher.dim out")
        if self.assistant is not None:
            dims = self.assistant.dims
            if min(dims) <= self.student.dim or (top is not None and max(dims) >= top):
                above = "" if top is None else f" and below teacher.dim {top}"
                raise ValueError(
                    f"assistant: dims must be above student.dim {self.student.dim}{above} (given: "
                    f"{', '.join(map(str, dims))})"
                )
            if len(dims) > 1 and isinstance(self.baseline, StageConfig) and self.baseline.dim != self.student.dim:
                raise ValueError(
                    f"assistant: the dim is chosen by the direct student's MRR, and baseline.dim {self.baseline.dim} "
                    f"is not student.dim {self.student.dim}; leave it out"
                )
            if len(dims) > 1 and self.baseline is False:
                raise ValueError(
                    "assistant: choosing among several dims compares with the student trained directly; set "
                    "baseline: true, or give one dim"
                )
        return self

    def students(self) -> dict[str, StageConfig]:
        """Name -> the student's config at a size, for all sizes below a chain's first or those of an assistant."""
        if self.chain is not None:
            key, per_dim, sizes = "chain", self.chain.per_dim, self.chain.students(self.student.dim)
            per_bits = self.chain.per_bits
        elif self.assistant is not None:
            key, per_dim, per_bits = "assistant", self.assistant.per_dim, {}
            sizes = {str(dim): {"dim": dim} for dim in self.assistant.dims}
        else:
            return {}
        found = {}
        for name, size in sizes.items():
            dim, bits = size["dim"], size.get("bits", 32)
            over = merge(per_dim.get(dim, {}), per_bits.get(bits, {}))
            where = f"{key}.per_bits.{bits}" if bits in per_bits and dim not in per_dim else f"{key}.per_dim.{dim}"
            found[name] = resized(self.student, dim, size | over, where)
        return found

    def all_teachers(self) -> dict[str, StageConfig | str | None]:
        """Name -> the stage, or the path, URI or LIBRARY:PATH, of each teacher."""
        return {"teacher": self.first_teacher()} if self.teachers is None else dict(self.teachers)

    def first_teacher(self) -> StageConfig | str | None:
        """What `teacher` says, with what a chain says of its dim."""
        if self.chain is None or not self.chain.dims or not isinstance(self.teacher, StageConfig):
            return self.teacher
        dim = self.chain.dims[0]
        return resized(self.teacher, dim, self.chain.per_dim.get(dim, {}), f"chain.per_dim.{dim}")


# Also a folder's name; the others are names of our own stages.
_TEACHER_NAME = re.compile(r"(?!student|assistant|direct)[A-Za-z0-9][\w-]*", re.ASCII)


def _check_number(student: StageConfig, given: int) -> None:
    if not given and not student.distill.cached and 0 not in method_class(student.method).num_teachers:
        raise ValueError(
            f"student.method {student.method} needs a teacher; give `teacher:` a stage or a path to a "
            "finished model, or use student.method=scratch"
        )
    if given and method_class(student.method).num_teachers[-1] == 0:
        raise ValueError(
            f"a teacher is given but student.method is {student.method}, which has none; use bkd or dualde, "
            "or drop the teacher"
        )
    check_teachers(student.method, given, student.distill)
    student.distill.check_teachers(given)
    if not given and student.start != "random":
        raise ValueError(f"student.start {student.start} begins from a teacher's rows; give one, or use random")


def _check_overlap(config: RunConfig) -> None:
    """ValueError for a chain whose links cannot overlap."""
    if config.chain is None or not config.chain.overlap:
        return
    if config.storage:
        raise ValueError("chain.overlap: a student reads its teacher's checkpoints on a disk they share; drop storage")
    first, students = config.first_teacher(), list(config.students().values())
    for stage in students:
        if method_class(stage.method).trains_teachers:
            raise ValueError(
                f"chain.overlap: {stage.method} trains its teacher, which must be finished; use overlap: 0"
            )
        if stage.start != "random":
            raise ValueError(f"chain.overlap: start {stage.start} takes rows of a finished teacher; use start: random")
    for stage in ([first] if isinstance(first, StageConfig) else []) + students[:-1]:
        if not (stage.validate_every or stage.checkpoint_every):
            raise ValueError(
                f"chain.overlap: a student begins on a checkpoint, and the model of dim {stage.dim} has none "
                "before its end; set validate_every or checkpoint_every"
            )
        if method_class(stage.method).output_model is not Method.output_model:
            raise ValueError(f"chain.overlap: what {stage.method} makes is known when it is finished; use overlap: 0")


def load_config(path: AnyPath | None, overrides: Sequence[str] = (), data: str | None = None) -> RunConfig:
    """The run described by a YAML file or a shipped config, and `a.b=c` overrides; `data` replaces the config's.

    Raises ConfigError for an unreadable file, an unknown key, a wrong type or a combination that cannot work.
    """
    tree = load_tree(path, overrides)
    if data is not None:
        tree["data"] = data
    return parse_config(tree, str(path) if path else "the default config")


def load_tree(path: AnyPath | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The options that a YAML file and `a.b=c` overrides give, unchecked; the file's name where it has no other."""
    path = None if path is None else find_config(path)
    tree = read_yaml(path) if path else {}
    if path and "name" not in tree:
        tree["name"] = f"{path.parent.name}_{path.stem}" if path.parent.name != "configs" else path.stem
    for override in overrides:
        apply(tree, override)
    return tree


def free_batches(path: Path | None, overrides: Sequence[str]) -> frozenset[str]:
    """The stages whose batch_size nobody has chosen: of the default plan, those that no override gives one."""
    if path is not None:
        return frozenset()
    tree = load_tree(None, overrides)
    chosen = {key for key in _STAGES if isinstance(tree.get(key), Mapping) and "batch_size" in tree[key]}
    return frozenset(_STAGES) - chosen - ({"baseline"} if "student" in chosen else set())


def parse_config(tree: Mapping[str, Any], where: str) -> RunConfig:
    """A plain mapping as a RunConfig; `where` names its origin in error messages."""
    try:
        return _parse(tree, where)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or an alias that refers to itself.") from None


def _parse(tree: Mapping[str, Any], where: str) -> RunConfig:
    plain = copy.deepcopy(dict(tree))
    over = _fill_dims(plain)
    if isinstance(plain.get("baseline"), Mapping):
        student = plain.get("student") or {}
        if not isinstance(student, Mapping):
            raise ConfigError(f"{where}: student must be a mapping, not {student!r}.")
        bare = {k: v for k, v in merge(student, over).items() if k not in ("method", "distill", "start")}
        plain["baseline"] = merge(bare, plain["baseline"])
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, RunConfig)}.") from None


def _fill_dims(plain: dict[str, Any]) -> Mapping[str, Any]:
    # The ends of a chain are the dims of teacher and student where these have none; what it says of the student.
    if plain.get("chain") is None:
        return {}
    try:
        chain = ChainConfig.model_validate(plain["chain"])
    except ValidationError:
        return {}  # told with everything else
    plain.setdefault("student", {})
    ends = {"teacher": {"dim": chain.dims[0]}, "student": {"dim": chain.dims[-1]}} if chain.dims else {"student": {}}
    if chain.bits:
        ends["student"]["bits"] = chain.bits[-1]
    for key, size in ends.items():
        if isinstance(plain.get(key), Mapping):
            plain[key] = {**size, **plain[key]}
    over = chain.per_dim.get(chain.dims[-1], {}) if chain.dims else {}
    return merge(over, chain.per_bits.get(chain.bits[-1], {}) if chain.bits else {})


def resolved(config: RunConfig) -> dict[str, Any]:
    """The whole tree as plain data, every default filled in."""
    return config.model_dump(mode="json")


def _explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    lines = []
    for item in error.errors(include_url=False):
        # Tags of a union are pydantic's, not part of the user's path.
        at = {"teacher": 1, "baseline": 1, "teachers": 2}.get(str(item["loc"][0]), 0) if item["loc"] else 0
        tagged = at and len(item["loc"]) > at and item["loc"][at] in _TAGS
        path = [str(part) for i, part in enumerate(item["loc"]) if not (tagged and i == at)]
        where = ".".join([prefix, *path] if prefix else path)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"no such option (given: {short(item['input'])}); allowed here: {_siblings(path, root)}"
        elif item["type"] != "value_error":
            message = f"{message} (given: {short(item['input'])})"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(dict.fromkeys(lines))


_TAGS = ("stage", "path", "flag")
_STAGES = ("teacher", "student", "baseline")


def _siblings(path: Sequence[str], root: type[BaseModel]) -> str:
    node = root
    for depth, part in enumerate(path[:-1]):
        if root is RunConfig and path[0] in ("teacher", "baseline", "teachers") and depth < 1 + (path[0] == "teachers"):
            node = StageConfig
            continue
        kind = node.model_fields[part].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            node = kind
        else:
            # An optional node, e.g. stage_two: StageTwoConfig | None.
            node = next(k for k in get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel))
    return ", ".join(node.model_fields) or "nothing"
