"""Figures: from seconds to ratios, into JSON, beside older ones, and as a table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.side_by_side.roofline import Ceilings
from benchmarks.side_by_side.tasks import Task
from distkgd.errors import DataError

Row = dict[str, Any]
TOLERANCE = 0.7  # of an older ratio, below which a new one counts as a regression


def ratios_of(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the rounds' ratios peer seconds / our seconds: how often as fast we are."""
    found = sorted(b / a for a, b in zip(ours, peer, strict=True))
    return {"ratio": statistics.median(found), "ratio_min": found[0], "ratio_max": found[-1]}


def row_of(
    task: Task,
    ours: Sequence[Mapping[str, float]],
    peer: Sequence[Mapping[str, float]],
    ceilings: Ceilings,
    *,
    peer_name: str | None,
    peer_version: str | None,
    skipped: str | None = None,
    products: Sequence[Mapping[str, float]] = (),
) -> Row:
    """One task's figures.

    ours, peer, products: what each round said. No rounds of the peer: it is missing, and `skipped` says why.
    """
    seconds = [one["seconds"] for one in ours]
    mine, least = statistics.median(seconds), task.work.seconds(ceilings)
    row: Row = {
        "task": task.name,
        "ours": 1.0 / mine,
        "peer": None,
        "peer_name": peer_name,
        "peer_version": peer_version,
        "ratio": None,
        "ratio_min": None,
        "ratio_max": None,
        "roofline_share": least / mine if task.device == "cpu" else None,
        "device": task.device,
        "unit": task.unit,
        "target": task.target,
        "rounds": len(ours),
        "roofline": {**vars(task.work), "seconds": least},
    }
    if peer:
        other = [one["seconds"] for one in peer]
        row |= {"peer": 1.0 / statistics.median(other), **ratios_of(seconds, other)}
    if skipped:
        row["skipped"] = skipped
    if task.more_targets:
        row["more_targets"] = dict(task.more_targets)
    if products:
        shares = [task.work.gemm * one["seconds"] / s for one, s in zip(products, seconds, strict=True)]
        row["gemm_share"] = statistics.median(shares)
        row["gemm_share_min"], row["gemm_share_max"] = min(shares), max(shares)
    for key in ours[0]:
        if key != "seconds":
            row[f"ours_{key}"] = statistics.median(one[key] for one in ours)
            if peer:
                row[f"peer_{key}"] = statistics.median(one[key] for one in peer)
    return row


def memory_of(ours: Mapping[str, int], peer: Mapping[str, int] | None, held: int) -> dict[str, float]:
    """Peak bytes of both sides above what their process held before and what both hold anyway; ours / peer's."""
    above = {name: one["peak"] - one["before"] - held for name, one in (("ours", ours), ("peer", peer)) if one}
    found: dict[str, float] = {f"memory_{name}": number for name, number in above.items()}
    if above.get("peer", 0) > 0:
        found["memory_ratio"] = above["ours"] / above["peer"]
    return found


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file: a list, or a mapping with `rows`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Row] = found if isinstance(found, list) else found["rows"]
        if all(isinstance(row["task"], str) and "ratio" in row for row in rows):
            return rows
        reason = "a row has no task or ratio"
    except OSError as error:
        reason = str(error.strerror)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DataError(f"{path} holds no results of a benchmark ({reason}); give a file that `--json` wrote.")


def merge(old: Sequence[Row], new: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Old rows with the new ones of the same tasks in their place, in `order`; tasks it lacks come last."""
    rows = {row["task"]: row for row in [*old, *new]}
    place = {name: i for i, name in enumerate(order)}
    return [rows[name] for name in sorted(rows, key=lambda name: (place.get(name, len(place)), name))]


def fallen(old: Sequence[Row], new: Sequence[Row], tolerance: float = TOLERANCE) -> list[str]:
    """A line per task whose ratio is below `tolerance` times the old one; seconds are not compared."""
    before = {row["task"]: row["ratio"] for row in old if row["ratio"]}
    return [
        f"{row['task']}: ratio {row['ratio']:.2f}, it was {before[row['task']]:.2f}"
        for row in new
        if row["ratio"] and row["task"] in before and row["ratio"] < tolerance * before[row["task"]]
    ]


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False)
    drawn.add_column("task", no_wrap=True)
    for title in ("ours", "unit", "peer", "theirs", "ratio (min-max)", "target", "share of roofline"):
        drawn.add_column(title, justify="left" if title in ("unit", "peer") else "right")
    for row in rows:
        peer = f"{row['peer_name'] or ''} {row['peer_version'] or ''}".strip()
        spread = "" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        theirs = "" if row["peer"] is None else number(row["peer"])
        cells = [row["task"], number(row["ours"]), row["unit"], peer, theirs, spread, target]
        share = row["roofline_share"]
        drawn.add_row(*map(Text, [*cells, "" if share is None else f"{share:.0%}"]))
    return drawn


def notes(rows: Sequence[Row]) -> list[str]:
    """What does not fit into the table: matrix products, memory, and why a peer is missing."""
    lines = []
    for row in rows:
        said = []
        more = row.get("more_targets", {})
        if "gemm_share" in row:
            aim = f" (target {more['gemm_share_at_least']:.0%})" if "gemm_share_at_least" in more else ""
            said.append(f"{row['gemm_share']:.0%} of the machine's matrix rate{aim}")
        if "memory_ours" in row:
            aim = f", at most {more['memory_ratio_at_most']:.3f} aimed at" if "memory_ratio_at_most" in more else ""
            theirs = f" against {row['memory_peer'] / 1e6:,.0f} MB" if "memory_peer" in row else ""
            share = f", {row['memory_ratio']:.3f} of it{aim}" if "memory_ratio" in row else ""
            said.append(f"peak memory {row['memory_ours'] / 1e6:,.0f} MB{theirs}{share}")
        if "ours_all" in row:
            theirs = ""
            if row["peer"] is not None:
                theirs = f", {row['peer_name']} in {row['peer_all']:.3g} s from {row['peer_bytes'] / 1e6:,.1f} MB"
            queries, held = row["ours_queries"], row["ours_bytes"] / 1e6
            mine = f"{queries:,.0f} tail queries in {row['ours_all']:.3g} s from {held:,.1f} MB"
            said.append(mine + theirs)
        if "skipped" in row:
            said.append(f"no peer: {row['skipped']}")
        lines += [f"{row['task']}: {'; '.join(said)}"] if said else []
    return lines


def number(value: float) -> str:
    """Three digits, thousands in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
