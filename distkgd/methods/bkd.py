"""BKD: the basic distillation baseline of Hinton and others (2015), as DualDE sec. 4.1.3 uses it.

Differs from the paper: DualDE only says "minimizing the KL divergence of the triple score distributions"; ours is
T^2 KL(teacher || student) of each query's softmax over the batch's candidates and its answer, added to the hard loss.
`divergence` puts KL(student || teacher) or the Jensen-Shannon divergence in its place.

`labels` reads the teacher's distribution from files, where the entities that it does not name are one outcome
(`distkgd.methods.losses.cached`).

Differs from the authors' code: none was released; IterDE's repository takes the softmax over a batch's triples.
"""

from collections.abc import Iterator
from typing import Literal

from distkgd.config.fields import Rate, Weight
from distkgd.config.stage import StageOptions
from distkgd.data import Graph
from distkgd.data.soft_labels import SoftLabels
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.methods.base import Method, MethodSettings, Update
from distkgd.methods.losses.cached import cached_divergence
from distkgd.methods.losses.scores import DIVERGENCES


class BkdConfig(MethodSettings):
    """Score-distribution distillation: hard_weight * hard loss + weight * T^2 divergence of the softmaxes.

    weight: factor on the soft loss. hard_weight: on the hard loss. temperature: T.
    divergence: kl is KL(teacher || student), which makes the student cover all that the teacher deems likely;
        reverse_kl is KL(student || teacher), which makes it keep to that; js is the Jensen-Shannon divergence, between
        the two and bounded by log 2, for a second pass over the candidates. An ablation changes this one word; mind
        that the gradients differ in size, so `weight` wants to be tuned with it.
    labels: folder of soft labels (`distkgd export --labels`, or written by any program: `distkgd.data.soft_labels`), in
        place of a teacher.
    """

    weight: Weight = 1.0
    hard_weight: Weight = 1.0
    temperature: Rate = 1.0
    divergence: Literal["kl", "reverse_kl", "js"] = "kl"
    labels: str | None = None

    @property
    def cached(self) -> bool:
        return self.labels is not None

    def check(self, stage: StageOptions) -> None:
        if self.labels is not None and (self.divergence != "kl" or stage.negatives.kind not in ("all", "batch")):
            given = f"divergence: {self.divergence}, negatives.kind: {stage.negatives.kind}"
            raise ValueError(f"labels are for divergence: kl and negatives.kind: all or batch, not {given}")

    def check_graph(self, graph: Graph) -> None:
        if self.labels is not None:
            SoftLabels(self.labels).check(graph, self.temperature)


class Bkd(Method[BkdConfig]):
    """hard_weight * hard loss + weight * T^2 divergence(teacher, student); the teacher is frozen."""

    name = "bkd"
    Settings = BkdConfig

    def prepare(self) -> None:
        labels = self.settings.labels
        self.labels = None if labels is None else SoftLabels(labels)

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        how = self.settings
        view = self.task.view(self.student, inputs, grad=True)
        if self.labels is not None:
            soft = cached_divergence(view, self.labels, how.temperature)
        else:
            teacher = self.task.view(self.teachers[0], inputs, grad=False)
            soft = DIVERGENCES[how.divergence](view, teacher, how.temperature)
        # The hard loss joins the last pass, so that js costs one pass more and not two.
        asks = {"soft": (how.weight, soft)}
        if how.hard_weight:
            asks["hard"] = how.hard_weight, self.task.request(view)
        terms = answer_means(asks, inputs.batch.num_queries)
        yield Update(frozenset({"student"}), terms | self.task.penalty(view))
