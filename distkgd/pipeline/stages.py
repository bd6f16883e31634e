"""A plan as data: stages, who teaches whom, and what is refused before any stage has cost time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distkgd.data import Graph
from distkgd.errors import ConfigError, DistkgdError, UnsupportedError
from distkgd.kernels.quantiser import BITS, Rounding
from distkgd.models.importers import Given, is_foreign, open_foreign
from distkgd.models.init_from_teacher import Shape, check_start
from distkgd.models.model_folder import read_shape
from distkgd.models.remote import is_remote, read_remote_shape
from distkgd.models.run_paths import imported_folder
from distkgd.pipeline.config import RunConfig, StageConfig, alone
from distkgd.scorers import build_scorer
from distkgd.scorers.base import check_reciprocal


@dataclass(frozen=True)
class Choice:
    """What a stage still has to learn from others: which of several configs is its own.

    configs: candidate stage -> the config that this stage has if that candidate wins.
    between: the stages or paths of models between which the winner's valid MRR is nearest to the middle.
    """

    configs: Mapping[str, StageConfig]
    between: tuple[str, str]


@dataclass(frozen=True)
class Stage:
    """One training run of a plan. teachers: names of earlier stages, or paths of finished models.

    choice: settles `config` once the stages that it names are finished; None where there is nothing to settle.
    overlap: the share of its epochs that may pass while its one teacher is still in training
    (`distkgd.pipeline.overlap`).
    """

    name: str
    config: StageConfig
    teachers: tuple[str, ...]
    choice: Choice | None = None
    overlap: float = 0.0

    @property
    def configs(self) -> list[StageConfig]:
        """All that this stage may have."""
        return [self.config] if self.choice is None else list(self.choice.configs.values())

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be finished before this one begins: names of stages, among them perhaps paths of models."""
        choice = self.choice
        return self.teachers if choice is None else (*self.teachers, *choice.configs, *choice.between)


@dataclass(frozen=True)
class Plan:
    """What a command runs, built once and handed on. folder: of the run. stages: every teacher comes first."""

    config: RunConfig
    graph: Graph
    folder: Path
    stages: Sequence[Stage]

    def stage(self, name: str) -> Stage | None:
        """By its name; None of a model from elsewhere."""
        return next((stage for stage in self.stages if stage.name == name), None)


def build_plan(config: RunConfig) -> list[Stage]:
    """The stages of a run, in an order in which every teacher comes first."""
    given = config.all_teachers()
    stages = [Stage(name, teacher, ()) for name, teacher in given.items() if isinstance(teacher, StageConfig)]
    own = {stage.name for stage in stages}
    teachers = tuple(name if name in own else str(path) for name, path in given.items() if path is not None)
    taught = taught_stages(config, teachers)
    if config.baseline is False:
        return stages + taught
    direct = Stage("direct", alone(taught[-1].config) if config.baseline is True else config.baseline, ())
    if any(stage.choice is not None for stage in taught):
        return [*stages, direct, *taught]  # it is one of those that settle the choice
    return [*stages, *taught, direct]


def taught_stages(config: RunConfig, teachers: tuple[str, ...]) -> list[Stage]:
    """The student, and before it what a chain or an assistant puts between it and its teachers."""
    sizes = config.students()
    if config.chain is not None:
        stages: list[Stage] = []
        for at, size in sizes.items():
            name = "student" if at == list(sizes)[-1] else f"student_{at}"
            stages.append(Stage(name, size, teachers, overlap=config.chain.overlap))
            teachers = (stages[-1].name,)
        return stages
    student = Stage("student", config.student, teachers)
    if config.assistant is None:
        return [student]
    student = Stage("student", config.student, ("assistant",))
    if len(sizes) == 1:
        return [Stage("assistant", next(iter(sizes.values())), teachers), student]
    candidates = [Stage(f"assistant_{dim}", alone(size), ()) for dim, size in sizes.items()]
    configs = {f"assistant_{dim}": size for dim, size in sizes.items()}
    choice = Choice(configs, (teachers[0], "direct"))
    return [*candidates, Stage("assistant", next(iter(sizes.values())), teachers, choice), student]


def check_plan(
    config: RunConfig, stages: Sequence[Stage], graph: Graph, world: int, folder: Path | None = None
) -> None:
    """Refuse what cannot work before any stage has cost time: ConfigError, UnsupportedError or ModelError.

    folder: of the run. A teacher of another library that it holds already is read there, not at its source.
    """
    shapes: dict[str, list[Shape]] = {}
    for stage in stages:
        shapes[stage.name] = check_stage(stage, graph, world)
        for name in stage.teachers:
            if name not in shapes:
                shapes[name] = [shape_of_teacher(name, config.trust_pickle, folder)]
        for one, mine in zip(stage.configs, shapes[stage.name], strict=True):
            if one.start == "random":
                continue
            for teacher in shapes[stage.teachers[0]]:
                try:
                    check_start(one.start, mine, teacher, graph.num_entities)
                except DistkgdError as error:
                    raise type(error)(f"{stage.name}.start: {error}") from None
        if stage.choice is not None and not len(graph.valid):
            raise ConfigError(f"{graph.name} has no valid triples to choose the assistant's dim by; give one dim.")
    if config.chain is not None and config.chain.dims and isinstance(config.teacher, str):
        dim = shapes[config.teacher][0].scorer.dim
        if dim != config.chain.dims[0]:
            raise ConfigError(f"chain begins at {config.chain.dims[0]}, and the model {config.teacher} has dim {dim}.")
    if config.assistant is not None and isinstance(config.teacher, str):
        dim = shapes[config.teacher][0].scorer.dim
        if max(config.assistant.dims) >= dim:
            raise ConfigError(f"assistant: dims must be below {dim}, that of the model {config.teacher}.")


