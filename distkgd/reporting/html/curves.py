"""The curves of a run's stages, as `metrics.jsonl` has them, thinned to what a chart can show."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

POINTS = 160  # of a curve at most

Points = list[tuple[float, float]]  # (step, value)


@dataclass
class Curves:
    """Of one stage. phases: steps at which another phase of its method began."""

    stage: str
    steps: int
    valid: Points = field(default_factory=list)
    crops: dict[int, Points] = field(default_factory=dict)
    loss: Points = field(default_factory=list)
    soft_weight: dict[str, Points] = field(default_factory=dict)
    evaluators: dict[str, Points] = field(default_factory=dict)
    weight: Points = field(default_factory=list)
    mask: dict[str, Points] = field(default_factory=dict)
    phases: list[int] = field(default_factory=list)


def read_curves(path: Path, stage: str) -> Curves:
    """The curves in a stage's metrics.jsonl; empty ones where there is none. A line cut short by a kill is skipped."""
    series: dict[str, Points] = defaultdict(list)
    steps = 0
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    step = int(row["step"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                steps = max(steps, step)
                for name, value in row.items():
                    if isinstance(value, int | float) and math.isfinite(value):
                        series[name].append((step, float(value)))
    return _sorted(stage, steps, series)


def _sorted(stage: str, steps: int, series: dict[str, Points]) -> Curves:
    found = Curves(stage, steps)
    for name, points in series.items():
        thin, (kind, _, rest) = thinned(points), name.partition("/")
        crop = rest.removeprefix("mrr_")
        if name == "valid/mrr":
            found.valid = thin
        elif kind == "valid" and crop != rest and crop.isdecimal():
            found.crops[int(crop)] = thin
        elif name == "loss":
            found.loss = thin
        elif name == "lambda":
            found.weight = thin
        elif kind == "soft_weight":
            found.soft_weight[rest] = thin
        elif kind == "evaluator":
            found.evaluators[rest] = thin
        elif kind == "mask":
            found.mask[rest] = thin
        elif name == "phase":
            found.phases = [int(before[0]) for before, after in pairwise(points) if after[1] != before[1]]
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> Points:
    """At most `most` of the points in order: first and last, and the extremes of every run between them."""
    if len(points) <= most:
        return list(points)
    inner, runs = points[1:-1], (most - 2) // 2
    cuts = [i * len(inner) // runs for i in range(runs + 1)]
    chosen = []
    for low, high in pairwise(cuts):
        run = inner[low:high]
        ends = {min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])}
        chosen += sorted(ends)
    return [points[0], *chosen, points[-1]]
