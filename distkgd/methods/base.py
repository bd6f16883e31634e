"""What a method is: it yields updates, the loop does everything else (design 4.3)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from distkgd.config.fields import Frozen
from distkgd.config.stage import OptimizerConfig, StageOptions
from distkgd.data import Graph
from distkgd.data.sampling import LeftOut
from distkgd.data.step_inputs import StepInputBuilder, StepInputs
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.methods.losses.task import TaskLoss
from distkgd.models.model import Model

M_co = TypeVar("M_co", covariant=True)


class CurveOf(Protocol[M_co]):
    """(dims, "valid" or "test") -> {dim: metrics of the output model's crop to it}.

    bits: of its entities' numbers, where these are nested; None: all.
    """

    def __call__(self, dims: Sequence[int], split: str, bits: int | None = None) -> Mapping[int, M_co]: ...


Curve = CurveOf[Mapping[str, float | None]]
KnownCurve = CurveOf[dict[str, float]]  # of a split that holds triples


class MethodSettings(Frozen):
    """What `distill` holds in a stage's config, and what follows from it alone; by itself there is nothing to set."""

    @property
    def left_out(self) -> LeftOut:
        """Which of the training triples a pass leaves out, for quizzes."""
        return LeftOut()

    @property
    def triples_together(self) -> int:
        """Runs of so many triples of a batch stay whole on one rank."""
        return 1

    @property
    def nested_bits(self) -> tuple[int, ...]:
        """Ascending widths of the student's entity numbers, each the top bits of the next; () where there is one."""
        return ()

    def check(self, stage: StageOptions) -> None:
        """ValueError for a combination with other options of the stage that the method cannot do."""

    @property
    def cached(self) -> bool:
        """Whether soft labels are read from files, in place of a teacher."""
        return False

    def check_graph(self, graph: Graph) -> None:
        """DataError or ConfigError where these settings are not for that graph."""

    def check_teachers(self, given: int) -> None:
        """ValueError where these settings are not for that many teachers."""


S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True)
class Update:
    """One simultaneous step of some parameter groups on a sum of named loss terms ([] each, this rank's share).

    watched: numbers for the curves that are no loss (like the terms, without a gradient); their names have a slash.
    """

    groups: frozenset[str]
    terms: dict[str, Tensor]
    watched: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterGroup:
    """What one optimiser moves: the tables of a model, or small tensors that every rank holds whole.

    optimizer: options that replace the stage's.
    """

    model: Model | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def replicated(self) -> dict[str, Tensor]:
        """What every rank holds whole: the tensors, or the relations of the model."""
        return dict(self.tensors) if self.model is None else {"relation": self.model.relation}

    def recipe(self, stage: OptimizerConfig) -> OptimizerConfig:
        """The optimiser's options in a stage that has these."""
        return stage.model_copy(update=dict(self.optimizer))


@dataclass(frozen=True)
class Phase:
    """The present phase of a method's training, in epochs: what the learning-rate schedule spans.

    begin: epochs done when it began. end: after which it ends at the latest, with a validation.
    last: after which the whole stage ends at the latest, as far as is known now.
    lr_scale: group -> factor on its learning rate, default 1. frozen: groups that do not learn.
    """

    begin: int
    end: int
    last: int
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MethodState:
    """What a checkpoint holds of a method beside its parameter groups.

    values: JSON-able. rows, tensors: sharded and replicated ones, which a restart fills in place.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What of its stage a method may need beside models.

    steps_per_epoch, epochs: as configured; phases of a method may come on top.
    fresh: (dim, name) -> a fresh model like the student, of another dim; the name gives it numbers of its own.
    input_builder: what the stage trains on; its quizzes are over the triples that passes leave out.
    """

    steps_per_epoch: int
    epochs: int
    fresh: Callable[[int, str], Model]
    input_builder: StepInputBuilder


class Method(ABC, Generic[S]):
    """One way to train a student. `name` and `updates` make one; all else has a default.

    Settings: what `distill` holds in a stage's config. num_teachers: how many finished teachers it can have.
    trains_teachers: whether its copies of them ever learn.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    num_teachers: ClassVar[range] = range(1, 2)
    trains_teachers: ClassVar[bool] = False

    def __init__(self, student: Model, task: TaskLoss, teachers: Sequence[Model], settings: S, setup: Setup) -> None:
        self.student = student
        self.task = task
        self.teachers = list(teachers)
        self.settings = settings
        self.setup = setup
        self.prepare()

    def prepare(self) -> None:
        """Make what the method keeps beside student, teachers and settings; called once, when these are there."""

    @abstractmethod
    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        """The updates of one part of a batch, in order."""

    @property
    def groups(self) -> Mapping[str, ParameterGroup]:
        """All that this method may train, by name; "student" is the student, "evaluators" are tensors of its own."""
        return {"student": ParameterGroup(self.student)}

    @property
    def output_model(self) -> Model:
        """The model that is validated, and in the end saved."""
        return self.student

    def phase(self, epochs: int) -> Phase:
        """The present phase, in a stage of `epochs`; later phases may come on top of them."""
        return Phase(0, epochs, epochs)

    def advance(self, epoch: int, epochs: int, plateau: bool) -> bool:
        """Called at the end of every epoch; True when the method entered its next phase just now.

        plateau: validation MRR has not risen for the stage's patience.
        """
        return False

    def state(self) -> MethodState:
        """What a checkpoint must hold of this method."""
        return MethodState()

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take up where `state` was saved: its values are given, its tensors are filled already."""

    def logged(self, step: int) -> Mapping[str, float | Tensor]:
        """Numbers and short tensors for the curves after `step` steps, the same on all ranks; default: its tensors."""
        return {name: tensor for group in self.groups.values() for name, tensor in group.tensors.items()}

    def validate(self, evaluate: Callable[[], dict[str, float]], curve: KnownCurve) -> dict[str, float]:
        """Metrics on the validation split, of which "mrr" picks the best rows. evaluate: -> the output model's."""
        return evaluate()

    def report(self, curve: Curve, splits: Sequence[str]) -> dict[str, Any]:
        """What the stage's result.json holds beside what every stage's does; the best rows are back in the student."""
        return {}


def trained_models(method: Method[Any], frozen: frozenset[str] = frozenset()) -> dict[str, Model]:
    """Group -> model that the method may train, but for the groups that are frozen."""
    groups = method.groups.items()
    return {name: group.model for name, group in groups if group.model is not None and name not in frozen}
