"""What came of a sweep: means and deviations over seeds, paired differences, and the same as tables and a chart."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.common.intervals import paired_interval
from distkgd.common.text import NONE
from distkgd.pipeline.sweep.chart import draw
from distkgd.pipeline.sweep.config import SweepConfig
from distkgd.pipeline.sweep.trials import DIRECT, Trial, with_teachers
from distkgd.pipeline.sweep.worker import Record
from distkgd.reporting.run_report import read_report

SPLITS = ("valid", "test")
METRICS = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10")
Result = Mapping[str, Any]


def make_report(sweep: SweepConfig, trials: Sequence[Trial], out: Path, tried: Sequence[Trial] = ()) -> dict[str, Any]:
    """report.json's content. tried: all trials of a search, of which `trials` are the chosen ones."""
    shown = trials if sweep.paper_teacher is None else with_teachers(trials, sweep.paper_teacher)
    results = [_result(trial, out, sweep.long_tail) for trial in shown]
    rows = [_row(list(group)) for _, group in groupby(results, key=lambda one: (one["group"], one["row"]))]
    reference = sweep.reference or (DIRECT if sweep.space is not None else rows[0]["row"])
    for row in rows:
        beside = [r for r in rows if r["group"] == row["group"]]
        other = next((r for r in beside if r["row"] == reference or r["kind"] == reference == DIRECT), None)
        directs = [r for r in beside if r["kind"] == DIRECT and "valid" in r]
        best = max(directs, key=lambda r: float(r["valid"]["mrr"]["mean"])) if len(directs) > 1 else None
        for key, one in (("difference", other), ("over_best_direct", best)):
            if one is not None and one is not row:
                row[key] = {split: paired(row[split], one[split]) for split in SPLITS if split in row and split in one}
    keys = list(sweep.grid) if sweep.grid is not None and len(sweep.grid) == 2 else []
    return {
        "name": sweep.name,
        "reference": reference,
        "seeds": list(sweep.seeds),
        "paper": sweep.paper,
        "long_tail": sweep.long_tail,
        "heat_map": {"keys": keys, "values": [list(sweep.grid[key]) for key in keys]} if sweep.grid and keys else None,
        "rows": rows,
        "trials": results,
        "tried": sorted((_result(trial, out, sweep.long_tail) for trial in tried), key=_best_first),
    }


def _result(trial: Trial, out: Path, long_tail: bool) -> dict[str, Any]:
    folder = trial.folder(out)
    record = Record.read(folder)
    result: dict[str, Any] = {
        "name": trial.name,
        "group": trial.group,
        "row": trial.row,
        "kind": trial.kind,
        "seed": trial.seed,
        "overrides": trial.overrides,
        "paper": trial.paper,
        "folder": str(folder.relative_to(out)),
        "status": record.status,
        "error": record.error,
        "epoch": record.epoch,
        "best_valid_mrr": record.curve[-1][1] if record.curve else None,
        "starts": record.starts,
        "ends": record.ends,
    }
    if record.status == "finished":
        stages = {stage.name: stage for stage in read_report(folder).stages}
        row = stages[trial.stage].to_json()
        result["seconds"] = sum(stage.seconds or 0.0 for stage in stages.values())
        result |= {key: row[key] for key in ("method", "scorer", "dim", "bytes", *SPLITS, "curve") if key in row}
        if stages[trial.stage].train_seconds is not None:
            result["ranking_seconds"] = result["seconds"] - sum(stage.train_seconds or 0.0 for stage in stages.values())
        if long_tail and "test" in result:
            result["test"] = next(iter(stages[trial.stage].parts("test")["relation_frequency"].values()))
        if (folder / "test.json").exists():
            result["test"] = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    return result


def _best_first(result: Result) -> tuple[str, float]:
    mrr = result["best_valid_mrr"]
    return result["kind"], math.inf if mrr is None else -mrr


