"""`distkgd register`: the models of a finished run in MLflow's registry, from where they are served."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distkgd.commands.cli import imports, launch

if TYPE_CHECKING:
    from distkgd.common.console import Display
    from distkgd.distributed.ranks import Ranks

SERVE = "MLFLOW_TRACKING_URI={} mlflow models serve -m 'models:/{}@champion' --env-manager local"


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of a finished stage, or of a model.")],
    name: Annotated[str | None, typer.Option(help="Of the registered model; default: the run's name.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow's store; default: the run's, else as in training.")] = None,
    champion_max_mb: Annotated[float | None, typer.Option(min=0.0, help="Budget of `champion`, MB of tables.")] = None,
    known: Annotated[bool, typer.Option("--known", help="Known triples go along, for exclude_known.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure their endpoints, for the report.")] = False,
) -> None:
    """Put the models of a finished run into MLflow's registry, with aliases, and say how to serve the champion.

    Examples:

      distkgd register runs/demo --name stdlib --champion-max-mb 20
      mlflow models serve -m models:/stdlib@champion --env-manager local
    """
    with imports():
        from distkgd.common.text import redact
        from distkgd.distributed.ownership import refuse_owned
        from distkgd.errors import UnsupportedError
        from distkgd.reporting.html import keep_measured
        from distkgd.reporting.report import served
        from distkgd.tracking.mlflow_runs import register_finished
        from distkgd.tracking.serving.entries import entries_at
        from distkgd.tracking.serving.speed import measure

    def body(ranks: "Ranks", display: "Display") -> None:
        if ranks.world > 1:
            raise UnsupportedError(f"models are registered by one process, not by {ranks.world}; leave out torchrun.")
        entries, finished = entries_at(run)
        entries = [replace(entry, known=known) for entry in entries]
        called, folder = name or finished.name, finished.folder
        limit = finished.champion_limit(champion_max_mb)
        found, store = register_finished(entries, called, limit, run_folder=folder, uri=uri)
        for line in [*found.lines, *finished.better_direct(entries), SERVE.format(redact(store), called)]:
            display.line(line)
        if speed:
            refuse_owned(folder)  # before minutes of measuring
            measured = measure(entries, [f"models:/{called}/{version}" for version in found.versions], store)
            display.line("\n".join(served(measured)))
            for note in keep_measured(folder, measured):
                display.warn(note)

    launch(body, device="cpu")
