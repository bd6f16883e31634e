"""What was measured of the endpoints of a run's models, for its report; `distkgd.tracking.serving.speed` measures
it."""

from collections.abc import Mapping
from typing import Any

MEASURED = "serving.json"  # in a run folder


def sentences(measured: Mapping[str, Any]) -> list[str]:
    """One: how quickly each model answers over HTTP; none where that was not measured."""
    rows = measured.get("rows")
    if not rows:
        return []
    told = "; ".join(
        f"{row['stage']} p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, {row['per_second']:.0f} requests/s"
        for row in rows
    )
    return [f"Served over HTTP (latency with 1 client, throughput with {rows[0]['clients']}): {told}."]
