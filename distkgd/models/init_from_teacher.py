"""Where a student's rows begin: at random, or from its first teacher's, cropped or along their principal axes.

`crop` takes the first columns. They score like the teacher only as far as the teacher happens to keep the most in
them: nothing orders the columns of a model that was not trained to be cropped.

`pca` turns the entities onto the axes along which they differ most. A turn B [D, dim] must be one that the formula
follows, with rows e -> (e - m) B:
- TransE: h + r - t -> (h + r - t) B with r -> r B; the mean m cancels out. An L2 distance loses only what lies outside
  the axes; an L1 distance also changes with the turn.
- RESCAL: h R t -> (h B) (B' R B) (t B)', about 0 instead of the mean.
Formulas that go coordinate by coordinate (DistMult, ComplEx, SimplE, CP, RotatE, PairRE) would need the same relation
to mix coordinates, which it cannot: refused.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distkgd.distributed.tables import ShardedTable
from distkgd.errors import ConfigError, UnsupportedError
from distkgd.models.model import Model
from distkgd.scorers import Scorer

TURNED = {"transe": "mean", "rescal": "zero"}  # scorers that a turn of the entities suits, and what it goes around
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Shape:
    """What of a model its tables' columns depend on."""

    scorer: Scorer
    reciprocal: bool


def check_start(start: Literal["crop", "pca"], student: Shape, teacher: Shape, num_entities: int) -> None:
    """ConfigError or UnsupportedError unless a student of that shape can begin from such a teacher's rows."""
    if student.scorer.name != teacher.scorer.name:
        raise ConfigError(
            f"{start} needs a teacher of the same scorer; the student has {student.scorer.name}, the teacher "
            f"{teacher.scorer.name}. Use start: random."
        )
    if student.reciprocal != teacher.reciprocal:
        raise ConfigError(f"{start} needs a teacher with reciprocal: {str(student.reciprocal).lower()}, too.")
    teacher.scorer.crop(student.scorer.dim)
    if start == "pca" and student.scorer.name not in TURNED:
        raise UnsupportedError(
            f"pca mixes coordinates, which {student.scorer.name} keeps apart; it works for "
            f"{' and '.join(TURNED)}. Use start: crop or random."
        )
    if start == "pca" and num_entities <= student.scorer.dim:
        raise ConfigError(f"pca: {num_entities} entities do not have {student.scorer.dim} axes; choose another start.")


@torch.no_grad()
def init_from_teacher(student: Model, teacher: Model, start: Literal["random", "crop", "pca"]) -> None:
    """Put the student's first rows in place of its random ones; all ranks call it."""
    if start == "random":
        return
    shapes = [Shape(model.scorer, model.reciprocal) for model in (student, teacher)]
    check_start(start, shapes[0], shapes[1], teacher.entity.total)
    dim = student.scorer.dim
    if start == "crop":
        student.entity.weight.copy_(teacher.entity.weight[:, : student.scorer.entity_size])
        columns = teacher.scorer.crop_columns(dim).to(teacher.relation.device)
        student.relation.copy_(teacher.relation[:, columns])
        return
    center, axes = principal_axes(teacher.entity, dim, TURNED[teacher.scorer.name] == "mean")
    rows = teacher.entity.weight
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[at : at + _ROWS_AT_ONCE].double()
        student.entity.weight[at : at + len(block)].copy_((block - center) @ axes)
    student.relation.copy_(_turned(teacher, axes))


def principal_axes(table: ShardedTable, dim: int, centered: bool) -> tuple[Tensor, Tensor]:
    """(center [D], axes [D, dim]) float64 of a table's rows, the same on every rank.

    The axes are the `dim` leading eigenvectors of the covariance (about 0 if not centered), largest first, each with
    the sign that makes its largest coordinate positive.
    """
    ranks, width = table.ranks, table.weight.shape[1]
    blocks = table.weight.split(_ROWS_AT_ONCE)
    center = torch.zeros(width, dtype=torch.float64, device=table.weight.device)
    if centered:
        for block in blocks:
            center += block.double().sum(0)
        center = ranks.all_reduce(center) / table.total
    moments = torch.zeros(width, width, dtype=torch.float64, device=center.device)
    for block in blocks:
        apart = block.double() - center
        moments += apart.T @ apart
    moments = ranks.all_reduce(moments) / table.total
    axes = torch.zeros(width, dim, dtype=torch.float64, device=center.device)
    if ranks.first:  # one rank decides: another library or processor may turn or order equal axes differently
        axes = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :dim].contiguous()
        axes *= axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return center, ranks.all_reduce(axes)


def _turned(teacher: Model, axes: Tensor) -> Tensor:
    # [R, student's relation_size] float64.
    relation = teacher.relation.double()
    if teacher.scorer.name == "transe":
        return relation @ axes
    width, dim = axes.shape
    return (axes.T @ relation.reshape(-1, width, width) @ axes).reshape(-1, dim * dim)
