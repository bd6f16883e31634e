"""Where a student's rows begin: beside crops and principal axes worked out with NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError, UnsupportedError
from distkgd.models.init_from_teacher import TURNED, Shape, check_start, init_from_teacher, principal_axes
from distkgd.models.model import Model, new_model
from distkgd.scorers import SCORERS, build_scorer
from tests.ranks import run_on_ranks
from tests.toys import toy_job

ENTITIES, RELATIONS = 37, 4


def model(
    ranks: Ranks,
    scorer: str,
    dim: int,
    *,
    seed: int = 0,
    norm: int | None = None,
    row_dtype: Any = None,
    n: int = ENTITIES,
) -> Model:
    made = new_model(
        build_scorer(scorer, dim, norm=norm),
        n,
        RELATIONS,
        ranks,
        reciprocal=True,
        seed=seed,
        init_scale=0.5,
        dtype=torch.float64,
        row_dtype=row_dtype,
    )
    made.entity.weight.add_(0.3)  # principal axes about the mean and about zero differ
    return made


def begun(
    ranks: Ranks, scorer: str, start: Any, dim: int, teacher_dim: int = 8, norm: int | None = None
) -> tuple[Tensor, Tensor]:
    """A student's rows of this rank and its relations; for rank processes."""
    student = model(ranks, scorer, dim, seed=1, norm=norm)
    init_from_teacher(student, model(ranks, scorer, teacher_dim, norm=norm), start)
    return student.entity.weight, student.relation


def scores(made: Model, entity: Tensor) -> Tensor:
    """[n, RELATIONS, n]: of all triples of these rows."""
    return made.scorer.score(entity[:, None, None], made.relation[None, :RELATIONS, None], entity[None, None, :])


@pytest.mark.parametrize("dim", [4, 8])
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_cropped_student_scores_as_the_crop_of_its_teacher(scorer: str, dim: int) -> None:
    teacher, student = model(Ranks(), scorer, 8), model(Ranks(), scorer, dim, seed=1)
    before = teacher.entity.weight.clone(), teacher.relation.clone()
    init_from_teacher(student, teacher, "crop")
    rows, columns = before[0][:, : student.scorer.entity_size], teacher.scorer.crop_columns(dim)
    assert torch.equal(student.entity.weight, rows)
    expected = teacher.scorer.crop(dim).score(rows[:5], before[1][:1, columns], rows[5:10])
    found = student.scorer.score(student.entity.weight[:5], student.relation[:1], student.entity.weight[5:10])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(teacher.entity.weight, before[0]) and torch.equal(teacher.relation, before[1])
    # Rows of its own: what it learns is not the teacher's.
    student.entity.weight.zero_()
    student.relation.zero_()
    assert torch.equal(teacher.entity.weight, before[0]) and torch.equal(teacher.relation, before[1])


@pytest.mark.parametrize("dim", [1, 3, 5])
@pytest.mark.parametrize("scorer", TURNED)
def test_pca_is_what_numpys_singular_vectors_give(scorer: str, dim: int) -> None:
    teacher, student = model(Ranks(), scorer, 8), model(Ranks(), scorer, dim, seed=1)
    init_from_teacher(student, teacher, "pca")
    rows, relation = teacher.entity.weight.numpy(), teacher.relation.numpy()
    center = rows.mean(0) if scorer == "transe" else np.zeros(8)
    axes = np.linalg.svd(rows - center, full_matrices=False)[2][:dim].T
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(dim)])
    np.testing.assert_allclose(student.entity.weight.numpy(), (rows - center) @ axes, atol=1e-10)
    if scorer == "transe":
        expected = relation @ axes
    else:
        expected = np.stack([(axes.T @ r.reshape(8, 8) @ axes).reshape(-1) for r in relation])
    np.testing.assert_allclose(student.relation.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("scorer", "norm"), [("transe", 2), ("rescal", None)])
def test_pca_that_leaves_no_axis_out_scores_like_the_teacher(scorer: str, norm: int | None) -> None:
    """A turn keeps Euclidean distances and bilinear forms."""
    teacher, student = model(Ranks(), scorer, 8, norm=norm), model(Ranks(), scorer, 8, seed=1, norm=norm)
    init_from_teacher(student, teacher, "pca")
    torch.testing.assert_close(scores(student, student.entity.weight), scores(teacher, teacher.entity.weight))


