"""The training methods, by the name configs use."""

from collections.abc import Mapping, Sequence
from typing import Any

from distkgd.config.stage import StageOptions
from distkgd.errors import ConfigError
from distkgd.methods.base import FurtherInputs, Method, NoSettings, Setup, TaskLossConfig, Update
from distkgd.methods.bkd import Bkd
from distkgd.methods.dml import Dml
from distkgd.methods.dualde import DualDE
from distkgd.methods.iterde import IterDE
from distkgd.methods.med import Med
from distkgd.methods.metasd import MetaSD
from distkgd.methods.mulde import MulDE
from distkgd.methods.rkd import Rkd
from distkgd.methods.scratch import Scratch
from distkgd.models.model import Model

__all__ = ["METHODS", "FurtherInputs", "Method", "NoSettings", "Setup", "TaskLossConfig", "Update", "build_method"]

METHODS: Mapping[str, type[Method[Any]]] = {
    "scratch": Scratch,
    "bkd": Bkd,
    "dualde": DualDE,
    "iterde": IterDE,
    "rkd": Rkd,
    "dml": Dml,
    "mulde": MulDE,
    "med": Med,
    "metasd": MetaSD,
}


def build_method(
    stage: StageOptions, student: Model, teachers: Sequence[Model], setup: Setup | None = None
) -> Method[Any]:
    """The method a stage's config describes."""
    hard = TaskLossConfig(
        loss=stage.loss.name,
        temperature=stage.loss.temperature,
        margin=stage.loss.margin,
        label_smoothing=stage.loss.label_smoothing,
        regulariser=stage.regulariser.name,
        weight=stage.regulariser.weight,
        relation_weight=stage.regulariser.relation_weight,
        dropout=stage.dropout,
        relation_dropout=stage.relation_dropout,
        bf16=stage.bf16,
    )
    kind = METHODS[stage.method]
    check_teachers(stage.method, len(teachers))
    return kind(student, hard, teachers, stage.distill, setup)


def check_teachers(method: str, given: int) -> None:
    """ConfigError unless `method` can have that many teachers."""
    allowed = METHODS[method].num_teachers
    if given not in allowed:
        said = "no teacher" if allowed == range(1) else f"{allowed[0]} to {allowed[-1]} teachers"
        said = "one teacher" if allowed == range(1, 2) else said
        raise ConfigError(f"method {method} needs {said}, and got {given}.")