def _row(results: Sequence[Result]) -> dict[str, Any]:
    """One row at all its seeds."""
    done = [one for one in results if one["status"] == "finished"]
    row: dict[str, Any] = {key: results[0][key] for key in ("group", "row", "kind", "overrides", "paper")}
    row |= {"num_trials": len(results), "num_finished": len(done)}
    if done:
        row |= {key: done[0][key] for key in ("method", "scorer", "dim", "bytes")}
        for key in ("seconds", "ranking_seconds"):
            if all(key in one for one in done):
                row[key] = mean(one[key] for one in done)
        for split in (split for split in SPLITS if all(one.get(split, {}).get("mrr") is not None for one in done)):
            row[split] = {metric: _summary({one["seed"]: one[split][metric] for one in done}) for metric in METRICS}
        if all("curve" in one for one in done):
            row["curve"] = _mean_curve([one["curve"] for one in done], [split for split in SPLITS if split in row])
    return row


def _mean_curve(curves: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """split -> dim -> mean MRR, of the crops of a model, on those of `splits` that they were ranked on."""
    return {
        split: {str(dim): mean(curve[split][dim]["mrr"] for curve in curves) for dim in curves[0][split]}
        for split in splits
        if split in curves[0]
    }


def _summary(by_seed: Mapping[int, float]) -> dict[str, Any]:
    values = list(by_seed.values())
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "by_seed": dict(by_seed)}


def paired(row: Result, other: Result) -> dict[str, Any] | None:
    """Mean difference of MRR over the seeds that both have, and the ends of its 95% interval where they are two."""
    mine, theirs = row["mrr"]["by_seed"], other["mrr"]["by_seed"]
    gaps = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not gaps:
        return None
    return {"num_seeds": len(gaps), **paired_interval(gaps)}


# -- as text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """One table: its title, its columns (the first is text, the others are numbers), and its cells."""

    title: str
    header: list[str]
    cells: list[list[str]]


def sheets(report: Result) -> list[Sheet]:
    """All tables of a report."""
    found = [_main(report, group, list(rows)) for group, rows in groupby(report["rows"], key=lambda row: row["group"])]
    found += _heat(report) + _crops(report)
    if report["tried"]:
        cells = [
            [one["name"], one["status"], str(one["epoch"] or NONE), _fixed(one["best_valid_mrr"])]
            for one in report["tried"]
        ]
        found.append(Sheet("All trials, best first", ["trial", "status", "epoch", "valid MRR"], cells))
    return found


def _main(report: Result, group: str, rows: Sequence[Result]) -> Sheet:
    split = "test" if all("test" in row for row in rows if row["num_finished"]) else "valid"
    papers = any(row["paper"] is not None for row in report["rows"])
    header = ["row", "method", "scorer", "dim", "seeds", "valid MRR", "test MRR", "H@1", "H@10"]
    several = any("over_best_direct" in row for row in report["rows"])
    header += [f"{split} − {report['reference']}", *([f"{split} − best direct"] if several else [])]
    header += [*(["paper"] if papers else []), "seconds", "of it ranking"]
    cells = []
    for row in rows:
        seeds = f"{row['num_finished']}" + (f" of {row['num_trials']}" * (row["num_finished"] < row["num_trials"]))
        cells.append(
            [
                row["row"],
                *(str(row.get(key, NONE)) for key in ("method", "scorer", "dim")),
                seeds,
                *(_spread(row.get(name, {}).get("mrr")) for name in SPLITS),
                *(_spread(row.get("test", {}).get(key)) for key in ("hits_at_1", "hits_at_10")),
                _gap((row.get("difference") or {}).get(split)),
                *([_gap((row.get("over_best_direct") or {}).get(split))] if several else []),
                *([_paper(row["paper"])] if papers else []),
                *(NONE if key not in row else f"{row[key]:.0f}" for key in ("seconds", "ranking_seconds")),
            ]
        )
    return Sheet(group, header, cells)


