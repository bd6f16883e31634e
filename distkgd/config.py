"""The run's configuration: a frozen typed tree. Defaults, then a YAML file, then `a.b=c` overrides; no unknown keys.

    data: wn18rr                      # a public set, pystdlib, or a folder
    teacher: {scorer: complex, dim: 256, epochs: 40}       # or a path to a finished model, or absent
    student: {scorer: complex, dim: 32, method: bkd, epochs: 40}
    baseline: true                    # the student's config without its teacher; a mapping overrides keys of it

`dim` is always real numbers per entity. A stage without a teacher must use method `scratch`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from distkgd.errors import ConfigError
from distkgd.methods import METHODS
from distkgd.settings import Count, Frozen, Positive, Rate, Real, Share, Weight, no_flag

DEEPEST = 8  # steps in a dotted key


class NegativesConfig(Frozen):
    """What a positive triple's answer is compared with.

    kind: "all" entities; `num` drawn per "batch", per "chunk" of triples, or per "triple".
    sides: ask for "both" ends of every triple, or for one end drawn "uniform"ly or by "bernoulli" statistics.
    filtered: leave out candidates that are known training answers of the query.
    labels: with kind "all", "known" makes it k-vs-all: all training answers of a query are its labels.
    """

    kind: Literal["all", "batch", "chunk", "triple"] = "all"
    num: Positive = 4096
    chunk: Positive = 64
    sides: Literal["both", "uniform", "bernoulli"] = "both"
    filtered: bool = False
    labels: Literal["one", "known"] = "one"

    @model_validator(mode="after")
    def _labels_need_all(self) -> "NegativesConfig":
        if self.labels == "known" and self.kind != "all":
            raise ValueError(f"labels: known (k-vs-all) needs kind: all, not kind: {self.kind}")
        return self


class LossConfig(Frozen):
    """The hard-label loss of a stage (see `distkgd.losses`).

    name: softmax (cross-entropy), bce (summed over candidates), softplus (negatives averaged per query),
        self_adversarial (negatives weighed by their own scores), margin (hinge, averaged).
    temperature: of the self-adversarial weights; margin: of the hinge.
    label_smoothing: share of the label mass spread over all candidates (softmax and bce).
    """

    name: Literal["softmax", "bce", "softplus", "self_adversarial", "margin"] = "softmax"
    temperature: Rate = 1.0
    margin: Rate = 1.0
    label_smoothing: Share = 0.0


class RegulariserConfig(Frozen):
    """Penalty on the embeddings of a batch: n2, n3 (Lacroix et al. 2018) or dura (Zhang et al. 2020)."""

    name: Literal["none", "n2", "n3", "dura"] = "none"
    weight: Weight = 0.0
    relation_weight: Weight | None = None

    @model_validator(mode="after")
    def _dura_has_one_weight(self) -> "RegulariserConfig":
        if self.name == "dura" and self.relation_weight is not None:
            raise ValueError("dura weighs queries, not relations: drop relation_weight, or use n2 or n3")
        return self


class OptimizerConfig(Frozen):
    """Row optimiser of the entity table and dense optimiser of everything else.

    name: rowwise_adagrad keeps one number per row, adam moves only rows that a step touches.
    relation_lr: learning rate of relations and other small parameters; default: lr.
    clip: largest global gradient norm; 0 leaves gradients alone.
    offload: keep the rows' optimiser state in host memory.
    """

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "adagrad"
    lr: Rate = 0.1
    relation_lr: Rate | None = None
    clip: Weight = 0.0
    offload: bool = False


class ScheduleConfig(Frozen):
    """Learning rate over the stage: constant; linear or cosine to `final` x lr; plateau multiplies by `factor` after
    `patience` validations without a better MRR."""

    name: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    final: Weight = 0.0
    factor: Share = 0.5
    patience: Positive = 2


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return name


class StageConfig(Frozen):
    """One training run: one student, one method.

    dim: real numbers per entity. margin, norm: constants of distance scorers; default: the scorer's.
    reciprocal: head queries are tail queries of an inverse relation (two relation rows each).
    init_scale: standard deviation or half-width of the initial entity rows; default: the scorer's.
    batch_size: triples in the global batch. accumulate: parts into which each batch is cut to save memory.
    dropout, relation_dropout: on the query's anchor and relation embeddings.
    bf16: score candidates in bfloat16; rows stay in full precision.
    row_dtype: bfloat16 stores entity rows in half the memory and rounds their updates stochastically.
    move: what travels between ranks: candidate "rows" to the queries, "queries" to the candidates, or "nothing":
        then each rank draws its candidates from its own shard, and the model depends on the number of ranks.
        auto: whichever of the first two moves fewer bytes (`distkgd.distributed.cost`).
    balanced: batches with equally many triples from every (shard of the head, shard of the tail) pair, so that every
        rank sends every other one as many rows; pairs with fewer triples are visited more often, and the batches
        depend on the number of ranks.
    validate_every: epochs between validations, 0: never (the last rows are the model). patience: validations without
        a better MRR before the stage ends, 0: never. checkpoint_every: epochs, 0: only at validations and the end.
    """

    scorer: str = "complex"
    dim: Positive = 32
    method: Annotated[str, AfterValidator(_known_method)] = "scratch"
    distill: Any = None
    margin: Real | None = None
    norm: Literal[1, 2] | None = None
    reciprocal: bool = True
    init_scale: Rate | None = None
    negatives: NegativesConfig = NegativesConfig()
    loss: LossConfig = LossConfig()
    regulariser: RegulariserConfig = RegulariserConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch_size: Positive = 1000
    accumulate: Positive = 1
    epochs: Positive = 20
    dropout: Share = 0.0
    relation_dropout: Share = 0.0
    bf16: bool = False
    row_dtype: Literal["full", "bfloat16"] = "full"
    move: Literal["auto", "rows", "queries", "nothing"] = "auto"
    balanced: bool = False
    validate_every: Count = 5
    patience: Count = 0
    checkpoint_every: Count = 0

    @model_validator(mode="after")
    def _fits_together(self) -> "StageConfig":
        kind = METHODS[self.method].Settings
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
        unit = self.accumulate * (self.negatives.chunk if self.negatives.kind == "chunk" else 1)
        if self.batch_size % unit:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of {unit} (accumulate x chunk of triples)"
            )
        if self.move == "nothing" and self.negatives.kind == "all":
            raise ValueError(
                "move: nothing draws candidates from each rank's own shard; negatives.kind all has every one"
            )
        if self.loss.label_smoothing and self.loss.name not in ("softmax", "bce"):
            raise ValueError(f"label_smoothing works with loss softmax or bce, not {self.loss.name}")
        if self.schedule.name == "plateau" and not self.validate_every:
            raise ValueError("schedule plateau needs validations: set validate_every above 0")
        if self.regulariser.name == "none" and self.regulariser.weight:
            raise ValueError("regulariser.weight is set but regulariser.name is none; name n2, n3 or dura")
        METHODS[self.method].check(self)
        return self


def _stage_or(tag: str) -> Callable[[Any], str]:
    # Which branch of a union a value means, so that errors speak of that branch alone.
    return lambda value: "stage" if isinstance(value, Mapping | StageConfig) else tag


StageOrPath = Annotated[
    Annotated[StageConfig, Tag("stage")] | Annotated[str, Tag("path")], Discriminator(_stage_or("path"))
]
StageOrFlag = Annotated[
    Annotated[StageConfig, Tag("stage")] | Annotated[bool, Tag("flag")], Discriminator(_stage_or("flag"))
]


class MlflowConfig(Frozen):
    """Tracking: uri null is sqlite:///mlflow.db in the working directory."""

    enabled: bool = True
    uri: str | None = None


