"""`distkgd configs`: the configs that come with the package, listed or copied, and their JSON schema."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from distkgd.commands.cli import imports, terminal


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
            from distkgd.commands.config_schema import json_schema
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
