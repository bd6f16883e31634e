"""A plan as data: stages, who teaches whom, and what is refused before any stage has cost time."""

from dataclasses import dataclass

from distkgd.config import RunConfig, StageConfig
from distkgd.errors import ConfigError, DistkgdError, UnsupportedError
from distkgd.graph import Graph
from distkgd.methods import NoSettings
from distkgd.scorers import build_scorer


@dataclass(frozen=True)
class Stage:
    """One training run of a plan. teachers: names of earlier stages, or paths of finished models."""

    name: str
    config: StageConfig
    teachers: tuple[str, ...]


def build_plan(config: RunConfig) -> list[Stage]:
    """The stages of a run, in an order in which every teacher comes first."""
    stages: list[Stage] = []
    teachers: tuple[str, ...] = ()
    if isinstance(config.teacher, StageConfig):
        stages.append(Stage("teacher", config.teacher, ()))
        teachers = ("teacher",)
    elif config.teacher is not None:
        teachers = (config.teacher,)
    stages.append(Stage("student", config.student, teachers))
    if config.baseline is not False:
        alone = config.baseline
        if alone is True:
            alone = config.student.model_copy(update={"method": "scratch", "distill": NoSettings()})
        stages.append(Stage("direct", alone, ()))
    return stages


def check_stage(stage: Stage, graph: Graph, world: int = 1) -> None:
    """Refuse what cannot work before any stage has cost time: ConfigError or UnsupportedError, naming the stage."""
    config, name = stage.config, stage.name
    try:
        scorer = build_scorer(config.scorer, config.dim, config.margin, config.norm)
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
    if config.balanced:
        check_balanced(name, config, world)


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
