"""Which models of a finished plan go into the model registry."""

from collections.abc import Callable
from pathlib import Path

from distkgd.pipeline.config import RunConfig
from distkgd.pipeline.stages import build_plan
from distkgd.tracking.serving.entries import better_direct, champion_limit, entries_of_run, registered_name, roles_of
from distkgd.tracking.tracker import Tracking


def registered_stages(config: RunConfig) -> frozenset[str]:
    """The stages of a plan whose models go into the registry."""
    if not (config.mlflow.enabled and config.mlflow.registry):
        return frozenset()
    return frozenset(roles_of([(stage.name, stage.teachers) for stage in build_plan(config)]))


def register_run(config: RunConfig, folder: Path, tracking: Tracking, say: Callable[[str], None]) -> None:
    """Register the models of a finished plan where its config asks for that; `say` takes lines for the user."""
    if not (config.mlflow.enabled and config.mlflow.registry):
        return
    name = config.mlflow.registered_as or registered_name(config.name)
    entries = entries_of_run(folder)
    lines = tracking.register(entries, name, champion_limit(folder, config.mlflow.champion_max_mb))
    for line in [*lines, *(better_direct(folder, entries) if lines else [])]:
        say(line)
