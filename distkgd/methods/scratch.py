"""Direct training, without a teacher: the papers' "no-DS" and "DT", and the way teachers are made."""

from collections.abc import Iterator

from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.methods.base import Method, MethodSettings, Update


class Scratch(Method[MethodSettings]):
    """Hard labels only."""

    name = "scratch"
    num_teachers = range(1)

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        view = self.task.view(self.student, inputs, grad=True)
        terms = answer_means({"hard": (1.0, self.task.request(view))}, inputs.batch.num_queries)
        yield Update(frozenset({"student"}), terms | self.task.penalty(view))
