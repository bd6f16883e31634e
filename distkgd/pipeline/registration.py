"""Which models of a finished plan go into the model registry."""

from collections.abc import Callable

from distkgd.pipeline.stages import Plan
from distkgd.reporting.run_report import RunReport
from distkgd.tracking.serving.entries import RegisteredRun, Role, registered_name, roles_of
from distkgd.tracking.tracker import Tracking


def registered_stages(plan: Plan) -> dict[str, Role]:
    """Those stages of a plan whose models go into the registry, and as what."""
    wanted = plan.config.mlflow.enabled and plan.config.mlflow.registry
    return roles_of([(stage.name, stage.teachers) for stage in plan.stages]) if wanted else {}


def register_run(plan: Plan, report: RunReport, tracking: Tracking, say: Callable[[str], None]) -> None:
    """Register the models of a finished plan where its config asks for that; `say` takes lines for the user."""
    roles, config = registered_stages(plan), plan.config
    if not roles:
        return
    name, protocol = config.mlflow.registered_as or registered_name(config.name), f"{config.filter}, {config.ties}"
    results = {result.name: result for result in report.stages}
    run = RegisteredRun(plan.folder, name, roles, results, report.budget, plan.graph.identity, protocol)
    entries = run.entries()
    lines = tracking.register(entries, name, run.champion_limit(config.mlflow.champion_max_mb))
    for line in [*lines, *(run.better_direct(entries) if lines else [])]:
        say(line)
