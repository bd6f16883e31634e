"""Which models of a finished plan go into the model registry."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from distkgd.data import Graph
from distkgd.pipeline.config import RunConfig
from distkgd.pipeline.stages import Stage
from distkgd.reporting.run_report import RunReport
from distkgd.tracking.serving.entries import FinishedRun, Role, registered_name, roles_of
from distkgd.tracking.tracker import Tracking


def registered_stages(config: RunConfig, stages: Iterable[Stage]) -> dict[str, Role]:
    """Those stages of a plan whose models go into the registry, and as what."""
    if not (config.mlflow.enabled and config.mlflow.registry):
        return {}
    return roles_of([(stage.name, stage.teachers) for stage in stages])


def register_run(
    config: RunConfig,
    stages: Sequence[Stage],
    graph: Graph,
    folder: Path,
    report: RunReport,
    tracking: Tracking,
    say: Callable[[str], None],
) -> None:
    """Register the models of a finished plan where its config asks for that; `say` takes lines for the user."""
    roles = registered_stages(config, stages)
    if not roles:
        return
    results = {result.name: result for result in report.stages}
    name, protocol = config.mlflow.registered_as or registered_name(config.name), f"{config.filter}, {config.ties}"
    run = FinishedRun(folder, name, roles, results, report.budget, graph.identity, protocol)
    entries = run.entries()
    lines = tracking.register(entries, name, run.champion_limit(config.mlflow.champion_max_mb))
    for line in [*lines, *(run.better_direct(entries) if lines else [])]:
        say(line)
