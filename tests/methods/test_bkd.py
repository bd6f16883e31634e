"""The basic distillation baseline against its formula."""

from typing import Any

import pytest
import torch

from distkgd.config import BkdConfig
from distkgd.distributed.ranks import Ranks
from distkgd.job import Progress
from distkgd.methods import Bkd, HardSettings
from distkgd.train import train_step
from tests.jobs import NaiveModel, assert_same_gradients, spelled_out, toy_model, toy_scenes
from tests.toys import toy_graph, toy_job

GRAPH = toy_graph(entities=15, relations=3, triples=130)
STEP = 1


def settings(**more: Any) -> HardSettings:
    plain = dict(loss="softmax", temperature=1.0, margin=1.0, label_smoothing=0.0, regulariser="none", weight=0.0)
    plain |= dict(relation_weight=None, dropout=0.0, relation_dropout=0.0, bf16=False)
    return HardSettings(**(plain | more))


@pytest.mark.parametrize("kind", ["all", "batch", "chunk", "triple"])
@pytest.mark.parametrize(("weight", "hard_weight", "temperature"), [(1.0, 1.0, 1.0), (0.7, 0.3, 3.0), (2.0, 0.0, 0.5)])
def test_the_student_learns_the_teachers_softened_distribution_beside_the_labels(
    kind: str, weight: float, hard_weight: float, temperature: float
) -> None:
    student, teacher = toy_model(GRAPH, "transe", 5, reciprocal=False, margin=3.0), toy_model(GRAPH, seed=6)
    naive, naive_teacher = NaiveModel(student), NaiveModel(teacher)
    scenes = toy_scenes(GRAPH, kind=kind, filtered=True)
    options = {"weight": weight, "hard_weight": hard_weight, "temperature": temperature}
    method = Bkd(student, settings(), teacher, **options)
    (update,) = method.updates(scenes.scene(*scenes.parts(STEP, 1)))
    soft, hard = [], []
    for query in spelled_out(scenes, STEP):
        everyone = [query.answer, *query.negatives]
        z, theirs = naive.scores(query, everyone), naive_teacher.scores(query, everyone)
        p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (theirs, z))
        soft.append(weight * temperature**2 * sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True)))
        hard.append(hard_weight * (torch.log(torch.exp(z).sum()) - z[0]))
    expected = {"soft": torch.stack(soft).mean()} | ({"hard": torch.stack(hard).mean()} if hard_weight else {})
    assert update.groups == {"student"} and update.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(update.terms[name], value)
    sum(update.terms.values()).backward()
    sum(expected.values()).backward()
    assert_same_gradients(student, naive)
    assert teacher.entity.opened == [] and teacher.relation.grad is None


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it() -> None:
    model = toy_model(GRAPH)
    scenes = toy_scenes(GRAPH, kind="all")
    method = Bkd(model, settings(), model, weight=1.0, hard_weight=0.0, temperature=2.0)
    (update,) = method.updates(scenes.scene(*scenes.parts(STEP, 1)))
    assert abs(float(update.terms["soft"].detach())) < 1e-12


def test_the_teacher_rests_bit_for_bit_while_the_student_learns(tmp_path: Any) -> None:
    student = {"dim": 6, "batch_size": 16, "method": "bkd", "negatives": {"kind": "all"}}
    job = toy_job({"student": student}, Ranks(), tmp_path, GRAPH)
    method = job.method
    assert isinstance(method, Bkd) and set(method.trained) == {"student"}
    tables = [method.teacher.entity.weight, method.teacher.relation, method.student.entity.weight]
    before = [x.detach().clone() for x in tables]
    losses = [train_step(job, Progress(step=step), 0)[0]["soft"] for step in range(30)]
    same = [torch.equal(a, b) for a, b in zip(before, tables, strict=True)]
    assert same == [True, True, False]
    assert sum(losses[-5:]) < sum(losses[:5])


OTHER_OPTIONS = {"weight": 0.5, "hard_weight": 0.5, "temperature": 2.0}


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_every_option_changes_what_is_trained(option: str, tmp_path: Any) -> None:
    rows = []
    for distill in ({}, {option: OTHER_OPTIONS[option]}):
        student = {"dim": 6, "batch_size": 16, "method": "bkd", "distill": distill}
        job = toy_job({"student": student}, Ranks(), tmp_path, GRAPH)
        train_step(job, Progress(), 0)
        rows.append(job.method.student.relation.detach().clone())
        train_step(job, Progress(step=1), 0)
        rows[-1] = job.method.student.entity.weight.clone()
    assert not torch.equal(*rows)


def test_every_option_is_in_this_test() -> None:
    assert OTHER_OPTIONS.keys() == BkdConfig.model_fields.keys()
