"""Direct training, without a teacher: the papers' "no-DS" and "DT", and the way teachers are made."""

from collections.abc import Iterator

from distkgd.distributed.query_blocks import answer_means
from distkgd.losses import Travel
from distkgd.methods.base import Method, NoSettings, Update
from distkgd.scenes import Scene


class Scratch(Method[NoSettings]):
    """Hard labels only."""

    name = "scratch"
    num_teachers = range(1)

    def updates(self, scene: Scene) -> Iterator[Update]:
        view = self.view(self.student, scene, grad=True)
        terms = answer_means({"hard": self.hard_ask(view)}, {"hard": 1.0}, scene.batch.num_queries)
        yield Update(frozenset({"student"}), terms | self.penalty(view))

    def travel(self) -> Travel:
        return self.hard_travel()
