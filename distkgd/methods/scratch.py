"""Direct training, without a teacher: the papers' "no-DS" and "DT", and the way teachers are made."""

from collections.abc import Iterator

from distkgd.losses import batch_mean
from distkgd.methods.base import Method, Update
from distkgd.model import Scene


class Scratch(Method):
    """Hard labels only."""

    name = "scratch"

    def updates(self, scene: Scene) -> Iterator[Update]:
        view = self.view(self.student, scene, grad=True)
        terms = {"hard": batch_mean(self.hard_per_query(view), scene)} | self.penalty(view)
        yield Update(frozenset({"student"}), terms)
