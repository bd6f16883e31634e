"""Put the models of a finished run into MLflow's registry, from where `mlflow models serve` takes them.

python launch/register.py RUN [--name NAME] [--champion-max-mb 20] [--speed]
mlflow models serve -m models:/NAME@champion --env-manager local
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports take seconds, and Ctrl-C may come in them

import sys
from pathlib import Path
from typing import Annotated

import typer

from distkgd.cli import launch, run_main
from distkgd.common.console import Display
from distkgd.common.text import redact
from distkgd.distributed.ownership import refuse_owned
from distkgd.distributed.ranks import Ranks
from distkgd.errors import UnsupportedError
from distkgd.reporting.html import keep_measured
from distkgd.reporting.report import served
from distkgd.tracking.mlflow_runs import register_finished
from distkgd.tracking.serving.entries import entries_at
from distkgd.tracking.serving.speed import measure

SERVE = "MLFLOW_TRACKING_URI={} mlflow models serve -m 'models:/{}@champion' --env-manager local"


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of a finished stage, or of a model.")],
    name: Annotated[str | None, typer.Option(help="Of the registered model; default: the run's name.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow's store; default: the run's, else as in training.")] = None,
    champion_max_mb: Annotated[float | None, typer.Option(min=0.0, help="Budget of `champion`, MB of tables.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure their endpoints, for the report.")] = False,
) -> None:
    """Register the models, set their aliases, and say how to serve the champion."""

    def body(ranks: Ranks, display: Display) -> None:
        if ranks.world > 1:
            raise UnsupportedError(f"models are registered by one process, not by {ranks.world}; leave out torchrun.")
        entries, finished = entries_at(run)
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


if __name__ == "__main__":
    sys.exit(run_main(main))
