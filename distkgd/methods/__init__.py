"""The training methods, by the name configs use."""

from collections.abc import Mapping, Sequence
from typing import Any

from distkgd.config.plugins import named_class
from distkgd.config.stage import StageOptions
from distkgd.errors import ConfigError
from distkgd.methods.base import Method, MethodSettings, ParameterGroup, Phase, Setup, Update
from distkgd.methods.bkd import Bkd
from distkgd.methods.dml import Dml
from distkgd.methods.dualde import DualDE
from distkgd.methods.iterde import IterDE
from distkgd.methods.losses.task import TaskLoss, task_loss_of
from distkgd.methods.med import Med
from distkgd.methods.metasd import MetaSD
from distkgd.methods.mulde import MulDE
from distkgd.methods.rkd import Rkd
from distkgd.methods.scratch import Scratch
from distkgd.models.model import Model

__all__ = [
    "METHODS",
    "Method",
    "MethodSettings",
    "ParameterGroup",
    "Phase",
    "Setup",
    "TaskLoss",
    "Update",
    "build_method",
    "method_class",
]

_ALL: Sequence[type[Method[Any]]] = (Scratch, Bkd, DualDE, IterDE, Rkd, Dml, MulDE, Med, MetaSD)
METHODS: Mapping[str, type[Method[Any]]] = {method.name: method for method in _ALL}
GROUP = "distkgd.methods"  # of entry points of other packages


def method_class(name: str) -> type[Method[Any]]:
    """The method that a config names: one of METHODS, `package.module:Class`, or an entry point; else ConfigError."""
    return named_class(name, METHODS, GROUP, Method)


def build_method(stage: StageOptions, student: Model, teachers: Sequence[Model], setup: Setup) -> Method[Any]:
    """The method a stage's config describes."""
    check_teachers(stage.method, len(teachers), stage.distill)
    return method_class(stage.method)(student, task_loss_of(stage), teachers, stage.distill, setup)


def check_teachers(method: str, given: int, settings: MethodSettings | None = None) -> None:
    """ConfigError unless `method`, with these settings, can have that many teachers."""
    cached = settings is not None and settings.cached
    allowed = range(1) if cached else method_class(method).num_teachers
    if given not in allowed:
        said = "no teacher" if allowed == range(1) else f"{allowed[0]} to {allowed[-1]} teachers"
        said = "one teacher" if allowed == range(1, 2) else said
        method += " with labels from files" if cached else ""
        raise ConfigError(f"method {method} needs {said}, and got {given}.")
