"""A method of your own as a plug-in, beside a built-in one: no line of distkgd is touched."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import family

import distkgd
from distkgd.config.fields import Weight
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.loss_requests import reduce_over_candidates
from distkgd.methods.base import Method, MethodSettings, Update
from distkgd.methods.losses.scores import batch_mean


class MatchConfig(MethodSettings):
    weight: Weight = 0.1


class Match(Method[MatchConfig]):
    name, Settings = "match", MatchConfig  # the second is what `distill` holds in a stage's config

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        """Hard loss + weight * (f_student - f_teacher)^2 of the true triples."""
        student, teacher = (self.task.view(m, inputs, grad=m is self.student) for m in (self.student, self.teachers[0]))
        hard = reduce_over_candidates({"hard": self.task.request(student)})["hard"]
        gap = self.settings.weight * (student.positive - teacher.positive).square()
        yield Update(frozenset({"student"}), {"hard": batch_mean(hard, inputs), "match": batch_mean(gap, inputs)})


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="distkgd_"))
    plan = {**family.SMALL, "data": str(family.folder(place / "family", family.triples(63))), "baseline": False}
    teacher = distkgd.train(plan | {"student": family.SMALL["student"] | {"dim": 64}}, out=place / "teacher")
    for method in ("bkd", "own_method:Match"):  # module:Class, of any module that Python finds
        student = family.SMALL["student"] | {"method": method}
        taught = plan | {"teacher": str(teacher.folder / "stages/student"), "student": student}
        run = distkgd.train(taught, out=place / method.replace(":", "_"))
        print(run.table().select("stage", "method", "test_mrr"))