def _heat(report: Result) -> list[Sheet]:
    """The rows of a grid of two keys as a matrix."""
    if not report["heat_map"]:
        return []
    (down, across), (first, second) = report["heat_map"]["keys"], report["heat_map"]["values"]
    found = []
    for group, rows in groupby(report["rows"], key=lambda row: row["group"]):
        known = {(row["overrides"].get(down), row["overrides"].get(across)): _shown(row) for row in rows}
        cells = [[str(value), *(_fixed(known.get((value, other))) for other in second)] for value in first]
        found.append(Sheet(f"{group} MRR".strip(), [f"{down} \\ {across}", *map(str, second)], cells))
    return found


def _crops(report: Result) -> list[Sheet]:
    """MRR of every crop of every row that has some."""
    rows = [row for row in report["rows"] if row.get("curve")]
    found = []
    for split in rows[0]["curve"] if rows else ():
        dims = sorted({int(dim) for row in rows for dim in row["curve"].get(split, {})})
        names = [" / ".join(filter(None, (row["group"], row["row"]))) for row in rows]
        cells = [[str(dim), *(_fixed(row["curve"].get(split, {}).get(str(dim))) for row in rows)] for dim in dims]
        found.append(Sheet(f"Crops, {split} MRR", ["dim", *names], cells))
    return found


def _shown(row: Result) -> float | None:
    found = row.get("test") or row.get("valid")
    return None if found is None else found["mrr"]["mean"]


def notes(report: Result) -> list[str]:
    """How to read the tables."""
    seeds = ", ".join(map(str, report["seeds"]))
    many = len(report["seeds"]) > 1
    told = [f"Seeds {seeds}; ± is the standard deviation over them." if many else f"One seed, {seeds}."]
    paired_ = ", paired over seeds; [ ] is their 95% interval (Student's t)" if many else ""
    told.append(f"Differences are to {report['reference']}{paired_}.")
    if any("over_best_direct" in row for row in report["rows"]):
        told.append("The best direct model of a group is that of the highest validation MRR.")
    if report["paper"]:
        told.append(f"Paper: {report['paper']}.")
    if report.get("long_tail"):
        told.append("Test figures are those of relations with few training triples.")
    if report["tried"]:
        arms = {kind: len(list(group)) for kind, group in groupby(report["tried"], key=lambda one: one["kind"])}
        counts = " and ".join(f"{number} trials of {kind}" for kind, number in arms.items())
        told.append(f"The best of {counts} by validation MRR; no other trial has read the test split.")
    told += [f"{one['name']} {one['status']}: {one['error']}" for one in report["trials"] if one["error"]]
    return told


def markdown(report: Result) -> str:
    """The tables and notes as GitHub Markdown."""
    parts = [f"# {report['name']}"]
    for sheet in sheets(report):
        lines = [sheet.header, ["---", *["---:"] * (len(sheet.header) - 1)], *sheet.cells]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts += [f"## {sheet.title}", body] if sheet.title else [body]
    return "\n\n".join([*parts, *notes(report), "![chart](chart.svg)"]) + "\n"


def table(report: Result) -> Group:
    """The same for a terminal."""
    drawn: list[Any] = []
    for sheet in sheets(report):
        one = Table(title=sheet.title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
        for column, title in enumerate(sheet.header):
            one.add_column(title, justify="right" if column else "left", overflow="fold")
        for line in sheet.cells:
            one.add_row(*map(Text, line))
        drawn.append(one)
    return Group(*drawn, *map(Text, notes(report)))


def write_files(out: Path, report: Result, display: Display) -> None:
    """report.json, report.md, chart.svg and chart.png."""
    write_atomic(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.md", markdown(report))
    draw(report, [out / "chart.svg", out / "chart.png"])
    display.line(f"report: {out / 'report.md'}")


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _spread(summary: Result | None) -> str:
    if summary is None:
        return NONE
    return f"{summary['mean']:.3f}" + ("" if summary["sd"] is None else f" ± {summary['sd']:.3f}")


def _gap(gap: Result | None) -> str:
    if gap is None:
        return NONE
    ends = f" [{_signed(gap['low'])}, {_signed(gap['high'])}]" if "low" in gap else ""
    return _signed(gap["mean"]) + ends


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def _paper(figure: float | str | None) -> str:
    return _fixed(figure) if isinstance(figure, int | float) else (figure or NONE)
