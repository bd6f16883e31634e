"""`distkgd configs`: the configs that come with the package, listed or copied, and their JSON schema."""

import json
import shutil
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distkgd.commands.cli import imports, terminal

if TYPE_CHECKING:
    from pydantic import BaseModel

# Where a validator stands before a limit, pydantic writes the limit under its own name.
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Configs, or folders of them; default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Copy them into this folder, under their names.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of configs, for editors.")] = False,
    sweep_schema: Annotated[bool, typer.Option("--sweep-schema", help="The same of sweeps.")] = False,
) -> None:
    """List the configs that come with distkgd, or copy them, to be changed.

    Examples:

      distkgd configs
      distkgd configs umls wn18rr/dualde_complex --out configs
      distkgd configs --schema > distkgd.schema.json
    """
    if schema or sweep_schema:
        with imports():
            from distkgd.pipeline.config import RunConfig
            from distkgd.pipeline.sweep.config import SweepConfig
        typer.echo(json.dumps(json_schema(RunConfig if schema else SweepConfig), indent=2))
        return
    with imports():
        from distkgd.common.paths import check_folder
        from distkgd.config.shipped import about, folder, shipped
        from distkgd.errors import ConfigError
    chosen: dict[str, Path] = {}
    for name in names or [""]:
        asked = name.removeprefix("configs/").removesuffix(".yaml").rstrip("/")
        found = {one: path for one, path in shipped().items() if not asked or f"{one}/".startswith(f"{asked}/")}
        if not found:
            raise ConfigError(f"No config comes with distkgd that is called {name!r}; distkgd configs lists them.")
        chosen |= found
    if out is None:
        width = max(map(len, chosen))
        typer.echo("\n".join(f"{name:{width}}  {about(path)}".rstrip() for name, path in chosen.items()))
        return
    places = {path: out / path.relative_to(folder()) for path in chosen.values()}
    if there := [place for place in places.values() if place.exists()]:
        raise ConfigError(f"{there[0]} exists; choose another --out, or remove it.")
    check_folder(out)
    for path, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        terminal().line(f"written: {place}")


def json_schema(root: "type[BaseModel]") -> dict[str, Any]:
    """Of plans (RunConfig) or sweeps (SweepConfig): keys, types, limits, defaults, and what each key means."""
    from pydantic.json_schema import models_json_schema

    from distkgd import methods, scorers
    from distkgd.methods import METHODS
    from distkgd.scorers import SCORERS

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
