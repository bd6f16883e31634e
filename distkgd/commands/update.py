"""`distkgd update`: a finished model trained on a newer state of its graph."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from distkgd.commands.cli import imports, terminal

OldRows = Literal["anchored", "frozen", "free"]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished run, of a stage, or of a model.")],
    data: Annotated[str, typer.Option(help="The newer state: a folder of splits, or a public set.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="What goes over the config of the update.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each stage; default a sixth of its own.")] = None,
    old_rows: Annotated[OldRows, typer.Option(help="Those of old entities and relations.")] = "anchored",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>_updated.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the update in the run folder.")] = False,
) -> None:
    """Train a finished model on a newer graph: old entities matched by name, new ones placed and trained.

    A teacher of the same run is updated first, and teaches the model again. The report tells old entities from new.

    Examples:

      distkgd update runs/mine --data newer_folder
      distkgd update runs/mine/stages/teacher --data newer_folder --epochs 5 student.anchor=0.5
    """
    with imports():
        from distkgd.errors import ConfigError
        from distkgd.pipeline.autoconfig.update import update
        from distkgd.reporting.report import show
    if broken := [one for one in overrides or [] if "=" not in one]:
        raise ConfigError(f"{broken[0]!r} is no override; these look like student.epochs=5.")
    run = update(model, data, overrides or [], epochs=epochs, old_rows=old_rows, out=out, resume=resume, show=True)
    show(run.report, run.folder, terminal())