class EngineConfig(Frozen):
    """What trains the small replicated tensors (relations, evaluators); entity rows are always our own shards.

    name: ddp (one all-reduce, the same step on every rank) or deepspeed. zero: DeepSpeed's ZeRO stage.
    """

    name: Literal["ddp", "deepspeed"] = "ddp"
    zero: Annotated[int, BeforeValidator(no_flag), Field(ge=0, le=3)] = 0

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _zero_is_deepspeeds(self) -> "EngineConfig":
        if self.zero and self.name != "deepspeed":
            raise ValueError(f"zero: {self.zero} is a stage of DeepSpeed; use name: deepspeed, or drop zero")
        return self


class RunConfig(Frozen):
    """A whole run; see the module's docstring.

    ties: how equal scores rank: realistic (mean of best and worst), optimistic, pessimistic.
    filter: filtered, or raw (known answers compete too).
    test: off leaves the test split unread (for tuning).
    keep: newest checkpoints kept beside the best one; with 1, a damaged one may leave none to go back to.
    threads: CPU threads per rank, 0: torch's default.
    """

    name: str = "run"
    data: str = "pystdlib"
    seed: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: Count = 0
    teacher: StageOrPath | None = None
    student: StageConfig = StageConfig()
    baseline: StageOrFlag = False
    ties: Literal["realistic", "optimistic", "pessimistic"] = "realistic"
    filter: Literal["filtered", "raw"] = "filtered"
    test: bool = True
    keep: Positive = 2
    engine: EngineConfig = EngineConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @model_validator(mode="after")
    def _teacher_and_method_agree(self) -> "RunConfig":
        taught = METHODS[self.student.method].num_teachers
        if self.teacher is None and 0 not in taught:
            raise ValueError(
                f"student.method {self.student.method} needs a teacher; give `teacher:` a stage or a path to a "
                "finished model, or use student.method=scratch"
            )
        if self.teacher is not None and taught == range(1):
            raise ValueError(
                f"a teacher is given but student.method is {self.student.method}; use bkd or dualde, "
                "or drop the teacher"
            )
        if isinstance(self.teacher, StageConfig) and self.teacher.method != "scratch":
            raise ValueError(f"teacher.method must be scratch (it has no teacher itself), not {self.teacher.method}")
        return self