def test_pca_keeps_more_of_the_distances_than_a_crop() -> None:
    teacher = model(Ranks(), "transe", 8, norm=2)
    teacher.entity.weight[:, 6:] *= 10.0  # what differs most is in the last columns
    whole, lost = scores(teacher, teacher.entity.weight), {}
    for start in ("crop", "pca"):
        student = model(Ranks(), "transe", 2, seed=1, norm=2)
        init_from_teacher(student, teacher, start)
        lost[start] = float((scores(student, student.entity.weight) - whole).abs().mean())
    assert lost["pca"] < 0.6 * lost["crop"]


@pytest.mark.parametrize(
    ("scorer", "start"), [("complex", "crop"), ("rescal", "crop"), ("transe", "pca"), ("rescal", "pca")]
)
def test_any_number_of_ranks_begins_with_the_same_rows(scorer: str, start: str) -> None:
    arguments = {"scorer": scorer, "start": start, "dim": 4}
    ((rows, relation),) = run_on_ranks(1, begun, **arguments)
    for world in (2, 3):
        parts = run_on_ranks(world, begun, **arguments)
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), rows, rtol=0, atol=1e-10)
        for part in parts:
            torch.testing.assert_close(part[1], relation, rtol=0, atol=1e-10)
            assert torch.equal(part[1], parts[0][1])


def test_tables_of_several_blocks_have_the_same_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = model(Ranks(), "transe", 8)
    center, axes = principal_axes(teacher.entity, 3, True)
    student = begun(Ranks(), "transe", "pca", 3)
    monkeypatch.setattr("distkgd.models.init_from_teacher._ROWS_AT_ONCE", 5)
    again = principal_axes(teacher.entity, 3, True)
    torch.testing.assert_close(again, (center, axes), rtol=0, atol=1e-12)
    torch.testing.assert_close(begun(Ranks(), "transe", "pca", 3), student, rtol=0, atol=1e-12)


def test_rows_in_bfloat16_begin_as_the_rounded_rows() -> None:
    for start in ("crop", "pca"):
        whole, half = (model(Ranks(), "transe", 4, seed=1, row_dtype=dtype) for dtype in (None, torch.bfloat16))
        teacher = model(Ranks(), "transe", 8)
        init_from_teacher(whole, teacher, start)
        init_from_teacher(half, teacher, start)
        assert torch.equal(half.entity.weight, whole.entity.weight.to(torch.bfloat16))


def test_a_random_start_leaves_the_student_as_it_is() -> None:
    student, fresh = (model(Ranks(), "complex", 4, seed=1) for _ in range(2))
    init_from_teacher(student, model(Ranks(), "distmult", 8), "random")
    assert torch.equal(student.entity.weight, fresh.entity.weight)


@pytest.mark.parametrize("start", ["crop", "pca"])
def test_a_job_begins_where_its_stage_says(start: str, tmp_path: Path) -> None:
    stage = {"scorer": "transe", "dim": 4, "method": "bkd", "batch_size": 50, "start": start}
    job = toy_job({"student": stage}, Ranks(), tmp_path)
    teacher = job.method.teachers[0]
    center, axes = principal_axes(teacher.entity, 4, True)
    rows = teacher.entity.weight
    expected = rows[:, :4] if start == "crop" else ((rows.double() - center) @ axes).float()
    torch.testing.assert_close(job.method.student.entity.weight, expected)


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", sorted(set(SCORERS) - set(TURNED)))
def test_pca_is_refused_where_coordinates_are_kept_apart(scorer: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{scorer} keeps apart.*transe and rescal.*start: crop or random"):
        init_from_teacher(model(Ranks(), scorer, 4), model(Ranks(), scorer, 8), "pca")


CASES: list[tuple[tuple[str, int, bool], tuple[str, int, bool], int, str]] = [
    (("transe", 4, True), ("rescal", 8, True), 50, "same scorer.*transe.*rescal"),
    (("transe", 4, True), ("transe", 8, False), 50, "reciprocal: true"),
    (("transe", 9, True), ("transe", 8, True), 50, "crop to dim=9; allowed is at most 8"),
    (("transe", 4, True), ("transe", 8, True), 4, "4 entities do not have 4 axes"),
]


@pytest.mark.parametrize(("student", "teacher", "entities", "message"), CASES, ids=[case[3][:12] for case in CASES])
def test_a_student_that_cannot_begin_from_its_teacher_is_refused(
    student: tuple[str, int, bool], teacher: tuple[str, int, bool], entities: int, message: str
) -> None:
    shapes = [Shape(build_scorer(name, dim), reciprocal) for name, dim, reciprocal in (student, teacher)]
    with pytest.raises(DistkgdError, match=message):
        check_start("pca", *shapes, entities)
    if "axes" in message:
        check_start("crop", *shapes, entities)
        return
    with pytest.raises(ConfigError, match=message):
        check_start("crop", *shapes, entities)
