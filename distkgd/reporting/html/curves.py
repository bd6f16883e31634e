"""The curves of a run's stages, as `metrics.jsonl` has them."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Curves:
    """Of one stage of so many steps. series: by the names that metrics.jsonl has."""

    stage: str
    steps: int
    series: Mapping[str, Points]

    def of(self, name: str) -> Points:
        """One of the series; no points where it is not there."""
        return self.series.get(name, [])

    def kind(self, kind: str) -> dict[str, Points]:
        """Those called `kind`/NAME, by NAME."""
        return {name.removeprefix(f"{kind}/"): p for name, p in self.series.items() if name.startswith(f"{kind}/")}

    @property
    def phases(self) -> list[float]:
        """Steps at which another phase of the stage's method began."""
        return [step for (step, before), (_, after) in pairwise(self.of("phase")) if after != before]


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
    return Curves(stage, steps, series)