def load_config(path: Path | None, overrides: Sequence[str] = (), data: str | None = None) -> RunConfig:
    """The run described by a YAML file and `a.b=c` overrides; `data` replaces the config's.

    Raises ConfigError for an unreadable file, an unknown key, a wrong type or a combination that cannot work.
    """
    tree = _read_yaml(path) if path else {}
    where = str(path) if path else "the default config"
    if path and "name" not in tree:
        tree["name"] = f"{path.parent.name}_{path.stem}" if path.parent.name != "configs" else path.stem
    for override in overrides:
        _apply(tree, override)
    if data is not None:
        tree["data"] = data
    return parse_config(tree, where)


def parse_config(tree: Mapping[str, Any], where: str) -> RunConfig:
    """A plain mapping as a RunConfig; `where` names its origin in error messages."""
    try:
        return _parse(tree, where)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or an alias that refers to itself.") from None


def _parse(tree: Mapping[str, Any], where: str) -> RunConfig:
    plain = copy.deepcopy(dict(tree))
    if isinstance(plain.get("baseline"), Mapping):
        student = plain.get("student") or {}
        if not isinstance(student, Mapping):
            raise ConfigError(f"{where}: student must be a mapping, not {student!r}.")
        alone = {k: v for k, v in student.items() if k not in ("method", "distill")}
        plain["baseline"] = merge(alone, plain["baseline"])
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, RunConfig)}.") from None


def resolved(config: RunConfig) -> dict[str, Any]:
    """The whole tree as plain data, every default filled in."""
    return config.model_dump(mode="json")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over` put over it."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in Path("configs").rglob("*.yaml"))[:20]
        raise ConfigError(f"There is no config file {path}. Shipped ones: {', '.join(near) or 'none here'}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {text}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must hold a mapping of option names to values, not {type(tree).__name__}.")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    path = key.strip().split(".")
    if not sign or not all(path) or len(path) > DEEPEST:
        raise ConfigError(f"Override {_short(override)} is not of the form key=value or a.b=value.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"Override {_short(override)}: {_short(text)} is not a YAML value.") from None
    node = tree
    for step in path[:-1]:
        below = node.get(step)
        node[step] = below if isinstance(below, dict) else {}
        node = node[step]
    node[path[-1]] = value


def _explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    lines = []
    for item in error.errors(include_url=False):
        # Tags of a union are pydantic's, not part of the user's path.
        tagged = len(item["loc"]) > 1 and item["loc"][0] in ("teacher", "baseline") and item["loc"][1] in _TAGS
        path = [str(part) for i, part in enumerate(item["loc"]) if not (tagged and i == 1)]
        where = ".".join([prefix, *path] if prefix else path)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"no such option (given: {_short(item['input'])}); allowed here: {_siblings(path, root)}"
        elif item["type"] != "value_error":
            message = f"{message} (given: {_short(item['input'])})"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(dict.fromkeys(lines))


_TAGS = ("stage", "path", "flag")


def _siblings(path: Sequence[str], root: type[BaseModel]) -> str:
    node = root
    for part in path[:-1]:
        if part in ("teacher", "baseline"):
            node = StageConfig
            continue
        kind = node.model_fields[part].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            node = kind
        else:
            # An optional node, e.g. stage_two: StageTwoConfig | None.
            node = next(k for k in get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel))
    return ", ".join(node.model_fields) or "nothing"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
