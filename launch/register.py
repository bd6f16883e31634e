"""Put the models of a finished run into MLflow's registry, from where `mlflow models serve` takes them.

python launch/register.py RUN [--name NAME] [--champion-max-mb 20] [--speed]
mlflow models serve -m models:/NAME@champion --env-manager local
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from distkgd.display import Display
from distkgd.distributed.ranks import Ranks
from distkgd.endpoint_report import MEASURED, sentences
from distkgd.errors import UnsupportedError
from distkgd.launching import launch
from distkgd.ownership import owned
from distkgd.report import write_atomic, write_report
from distkgd.report_html import remake
from distkgd.serving.entries import entries_at
from distkgd.serving.speed import measure
from distkgd.tracking import redact, register_finished

SERVE = "mlflow models serve -m 'models:/{}@champion' --env-manager local"


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
        entries, folder, default = entries_at(run)
        called, report = name or default, folder / "report.json"
        found, store = register_finished(entries, called, champion_max_mb, run_folder=folder, uri=uri)
        for line in [*found.lines, f"MLFLOW_TRACKING_URI={redact(store)} {SERVE.format(called)}"]:
            display.line(line)
        if speed:
            measured = measure(entries, [f"models:/{called}/{version}" for version in found.versions], store)
            display.line("\n".join(sentences({"serving": measured})))
            if report.is_file():
                with owned(folder, ranks, display.line):
                    write_atomic(folder / MEASURED, json.dumps(measured, indent=2) + "\n")
                    write_report(folder, json.loads(report.read_text(encoding="utf-8")))
                for note in remake(folder)[1]:
                    display.warn(note)

    launch(body, device="cpu")


if __name__ == "__main__":
    typer.run(main)
