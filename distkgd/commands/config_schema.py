"""The JSON schema of configs, by which editors complete and check them."""

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from distkgd import methods, scorers
from distkgd.methods import METHODS
from distkgd.scorers import SCORERS

# Where a validator stands before a limit, pydantic writes the limit under its own name.
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema(root: type[BaseModel]) -> dict[str, Any]:
    """Of plans (RunConfig) or sweeps (SweepConfig): keys, types, limits, defaults, and what each key means."""
    settings = {name: method.Settings for name, method in METHODS.items()}
    refs, schema = models_json_schema([(kind, "validation") for kind in (root, *settings.values())])
    stage = schema["$defs"].get("StageConfig")
    if stage is not None:
        stage["properties"]["method"] |= _named(METHODS, methods.GROUP)
        stage["properties"]["scorer"] |= _named(SCORERS, scorers.GROUP)
        stage["allOf"] = [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": {"distill": {"anyOf": [refs[kind, "validation"], {"type": "null"}]}}},
            }
            for name, kind in settings.items()
        ]
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **refs[root, "validation"], **schema}
    found: dict[str, Any] = _standard(whole)
    return found


def _named(table: Iterable[str], group: str) -> dict[str, Any]:
    installed = sorted(point.name for point in entry_points(group=group))
    return {"anyOf": [{"enum": [*table, *installed]}, {"pattern": "^[\\w.]+:\\w+$"}]}


def _standard(node: Any) -> Any:
    if isinstance(node, list):
        return [_standard(one) for one in node]
    if not isinstance(node, dict):
        return node
    limits = {key for key in node if key in LIMITS and isinstance(node[key], int | float)}
    return {LIMITS[key] if key in limits else key: _standard(value) for key, value in node.items()}