def shape_of_teacher(source: str, trust_pickle: bool, folder: Path | None = None) -> Shape:
    """Of a finished model: a model folder, its URI, or LIBRARY:PATH; those perhaps in the run's `folder` by now."""
    if folder is not None and (brought := imported_folder(folder, source) / "model").is_dir():
        return Shape(*read_shape(brought))
    if is_foreign(source):
        model = open_foreign(source, Given(trust_pickle=trust_pickle))
        return Shape(model.scorer, model.reciprocal)
    return Shape(*(read_remote_shape(source) if is_remote(source) else read_shape(Path(source))))


def check_stage(stage: Stage, graph: Graph, world: int = 1) -> list[Shape]:
    """The models that a stage may make; ConfigError or UnsupportedError, naming it, if it cannot work on this data."""
    return [check_config(stage.name, config, graph, world) for config in stage.configs]


def rounding_of(config: StageConfig) -> Rounding:
    """Of a stage's student; ConfigError where there are no such rows."""
    nested = config.distill.nested_bits
    bits = nested[-1] if nested else config.bits
    return Rounding(bits, config.relation_bits, config.group, nested[:-1])


def usual_rounding(bits: int) -> Rounding:
    """Entities of so many bits, and relations, of which there are few, of twice as many: of 4 at least."""
    relation_bits = next(more for more in BITS if more >= min(32, max(4, 2 * bits)))
    return Rounding(bits, relation_bits)


def check_config(name: str, config: StageConfig, graph: Graph, world: int) -> Shape:
    """`check_stage` of one config."""
    try:
        scorer = build_scorer(config.scorer, config.dim, config.margin, config.norm)
        check_reciprocal(scorer, config.reciprocal)
        rounding_of(config).quantisers(scorer)
        config.distill.check_graph(graph)
    except DistkgdError as error:
        raise type(error)(f"{name}: {error}") from None
    if config.bf16 and scorer.candidate_form != "dot":
        raise ConfigError(
            f"{name}.bf16 works for bilinear scorers; {scorer.name} would lose its distances to rounding."
        )
    if config.regulariser.name == "dura" and scorer.candidate_form != "dot":
        raise UnsupportedError(f"{name}.regulariser dura is defined for bilinear scorers, not {scorer.name}; use n3.")
    if config.batch_size > len(graph.train):
        raise ConfigError(
            f"{name}.batch_size {config.batch_size} does not fit {len(graph.train)} training triples; choose less."
        )
    if not len(graph.valid) or not config.validate_every:
        check_unvalidated(name, config, graph)
    if config.balanced:
        check_balanced(name, config, world)
    return Shape(scorer, config.reciprocal)


def check_unvalidated(name: str, config: StageConfig, graph: Graph) -> None:
    """ConfigError where a stage that is never validated is to wait for what validation says."""
    waits = [f"patience {config.patience}"] if config.patience else []
    waits += ["schedule plateau"] if config.schedule.name == "plateau" else []
    if waits:
        why, cure = f"{graph.name} has no valid triples", "give it some"
        if len(graph.valid):
            why, cure = "validate_every is 0", "set it above 0"
        raise ConfigError(
            f"{name}: {' and '.join(waits)} would wait for validations, but {why}; {cure}, or leave it out."
        )


def check_balanced(name: str, config: StageConfig, world: int) -> None:
    """ConfigError unless every rank's share of a balanced batch is whole."""
    negatives, unit = config.negatives, config.accumulate * world * world
    if config.batch_size % unit:
        raise ConfigError(
            f"{name}.balanced: batch_size {config.batch_size} must be a multiple of {unit} "
            f"(accumulate {config.accumulate} x {world} x {world} pairs of shards)."
        )
    if negatives.kind in ("chunk", "triple") and negatives.num % world:
        raise ConfigError(f"{name}.balanced: negatives.num {negatives.num} must be a multiple of {world} ranks.")
    if negatives.kind == "chunk" and (config.batch_size // config.accumulate // world) % negatives.chunk:
        raise ConfigError(
            f"{name}.balanced: a rank's {config.batch_size // config.accumulate // world} triples of a batch must be "
            f"a multiple of negatives.chunk {negatives.chunk}."
        )
