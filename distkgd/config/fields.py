"""What every node of a configuration is made of: the frozen base class and the kinds of numbers."""

import inspect
import re
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


def meanings(kind: type[BaseModel]) -> dict[str, str]:
    """key -> what its class's docstring says of it; under "" what comes before the first key."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    name = "|".join(kind.model_fields)
    starts = list(re.finditer(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", text))
    found = {"": text[: starts[0].start()] if starts else text}
    for i, start in enumerate(starts):
        end = starts[i + 1].start() if i + 1 < len(starts) else len(text)
        found |= dict.fromkeys(start[1].split(", "), text[start.end() : end].strip().rstrip(".;"))
    return found


def describe(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Put what the class says of itself and its keys into its JSON schema."""
    said = meanings(kind)
    schema["description"] = said[""].strip()
    if any(one.info.mode == "before" for one in kind.__pydantic_decorators__.model_validators.values()):
        schema.pop("type", None)  # there is a short form that is no mapping
    for key, of_key in schema.get("properties", {}).items():
        of_key.pop("title", None)
        if key in said:
            of_key["description"] = said[key]


class Frozen(BaseModel):
    """Base of all config nodes: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=describe)
