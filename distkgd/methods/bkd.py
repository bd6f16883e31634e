"""BKD: the basic distillation baseline (Hinton et al. 2015, as used by DualDE sec. 4.1.3).

Differs from the paper: DualDE only says "minimizing the KL divergence of the triple score distributions"; ours is
T^2 KL(teacher || student) of each query's softmax over the batch's candidates and its answer, added to the hard loss.
`divergence` puts KL(student || teacher) or the Jensen-Shannon divergence in its place.

Differs from the authors' code: none was released; IterDE's repository takes the softmax over a batch's triples.
"""

from collections.abc import Iterator

from distkgd.distributed.query_blocks import answer_means
from distkgd.losses import Travel, divergence, divergence_travel
from distkgd.methods.base import HardSettings, Method, Update
from distkgd.model import Model
from distkgd.scenes import Scene


class Bkd(Method):
    """hard_weight * hard loss + weight * T^2 divergence(teacher, student); the teacher is frozen."""

    name = "bkd"

    def __init__(
        self,
        student: Model,
        hard: HardSettings,
        teacher: Model,
        *,
        weight: float,
        hard_weight: float,
        temperature: float,
        divergence: str,
    ) -> None:
        super().__init__(student, hard)
        self.teacher = teacher
        self.weight = weight
        self.hard_weight = hard_weight
        self.temperature = temperature
        self.divergence = divergence

    def updates(self, scene: Scene) -> Iterator[Update]:
        view = self.view(self.student, scene, grad=True)
        teacher = self.view(self.teacher, scene, grad=False)
        # The hard loss joins the last pass, so that js costs one pass more and not two.
        asks = {"soft": divergence(self.divergence, view, teacher, self.temperature)}
        if self.hard_weight:
            asks["hard"] = self.hard_ask(view)
        weights = {"soft": self.weight, "hard": self.hard_weight}
        terms = answer_means(asks, weights, scene.batch.num_queries)
        yield Update(frozenset({"student"}), terms | self.penalty(view))

    def travel(self) -> Travel:
        return divergence_travel(self.divergence) + (self.hard_travel() if self.hard_weight else Travel())

    def speakers(self) -> list[tuple[Model, bool]]:
        return [(self.student, True), (self.teacher, False)]
