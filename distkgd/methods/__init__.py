"""The training methods, by the name configs use."""

from collections.abc import Mapping

from distkgd.config import BkdConfig, DualdeConfig, StageConfig
from distkgd.errors import ConfigError
from distkgd.methods.base import HardSettings, Method, Update
from distkgd.methods.bkd import Bkd
from distkgd.methods.dualde import DualDE
from distkgd.methods.scratch import Scratch
from distkgd.model import Model

__all__ = ["METHODS", "Bkd", "DualDE", "HardSettings", "Method", "Scratch", "Update", "build_method"]

METHODS: Mapping[str, type[Method]] = {"scratch": Scratch, "bkd": Bkd, "dualde": DualDE}


def build_method(stage: StageConfig, student: Model, teachers: list[Model]) -> Method:
    """The method a stage's config describes."""
    hard = HardSettings(
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
    if len(teachers) != (stage.method != "scratch"):
        raise ConfigError(f"method {stage.method} got {len(teachers)} teachers; scratch takes none, the others one.")
    options = stage.distill
    if isinstance(options, BkdConfig):
        return Bkd(student, hard, teachers[0], **options.model_dump())
    if isinstance(options, DualdeConfig):
        two = options.stage_two
        plan = None
        if two is not None:
            plan = (None if two.start == "plateau" else two.start, two.epochs, two.lr_scale, two.teacher_lr_scale)
        return DualDE(student, hard, teachers[0], **options.model_dump(exclude={"stage_two"}), stage_two=plan)
    return Scratch(student, hard)
