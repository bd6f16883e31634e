"""DML (Zhang et al., "Deep Mutual Learning", 2018): two untrained models learn together, each from the other's softmax.

There is no finished teacher: the student's peer starts from numbers of its own and is thrown away in the end.
The paper's formulas are given from memory and carry no equation numbers.

Differs from the paper:
- DML[student] = hard + KL(peer || student) and DML[peer] = hard + KL(student || peer), each taking the other as given,
  are stepped on simultaneously; the paper's Algorithm 1 updates one, predicts anew, and updates the other.
- the softmaxes are those of each query over the batch's candidates and its answer, at temperature T, with factor T^2.
- more than two models, whose KL terms the paper averages, are not offered.
Differs from the authors' code: none of it was read.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from distkgd.config.fields import Positive, Rate, Weight
from distkgd.config.stage import StageOptions
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.errors import DistkgdError
from distkgd.methods.base import Method, MethodSettings, ParameterGroup, Update
from distkgd.methods.losses.scores import kl_divergence
from distkgd.scorers import build_scorer


class DmlConfig(MethodSettings):
    """Mutual learning: hard_weight * hard loss + weight * T^2 KL(other || own), of the student and of its peer.

    weight: factor on what each learns from the other. hard_weight: on the hard loss. temperature: T.
    peer_dim: real numbers per entity of the peer; default: the student's. A larger peer is a teacher that is trained
        beside its student.
    """

    weight: Weight = 1.0
    hard_weight: Weight = 1.0
    temperature: Rate = 1.0
    peer_dim: Positive | None = None

    def check(self, stage: StageOptions) -> None:
        if self.peer_dim is not None:
            try:
                build_scorer(stage.scorer, self.peer_dim, stage.margin, stage.norm)
            except DistkgdError as error:
                raise ValueError(f"distill.peer_dim: {error}") from None


class Dml(Method[DmlConfig]):
    """A student and an untrained peer that teach each other."""

    name = "dml"
    Settings = DmlConfig
    num_teachers = range(1)

    def prepare(self) -> None:
        self.peer = self.setup.fresh(self.settings.peer_dim or self.student.entity.dim, "peer")

    @property
    def groups(self) -> Mapping[str, ParameterGroup]:
        return {"student": ParameterGroup(self.student), "peer": ParameterGroup(self.peer)}

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        how = self.settings
        student, peer = self.task.view(self.student, inputs, grad=True), self.task.view(self.peer, inputs, grad=True)
        asks: dict[str, tuple[float, LossRequest]] = {}
        penalties: dict[str, Tensor] = {}
        # DML[student], DML[peer]
        for tag, own, other in (("", student, peer), ("peer_", peer, student)):
            asks[f"{tag}soft"] = how.weight, kl_divergence(own, other, how.temperature, stop_teacher=True)
            if how.hard_weight:
                asks[f"{tag}hard"] = how.hard_weight, self.task.request(own)
            penalties |= {f"{tag}{name}": value for name, value in self.task.penalty(own).items()}
        terms = answer_means(asks, inputs.batch.num_queries)
        yield Update(frozenset({"student", "peer"}), terms | penalties)
