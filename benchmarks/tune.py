"""Tune arms of one comparison with the same number of trials each; resumable, and blind to the test split.

    python benchmarks/tune.py benchmarks/tuning/wn18rr_complex32.yaml [--arm NAME]… [--out runs/tune]

The YAML names a base config, the arms (a stage of that config each) and every trial's overrides. A finished trial is
not run again; results go to benchmarks/results/tuning_<name>.json after each trial, best first, with the validation
MRR alone.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from distkgd.commands.cli import launch
from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.data import Graph, load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DivergedError
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan

RESULTS = Path(__file__).resolve().parent / "results"


def main(
    plan: Annotated[Path, typer.Argument(help="Tuning plan (YAML).")],
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the trials' runs.")] = Path("runs/tune"),
) -> None:
    """Run every trial that has no result yet."""
    tuning = yaml.safe_load(plan.read_text(encoding="utf-8"))
    sizes = {arm: len(spec["trials"]) for arm, spec in tuning["arms"].items()}
    if len(set(sizes.values())) != 1:
        raise SystemExit(f"{plan}: every arm needs the same number of trials, not {sizes}.")
    names = arm or list(sizes)
    if unknown := set(names) - set(sizes):
        raise SystemExit(f"{plan} has no arm {', '.join(sorted(unknown))}; it has {', '.join(sizes)}.")
    launch(lambda ranks, display: run_all(tuning, names, plan.stem, out / plan.stem, ranks, display))


def run_all(tuning: dict[str, Any], names: list[str], name: str, folder: Path, ranks: Ranks, display: Display) -> None:
    """All trials in rounds, so that a stop in the middle leaves the arms about even."""
    base = yaml.safe_load(Path(tuning["base"]).read_text(encoding="utf-8"))
    graph = load_graph(base["data"])
    if not len(graph.valid):
        raise ConfigError(f"{graph.name} has no valid triples to choose trials by.")
    arms = {arm: tuning["arms"][arm] for arm in names}
    teacher = train_teacher(base, graph, folder / "teacher", ranks, display)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number in range(max(len(spec["trials"]) for spec in arms.values())):
        for arm, spec in arms.items():
            overrides = spec["trials"][number]
            arm_stage = spec.get("stage", {})
            student = dict(base["student"])
            if arm_stage.get("method", student["method"]) != student["method"]:
                student.pop("distill", None)  # the options of another method
            stage = merge(merge(student, arm_stage), overrides)
            taught = stage["method"] != "scratch"
            try:
                at = folder / f"{arm}_{number}"
                result = run_trial(base, stage, teacher if taught else None, graph, at, ranks, display)
                found = {"valid_mrr": result.mrr("valid"), "seconds": result.seconds}
            except DivergedError as error:
                found = {"valid_mrr": 0.0, "diverged": str(error)}
            results[arm].append({"overrides": overrides, **found})
            if ranks.first:
                write(name, tuning, graph, results)


def train_teacher(base: dict[str, Any], graph: Graph, folder: Path, ranks: Ranks, display: Display) -> str:
    """Folder of the teacher that all trials share."""
    config = {"data": base["data"], "student": base["teacher"], "test": False, "mlflow": {"enabled": False}}
    run_plan(parse_config(config, "teacher"), graph, ranks, folder, resume=True, display=display)
    return str(folder / "stages" / "student")


def run_trial(
    base: dict[str, Any],
    stage: dict[str, Any],
    teacher: str | None,
    graph: Graph,
    folder: Path,
    ranks: Ranks,
    display: Display,
) -> StageResult:
    """The result of one trial."""
    config = {"name": folder.name, "data": base["data"], "student": stage, "teacher": teacher, "test": False}
    parsed = parse_config({**config, "mlflow": {"enabled": False}}, folder.name)
    try:
        report = run_plan(parsed, graph, ranks, folder, resume=True, display=display)
    except ConfigError as error:
        raise ConfigError(f"{error} (the tuning plan changed under a finished trial)") from None
    return report.stages[-1]


def write(name: str, tuning: dict[str, Any], graph: Graph, results: dict[str, list[dict[str, Any]]]) -> None:
    """benchmarks/results/tuning_<name>.json: arms, best trial first."""
    path = RESULTS / f"tuning_{name}.json"
    RESULTS.mkdir(exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8"))["arms"] if path.exists() else {}
    best = before | {arm: sorted(rows, key=lambda row: -row["valid_mrr"]) for arm, rows in results.items()}
    content = {"base": tuning["base"], "data": graph.summary(), "selected_on": "valid", "arms": best}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
