"""What a method is: it yields updates, the loop does everything else (design 4.3)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distkgd.distributed.rows import Ask
from distkgd.losses import Travel, batch_mean, hard_loss, hard_travel, regulariser
from distkgd.model import Model, View
from distkgd.scenes import Scene


@dataclass(frozen=True)
class Update:
    """One simultaneous step of some parameter groups on a sum of named loss terms ([] each, this rank's share)."""

    groups: frozenset[str]
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class HardSettings:
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


class Method(ABC):
    """One way to train a student. Models in `trained` (group name -> model) get an optimiser; so do the tensors of
    `evaluators` (name -> tensor), as group "evaluators"."""

    name: ClassVar[str]
    evaluator_lr: float = 0.01

    def __init__(self, student: Model, hard: HardSettings) -> None:
        self.student = student
        self.hard = hard

    @property
    def trained(self) -> Mapping[str, Model]:
        """Group name -> model that this method may train."""
        return {"student": self.student}

    @property
    def evaluators(self) -> Mapping[str, Tensor]:
        """Small learned tensors beside the models."""
        return {}

    @abstractmethod
    def updates(self, scene: Scene) -> Iterator[Update]:
        """The updates of one part of a batch, in order."""

    @abstractmethod
    def travel(self) -> Travel:
        """What a query costs on the wire, beside the models' own queries, in the method's present phase."""

    def speakers(self) -> list[tuple[Model, bool]]:
        """The models whose queries travel in the present phase, and whether they learn."""
        return [(self.student, True)]

    def last_epoch(self, epochs: int) -> int:
        """The epoch after which there is nothing left to do, for a stage of `epochs`; later phases may come on top."""
        return epochs

    def advance(self, epoch: int, epochs: int, plateau: bool) -> bool:
        """Called at the end of every epoch; True when the method entered its next phase just now.

        plateau: validation MRR has not risen for the stage's patience.
        """
        return False

    def lr_scale(self, group: str) -> float:
        """Factor on the learning rate of a group in the present phase."""
        return 1.0

    def state(self) -> dict[str, int]:
        """What `restore` needs after a restart, beside models and evaluators."""
        return {}

    def restore(self, state: Mapping[str, int]) -> None:  # noqa: B027 - most methods have nothing to restore
        """Take up where `state` was saved."""

    def view(self, model: Model, scene: Scene, *, grad: bool) -> View:
        """The view of a model that learns (with dropout) or only speaks (without)."""
        hard = self.hard
        dropout, relation_dropout = (hard.dropout, hard.relation_dropout) if grad else (0.0, 0.0)
        return View(model, scene, grad=grad, dropout=dropout, relation_dropout=relation_dropout, bf16=hard.bf16)

    def hard_ask(self, view: View) -> Ask:
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

    def penalty(self, view: View) -> dict[str, Tensor]:
        """The regulariser as a term, or nothing."""
        hard = self.hard
        if hard.regulariser == "none":
            return {}
        rows = regulariser(hard.regulariser, view, hard.weight, hard.relation_weight)
        return {hard.regulariser: batch_mean(rows, view.scene)}
