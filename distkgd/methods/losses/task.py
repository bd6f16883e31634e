"""The loss of the labels: how a stage's models are seen, what their scores cost, and the penalty on their rows."""

from dataclasses import dataclass

from torch import Tensor

from distkgd.config.stage import StageOptions
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.methods.losses.scores import batch_mean, hard_loss, regulariser
from distkgd.models.model import Model
from distkgd.models.view import View


@dataclass(frozen=True)
class TaskLoss:
    """The hard loss and its regulariser, with the options of a stage that they need."""

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

    def view(self, model: Model, inputs: StepInputs, *, grad: bool, dropped: bool | None = None) -> View:
        """The view of a model that learns or is only asked for scores. dropped: with dropout; default: if it learns."""
        dropped = grad if dropped is None else dropped
        dropout, relation_dropout = (self.dropout, self.relation_dropout) if dropped else (0.0, 0.0)
        return View(model, inputs, grad=grad, dropout=dropout, relation_dropout=relation_dropout, bf16=self.bf16)

    def request(self, view: View) -> LossRequest:
        """Asks for [Q]: the hard loss."""
        return hard_loss(
            self.loss,
            view,
            temperature=self.temperature,
            margin=self.margin,
            label_smoothing=self.label_smoothing,
        )

    def penalty(self, view: View, times: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The regulariser as a term, or nothing. times: as `regulariser` takes it."""
        if self.regulariser == "none":
            return {}
        rows = regulariser(self.regulariser, view, self.weight, self.relation_weight, times)
        return {self.regulariser: batch_mean(rows, view.inputs)}


def task_loss_of(stage: StageOptions) -> TaskLoss:
    """The task loss that a stage's config describes."""
    return TaskLoss(
        loss=stage.loss.name,
        temperature=stage.loss.temperature,
        margin=stage.loss.margin,
        label_smoothing=stage.loss.label_smoothing,
        regulariser=stage.regulariser.name,
        weight=stage.regulariser.weight,
        relation_weight=stage.regulariser.relation_weight,
        dropout=stage.dropout,
        relation_dropout=stage.relation_dropout,
        bf16=stage.bf16,
    )
