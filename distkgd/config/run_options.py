"""The parts of a run's config beside its stages: engine, MLflow, report."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distkgd.config.fields import Count, Frozen, Rate, no_flag
from distkgd.config.stage import FewBits


class MlflowConfig(Frozen):
    """Tracking by MLflow, where it is installed.

    enabled: off leaves it alone. uri: of its store; null: MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the
        working directory.
    registry: put teacher, student and direct model into the model registry when the plan is done
        (`distkgd.tracking.serving.registry`). registered_as: under this name; default: the run's.
    champion_max_mb: the alias `champion` is the version of the best valid MRR whose tables have at most so many million
        bytes; default: the best one that is no teacher.
    """

    enabled: bool = True
    uri: str | None = None
    registry: bool = True
    registered_as: str | None = Field(default=None, pattern=r"^[\w.\- ]*[\w.\-][\w.\- ]*$")
    champion_max_mb: Rate | None = None


class ReportConfig(Frozen):
    """What a finished run leaves beside report.json and report.md.

    html: report.html, its first chart alone as frontier.html, and in examples.json what it shows of the models'
    answers. queries: of the last split ranked, so many are asked of teacher and student for it; of large tables fewer
    (`distkgd.reporting.html.ask`), 0: none.
    rounded: bits that a teacher of full precision is also rounded to and ranked with, without training, when this run
        has trained it; relations and groups as a student of few bits has them, else relations of twice the bits. Zeros
        of a pruned teacher are rounded like other numbers here; distkgd export --bits keeps them.
    """

    html: bool = True
    queries: Count = 200
    rounded: list[FewBits] = Field(default=[])


class EngineConfig(Frozen):
    """What trains the small replicated tensors (relations, evaluators); entity rows are always our own shards.

    name: ddp (one all-reduce, the same step on every rank) or deepspeed. zero: DeepSpeed's ZeRO stage.
    """

    name: Literal["ddp", "deepspeed"] = "ddp"
    zero: Annotated[int, BeforeValidator(no_flag), Field(ge=0, le=3)] = 0

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _zero_is_deepspeeds(self) -> "EngineConfig":
        if self.zero and self.name != "deepspeed":
            raise ValueError(f"zero: {self.zero} is a stage of DeepSpeed; use name: deepspeed, or drop zero")
        return self
