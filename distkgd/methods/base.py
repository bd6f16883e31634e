"""What a method is: it yields updates, the loop does everything else (design 4.3)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from distkgd.config.fields import Frozen
from distkgd.config.stage import OptimizerConfig, StageOptions
from distkgd.data.sampling import LeftOut
from distkgd.data.step_inputs import StepInputBuilder, StepInputs
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.methods.losses.scores import Travel, batch_mean, hard_loss, hard_travel, regulariser
from distkgd.models.model import Model, View

S = TypeVar("S", bound=Frozen)
# (dims, "valid" or "test") -> {dim: metrics of the product's crop to it}.
Curve = Callable[[Sequence[int], str], Mapping[int, Mapping[str, float | None]]]
KnownCurve = Callable[[Sequence[int], str], dict[int, dict[str, float]]]  # of a split that holds triples


@dataclass(frozen=True)
class Update:
    """One simultaneous step of some parameter groups on a sum of named loss terms ([] each, this rank's share).

    watched: numbers for the curves that are no loss (like the terms, without a gradient); their names have a slash.
    """

    groups: frozenset[str]
    terms: dict[str, Tensor]
    watched: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskLossConfig:
    """What of a stage's config the hard loss and its regulariser need."""

    loss: str
    temperature: float
    margin: float
    label_smoothing: float
    regulariser: str
    weight: float
    relation_weight: float | None
    dropout: float
    relation_dropout: float
    bf16: bool


@dataclass(frozen=True)
class Setup:
    """What of its stage a method may need beside models.

    steps_per_epoch, epochs: as configured; phases of a method may come on top.
    fresh: (dim, name) -> a fresh model like the student, of another dim; the name gives it numbers of its own.
    input_builder: what the stage trains on; `input_builder.quizzes` are over the triples that passes leave (see
    `Method.leave_out`).
    """

    steps_per_epoch: int
    epochs: int
    fresh: Callable[[int, str], Model]
    input_builder: StepInputBuilder


@dataclass(frozen=True)
class FurtherInputs:
    """Further inputs of a step: its builder, the models whose queries travel (and whether they learn), and `travel`."""

    input_builder: StepInputBuilder
    speakers: list[tuple[Model, bool]]
    travel: Travel


class NoSettings(Frozen):
    """Nothing to set."""


class Method(ABC, Generic[S]):
    """One way to train a student. Models in `trained` (group name -> model) get an optimiser; so do the tensors of
    `evaluators` (name -> tensor), as group "evaluators".

    Settings: what `distill` holds in a stage's config. num_teachers: how many finished teachers it can have.
    trains_teachers: whether its copies of them ever learn.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Frozen]] = NoSettings
    num_teachers: ClassVar[range] = range(1, 2)
    trains_teachers: ClassVar[bool] = False
    evaluator_lr: float = 0.01

    def __init__(
        self, student: Model, hard: TaskLossConfig, teachers: Sequence[Model], settings: S, setup: Setup | None = None
    ) -> None:
        self.student = student
        self.hard = hard
        self.teachers = list(teachers)
        self.settings = settings
        self._setup = setup
        self.prepare()

    def prepare(self) -> None:
        """Make what the method keeps beside student, teachers and settings; called once, when these are there."""

    @property
    def setup(self) -> Setup:
        """Of the stage; methods that work without do not ask."""
        assert self._setup is not None, f"method {self.name} needs a setup"
        return self._setup

    @classmethod
    def check(cls, stage: StageOptions) -> None:
        """ValueError for a combination of options that this method cannot do; `stage.distill` is a `Settings`."""

    @classmethod
    def leave_out(cls, settings: S) -> LeftOut:
        """Which of the training triples a pass leaves out, for the method to ask about."""
        return LeftOut()

    @property
    def output_model(self) -> Model:
        """The model that is validated, and in the end saved."""
        return self.student

    @property
    def trained(self) -> Mapping[str, Model]:
        """Group name -> model that this method may train."""
        return {"student": self.student}

    @property
    def evaluators(self) -> Mapping[str, Tensor]:
        """Small learned tensors beside the models."""
        return {}

    @property
    def logged_tensors(self) -> Mapping[str, Tensor]:
        """What the curves show of the evaluators; default: themselves."""
        return self.evaluators

    def logged_scalars(self, step: int) -> Mapping[str, float]:
        """Further numbers for the curves after `step` steps, the same on all ranks: schedules, phases, masks."""
        return {}

    @abstractmethod
    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        """The updates of one part of a batch, in order."""

    @abstractmethod
    def travel(self) -> Travel:
        """What a query costs on the wire, beside the models' own queries, in the method's present phase."""

    @property
    def triples_together(self) -> int:
        """Runs of so many triples of a batch stay whole on one rank."""
        return 1

    def further_inputs(self) -> "list[FurtherInputs]":
        """What a step does with other step inputs than those of its batch."""
        return []

    def recipe(self, group: str, stage: OptimizerConfig) -> OptimizerConfig:
        """The optimiser of a group; default: the stage's."""
        return stage

    def speakers(self) -> list[tuple[Model, bool]]:
        """The models whose queries travel in the present phase, and whether they learn."""
        return [(self.student, True)]

    def asks(self, model: Model) -> bool:
        """Whether the queries of a model that speaks meet candidates; else only its rows are looked up."""
        return True

    def last_epoch(self, epochs: int) -> int:
        """The epoch after which there is nothing left to do, for a stage of `epochs`; later phases may come on top."""
        return epochs

    def phase(self, epochs: int) -> tuple[int, int]:
        """Epochs (after how many it began, after how many it ends at the latest) of the present phase.

        Validation comes at its end, and the learning-rate schedule spans it.
        """
        return 0, self.last_epoch(epochs)

    def advance(self, epoch: int, epochs: int, plateau: bool) -> bool:
        """Called at the end of every epoch; True when the method entered its next phase just now.

        plateau: validation MRR has not risen for the stage's patience.
        """
        return False

    def lr_scale(self, group: str) -> float:
        """Factor on the learning rate of a group in the present phase."""
        return 1.0

    def state(self) -> dict[str, Any]:
        """What `restore` needs after a restart, beside models and evaluators; JSON-able."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up where `state` was saved."""

    def extra_state(self) -> tuple[Mapping[str, Rows], Mapping[str, Tensor]]:
        """Sharded and replicated tensors that a checkpoint must hold beside models; a restart fills them in place."""
        return {}, {}

    def validate(self, evaluate: Callable[[], dict[str, float]], curve: KnownCurve) -> dict[str, float]:
        """Metrics on the validation split, of which "mrr" picks the best rows. evaluate: -> those of the product."""
        return evaluate()

    def report(self, curve: Curve, splits: Sequence[str]) -> dict[str, Any]:
        """What the stage's result.json holds beside what every stage's does; the best rows are back in the product."""
        return {}

    def view(self, model: Model, inputs: StepInputs, *, grad: bool) -> View:
        """The view of a model that learns (with dropout) or only speaks (without)."""
        hard = self.hard
        dropout, relation_dropout = (hard.dropout, hard.relation_dropout) if grad else (0.0, 0.0)
        return View(model, inputs, grad=grad, dropout=dropout, relation_dropout=relation_dropout, bf16=hard.bf16)

    def hard_ask(self, view: View) -> LossRequest:
        """Asks for [Q]: the stage's hard loss."""
        hard = self.hard
        return hard_loss(
            hard.loss,
            view,
            temperature=hard.temperature,
            margin=hard.margin,
            label_smoothing=hard.label_smoothing,
        )

    def hard_travel(self) -> Travel:
        """Of `hard_ask`."""
        return hard_travel(self.hard.loss, label_smoothing=self.hard.label_smoothing)

    def penalty(self, view: View, times: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The regulariser as a term, or nothing. times: as `regulariser` takes it."""
        hard = self.hard
        if hard.regulariser == "none":
            return {}
        rows = regulariser(hard.regulariser, view, hard.weight, hard.relation_weight, times)
        return {hard.regulariser: batch_mean(rows, view.inputs)}
