"""Every stage of every shipped config and sweep, shrunk to a size that trains at once."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distkgd.config.tree import merge
from distkgd.pipeline.config import RunConfig, StageConfig, load_config, parse_config
from distkgd.pipeline.stages import build_plan
from distkgd.pipeline.sweep.config import load_sweep
from distkgd.pipeline.sweep.trials import table_trials

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SWEEPS = ("ablations", "tables", "search")
NO_STAGES = "ray"
DIM = 8
SHAPE = ("scorer", "dim", "norm", "reciprocal", "init_scale")


def shipped_stages() -> dict[str, dict[str, Any]]:
    """Name -> {"stage": shrunk, "teachers": [shrunk, ...]} of all shipped stages; of those that are alike, one."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        where = path.relative_to(CONFIGS)
        if where.parts[0] != NO_STAGES:
            for config in _configs(path, sweep=where.parts[0] in SWEEPS):
                for name, stage in _stages(config).items():
                    if _ends_torch(stage["stage"]):
                        continue
                    found.setdefault(json.dumps(stage, sort_keys=True), {"name": f"{where} {name}", **stage})
    seen: Counter[str] = Counter()
    out = {}
    for stage in found.values():
        name = stage.pop("name")
        seen[name] += 1
        out[name if seen[name] == 1 else f"{name} {seen[name]}"] = stage
    return out


def _ends_torch(stage: dict[str, Any]) -> bool:
    # Forward-mode derivatives of CP's queries, on tensors of the pretend device's class, end the process (torch 2.13).
    return bool(stage["method"] == "metasd" and stage["scorer"] == "cp" and stage["distill"]["meta"])


def _configs(path: Path, sweep: bool) -> Iterator[RunConfig]:
    if not sweep:
        yield load_config(path)
        return
    table, base = load_sweep(path)
    if table.space is not None:
        yield parse_config(base, str(path))
    else:
        yield from (trial.config for trial in table_trials(table, base, lambda data: data))


def _stages(config: RunConfig) -> dict[str, dict[str, Any]]:
    # The stages of a plan, by name, each with what matters of its teachers.
    plan = build_plan(config)
    stages = {stage.name: shrunk(stage.config) for stage in plan}
    shapes = {name: {key: stage[key] for key in SHAPE} for name, stage in stages.items()}
    return {
        stage.name: {"stage": stages[stage.name], "teachers": [shapes[t] for t in stage.teachers if t in shapes]}
        for stage in plan
    }


def shrunk(config: StageConfig) -> dict[str, Any]:
    """A stage of the same kind that trains 48 triples a step; its sizes, rates, weights and epochs are those of all."""
    plain = config.model_dump(mode="json")
    num, chunk = min(config.negatives.num, 20), min(config.negatives.chunk, 4)
    over: dict[str, Any] = {
        "dim": DIM,
        "margin": None,
        "batch_size": 48,
        "accumulate": min(config.accumulate, 2),
        "init_scale": 0.5,
    }
    over |= {"epochs": 4, "patience": 0, "validate_every": 1, "checkpoint_every": 0, "schedule": {"name": "constant"}}
    over |= {
        "negatives": {"num": num, "chunk": chunk, "anchors": min(config.negatives.anchors, 5)},
        "optimizer": {"lr": 0.05, "relation_lr": None},
    }
    if config.regulariser.weight:
        over["regulariser"] = {"weight": 0.01}
    if config.group:
        over["group"] = 4
    return merge(plain, over | {"distill": _shrunk_method(plain["distill"] or {})})


def _shrunk_method(distill: dict[str, Any]) -> dict[str, Any]:
    over: dict[str, Any] = {key: 0.5 for key, value in distill.items() if isinstance(value, float) and 0 < value != 1}
    if distill.get("dims"):
        over |= {"dims": [4, DIM], "weights": None}
    if distill.get("group"):
        over["group"] = 4
    if (distill.get("stage_two") or {}).get("start") not in (None, "plateau"):
        over["stage_two"] = {"start": 2}
    if distill.get("stage_two"):
        over["stage_two"] = over.get("stage_two", {}) | {"epochs": 2}
    return over
