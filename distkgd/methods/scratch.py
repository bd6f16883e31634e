"""Direct training, without a teacher: the papers' "no-DS" and "DT", and the way teachers are made."""

from collections.abc import Iterator

from distkgd.distributed.rows import answer
from distkgd.losses import Travel, batch_mean
from distkgd.methods.base import Method, Update
from distkgd.scenes import Scene


class Scratch(Method):
    """Hard labels only."""

    name = "scratch"

    def updates(self, scene: Scene) -> Iterator[Update]:
        view = self.view(self.student, scene, grad=True)
        got = answer({"hard": self.hard_ask(view)})
        terms = {"hard": batch_mean(got["hard"], scene)} | self.penalty(view)
        yield Update(frozenset({"student"}), terms)

    def travel(self) -> Travel:
        return self.hard_travel()
