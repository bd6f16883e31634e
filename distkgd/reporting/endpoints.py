"""What was measured of the endpoints of a run's models, for its report; `distkgd.tracking.serving.speed` measures
it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distkgd.models.model_folder import read_json

MEASURED = "serving.json"  # in a run folder


def with_measured(report: Mapping[str, Any], run_folder: Path) -> Mapping[str, Any]:
    """`report`, with what the run folder holds of its endpoints as "serving"."""
    path = run_folder / MEASURED
    return {**report, "serving": read_json(path)} if path.is_file() else report


def sentences(report: Mapping[str, Any]) -> list[str]:
    """One: how quickly each model answers over HTTP; none where that was not measured."""
    rows = report.get("serving", {}).get("rows")
    if not rows:
        return []
    told = "; ".join(
        f"{row['stage']} p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, {row['per_second']:.0f} requests/s"
        for row in rows
    )
    return [f"Served over HTTP (latency with 1 client, throughput with {rows[0]['clients']}): {told}."]
