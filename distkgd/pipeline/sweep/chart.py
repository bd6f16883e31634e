"""A sweep as a picture: bars with error bars over seeds, or a heat map of two keys."""

import math
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from distkgd.errors import ConfigError

OURS, REFERENCE, DIRECT, PAPER = "#4878a8", "#1f3f66", "#a0a0a0", "#c0392b"
PNG_DPI = 150
Report = Mapping[str, Any]


def check_installed() -> None:
    """ConfigError where there is nothing to draw with."""
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(f"A sweep's chart needs Matplotlib ({error}); pip install 'distkgd[ray]'.") from None


def draw(report: Report, paths: Sequence[Path]) -> None:
    """Write the chart in the formats of the paths' suffixes, each whole or not at all."""
    done = [row for row in report["rows"] if "valid" in row or "test" in row]
    split = "test" if all("test" in row for row in done) else "valid"
    rows = [row for row in done if split in row]
    if not rows:
        return
    panels = [(group, list(found)) for group, found in groupby(rows, key=lambda row: row["group"])]
    heat = report["heat_map"]
    tall = [1.0 + (len(heat["values"][0]) * 0.6 if heat else len(found) * 0.32) for _, found in panels]
    figure = import_module("matplotlib.figure").Figure(figsize=(7.0, sum(tall) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": tall})[:, 0]
    for axis, (group, found) in zip(axes, panels, strict=True):
        axis.set_title(group, loc="left", fontsize=10)
        if heat:
            _heat(figure, axis, found, heat, split)
        else:
            _bars(axis, found, report["reference"], split)
            axis.set_xlabel(f"{split} MRR")
    seeds = len(report["seeds"])
    over = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    marks = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if marks:
        figure.legend(marks.values(), marks.keys(), loc="outside lower right", fontsize=8)
    figure.suptitle(f"{report['name']}: {split} MRR, {over}", fontsize=11)
    for path in paths:
        part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        try:
            # No date in the file: the same report makes the same bytes.
            figure.savefig(part, dpi=PNG_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _bars(axis: Any, rows: Sequence[Report], reference: str, split: str) -> None:
    found = [row[split]["mrr"] for row in rows]
    colours = [REFERENCE if r["row"] == reference else DIRECT if r["kind"] == "direct" else OURS for r in rows]
    places = list(range(len(rows)))[::-1]
    spread = [one["sd"] or 0.0 for one in found]
    axis.barh(places, [one["mean"] for one in found], xerr=spread, color=colours, height=0.7, capsize=3)
    papers = [(row["paper"], place) for row, place in zip(rows, places, strict=True)]
    papers = [(figure, place) for figure, place in papers if isinstance(figure, int | float)]
    if papers:
        axis.plot(*zip(*papers, strict=True), "D", color=PAPER, markersize=5, label="paper")
    axis.set_yticks(places, [row["row"] for row in rows], fontsize=8)
    for place, one in zip(places, found, strict=True):
        axis.text(0.0, place, f" {one['mean']:.3f}", va="center", color="white", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _heat(figure: Any, axis: Any, rows: Sequence[Report], heat: Report, split: str) -> None:
    (down, across), (first, second) = heat["keys"], heat["values"]
    known = {(r["overrides"].get(down), r["overrides"].get(across)): r[split]["mrr"]["mean"] for r in rows}
    cells = [[known.get((one, other), float("nan")) for other in second] for one in first]
    image = axis.imshow(cells, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axis)
    axis.set_xticks(range(len(second)), list(map(str, second)))
    axis.set_yticks(range(len(first)), list(map(str, first)))
    axis.set_xlabel(across)
    axis.set_ylabel(down)
    middle = (min(known.values()) + max(known.values())) / 2
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if value < middle else "black"
                axis.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9)
