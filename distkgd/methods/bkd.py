"""BKD: the basic distillation baseline (Hinton et al. 2015, as used by DualDE sec. 4.1.3).

Differs from the paper: DualDE only says "minimizing the KL divergence of the triple score distributions"; ours is
T^2 KL(teacher || student) of each query's softmax over the batch's candidates and its answer, added to the hard loss.

Differs from the authors' code: none was released; IterDE's repository takes the softmax over a batch's triples.
"""

from collections.abc import Iterator

from distkgd.distributed.rows import answer
from distkgd.losses import KL_TRAVEL, Travel, batch_mean, kl_divergence
from distkgd.methods.base import HardSettings, Method, Update
from distkgd.model import Model
from distkgd.scenes import Scene


class Bkd(Method):
    """hard_weight * hard loss + weight * T^2 KL(teacher || student); the teacher is frozen."""

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
    ) -> None:
        super().__init__(student, hard)
        self.teacher = teacher
        self.weight = weight
        self.hard_weight = hard_weight
        self.temperature = temperature

    def updates(self, scene: Scene) -> Iterator[Update]:
        view = self.view(self.student, scene, grad=True)
        teacher = self.view(self.teacher, scene, grad=False)
        asks = {"soft": kl_divergence(view, teacher, self.temperature)}
        if self.hard_weight:
            asks["hard"] = self.hard_ask(view)
        got = answer(asks)
        weights = {"soft": self.weight, "hard": self.hard_weight}
        terms = {name: weights[name] * batch_mean(loss, scene) for name, loss in got.items()}
        yield Update(frozenset({"student"}), terms | self.penalty(view))

    def travel(self) -> Travel:
        return KL_TRAVEL + (self.hard_travel() if self.hard_weight else Travel())

    def speakers(self) -> list[tuple[Model, bool]]:
        return [(self.student, True), (self.teacher, False)]
