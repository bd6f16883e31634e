"""What every node of a configuration is made of: the frozen base class and the kinds of numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def no_flag(value: Any) -> Any:
    # YAML's true and false would pass for 1 and 0.
    if isinstance(value, bool):
        raise ValueError(f"a number is needed (given: {value})")
    return value


LARGEST = 2**31 - 1
Positive = Annotated[int, BeforeValidator(no_flag), Field(ge=1, le=LARGEST)]
Count = Annotated[int, BeforeValidator(no_flag), Field(ge=0, le=LARGEST)]
Share = Annotated[float, BeforeValidator(no_flag), Field(ge=0, lt=1)]
Factor = Annotated[float, BeforeValidator(no_flag), Field(gt=0, lt=1)]
Weight = Annotated[float, BeforeValidator(no_flag), Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(no_flag), Field(gt=0, allow_inf_nan=False)]
Real = Annotated[float, BeforeValidator(no_flag)]


class Frozen(BaseModel):
    """Base of all config nodes: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
