"""What a sweep says in the end: means, paired differences, tables, the chart."""

import json
from pathlib import Path
from typing import Any

import pytest

from distkgd.pipeline.sweep.chart import draw
from distkgd.pipeline.sweep.config import SweepConfig
from distkgd.pipeline.sweep.report import make_report, markdown, notes, paired, table
from distkgd.pipeline.sweep.trials import Trial, table_trials, with_teachers
from distkgd.pipeline.sweep.worker import Record
from tests.records import report_of

BASE = {"student": {"dim": 8}, "baseline": True, "teacher": {"dim": 16}}


def finished(trial: Trial, out: Path, mrr: float, curve: dict[str, Any] | None = None) -> None:
    """Write what a trial that has run leaves behind; test figures are .01 below those of validation."""
    folder = trial.folder(out)
    folder.mkdir(parents=True)
    Record("finished", "x", [(1, mrr)]).write(folder)
    names = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10")
    row: dict[str, Any] = {"name": trial.stage, "seconds": 2.0}
    row |= {"valid": dict.fromkeys(names, mrr), "test": dict.fromkeys(names, mrr - 0.01)}
    row |= {"curve": curve} if curve else {}
    report_of({"stages": [row]}).write(folder)


def swept(out: Path, figures: dict[str, list[float]], **sweep: Any) -> dict[str, Any]:
    """The report of rows whose validation MRR at seeds 0, 1, … is given."""
    base = {**BASE, "student": {**BASE["student"], "method": "bkd"}}
    rows = {name: {"student.epochs": 5 + i, "paper": 0.5 if i else None} for i, name in enumerate(figures)}
    seeds = list(range(len(next(iter(figures.values())))))
    config = SweepConfig.model_validate({"name": "t", "base": base, "rows": rows, "seeds": seeds, **sweep})
    trials = table_trials(config, base | {"baseline": False}, lambda data: data)
    for trial in trials:
        finished(trial, out, figures[trial.row][trial.seed])
    return make_report(config, trials, out)


def test_differences_are_paired_over_seeds_with_students_interval(tmp_path: Path) -> None:
    # Gaps .10, .12, .14: mean .12, deviation .02; t(.975, 2) = 4.30265, so the half-width is 4.30265 * .02 / sqrt(3).
    report = swept(tmp_path, {"a": [0.1, 0.2, 0.3], "b": [0.2, 0.32, 0.44]})
    first, second = report["rows"]
    assert first["valid"]["mrr"]["mean"] == pytest.approx(0.2) and first["valid"]["mrr"]["sd"] == pytest.approx(0.1)
    gap = second["difference"]["test"]
    assert gap["mean"] == pytest.approx(0.12) and gap["num_seeds"] == 3
    assert gap["high"] - gap["mean"] == pytest.approx(4.302653 * 0.02 / 3**0.5)
    assert "difference" not in first
    text = markdown(report)
    assert "+0.120 [+0.070, +0.170]" in text and "0.310 ± 0.120" in text and "| 0.500 |" in text


def test_one_seed_has_a_difference_without_interval_and_no_common_seed_has_none() -> None:
    def row(by_seed: dict[int, float]) -> dict[str, Any]:
        return {"mrr": {"by_seed": by_seed}}

    assert paired(row({0: 0.5}), row({0: 0.3, 1: 0.1})) == {"mean": pytest.approx(0.2), "num_seeds": 1}
    assert paired(row({0: 0.5}), row({1: 0.3})) is None


def test_a_row_that_failed_is_shown_with_its_cause(tmp_path: Path) -> None:
    report = swept(tmp_path, {"a": [0.1, 0.2], "b": [0.2, 0.3]})
    folder = tmp_path / report["trials"][3]["folder"]
    Record("failed", error="no space left").write(folder)
    trials_again = swept_again(tmp_path)
    assert trials_again["rows"][1]["num_finished"] == 1 and "1 of 2" in markdown(trials_again)
    assert any("no space left" in note for note in notes(trials_again))


def swept_again(out: Path) -> dict[str, Any]:
    base = {**BASE, "student": {**BASE["student"], "method": "bkd"}, "baseline": False}
    rows = {name: {"student.epochs": 5 + i} for i, name in enumerate("ab")}
    config = SweepConfig.model_validate({"name": "t", "base": base, "rows": rows, "seeds": [0, 1]})
    return make_report(config, table_trials(config, base, lambda data: data), out)


def test_a_grid_of_two_keys_is_a_matrix_and_a_heat_map(tmp_path: Path) -> None:
    base = {**BASE, "student": {"method": "bkd"}, "baseline": False}
    grid = {"teacher.dim": [32, 16], "student.dim": [8, 4]}
    config = SweepConfig.model_validate({"name": "t", "base": base, "grid": grid})
    trials = table_trials(config, base, lambda data: data)
    for i, trial in enumerate(trials):
        finished(trial, tmp_path, 0.31 + i / 10)
    report = make_report(config, trials, tmp_path)
    text = markdown(report)
    assert "| teacher.dim \\ student.dim | 8 | 4 |" in text
    assert "| 32 | 0.300 | 0.400 |" in text and "| 16 | 0.500 | 0.600 |" in text
    draw(report, [tmp_path / "chart.svg"])
    assert "0.600" in (tmp_path / "chart.svg").read_text(encoding="utf-8") or (tmp_path / "chart.svg").stat().st_size


def test_crops_are_listed_by_dim(tmp_path: Path) -> None:
    base = {"student": {"dim": 8}}
    config = SweepConfig.model_validate({"name": "t", "base": base, "rows": {"a": {}}})
    trials = table_trials(config, base, lambda data: data)
    finished(trials[0], tmp_path, 0.5, {"valid": {"4": {"mrr": 0.25}, "8": {"mrr": 0.5}}})
    text = markdown(make_report(config, trials, tmp_path))
    assert "## Crops, valid MRR" in text and "| 4 | 0.250 |" in text and "| 8 | 0.500 |" in text


def test_the_chart_is_written_whole_and_the_table_fits_a_terminal(tmp_path: Path) -> None:
    report = swept(tmp_path, {"a": [0.1, 0.2], "b": [0.2, 0.3]})
    draw(report, [tmp_path / "chart.svg", tmp_path / "chart.png"])
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "chart.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert sorted(path.name for path in tmp_path.glob("*chart*")) == ["chart.png", "chart.svg"]
    assert table(report) is not None


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_without_triples_has_no_figure_in_tables_chart_and_crops(tmp_path: Path, split: str) -> None:
    curve = {one: {"4": {"mrr": None if one == split else 0.1}} for one in ("valid", "test")}
    trials, config = [], None
    base = {**BASE, "student": {**BASE["student"], "method": "bkd"}, "baseline": False}
    rows = {name: {"student.epochs": 5 + i} for i, name in enumerate("ab")}
    config = SweepConfig.model_validate({"name": "t", "base": base, "rows": rows, "seeds": [0, 1]})
    trials = table_trials(config, base, lambda data: data)
    for trial in trials:
        finished(trial, tmp_path, 0.3, curve)
        path = trial.folder(tmp_path) / "report.json"
        row = json.loads(path.read_text(encoding="utf-8"))
        row["stages"][0][split] = dict.fromkeys(row["stages"][0][split])
        path.write_text(json.dumps(row), encoding="utf-8")
    report = make_report(config, trials, tmp_path)
    assert all(split not in row and split not in row["curve"] for row in report["rows"])
    other = "test" if split == "valid" else "valid"
    assert all(set(row["curve"]) == {other} for row in report["rows"])
    text = markdown(report)
    assert "0.000 ±" not in text and "| – |" in text and f"Crops, {other} MRR" in text
    draw(report, [tmp_path / "chart.svg"])
    assert f"{other} MRR" in (tmp_path / "chart.svg").read_text(encoding="utf-8")


def test_a_table_has_its_teachers_and_the_best_of_several_direct_models_beside_the_papers_own(tmp_path: Path) -> None:
    base = {**BASE, "student": {**BASE["student"], "method": "bkd"}}
    rows = {"paper's": {}, "listwise": {"student.epochs": 7}}
    given = {"reference": "direct", "paper_direct": 0.3, "paper_teacher": 0.9}
    config = SweepConfig.model_validate({"name": "t", "base": base, "rows": rows, **given})
    trials = table_trials(config, base, lambda data: data)
    figures = {"paper's": 0.5, "listwise": 0.6, "direct of paper's": 0.2, "direct of listwise": 0.4, "teacher": 0.8}
    for trial in with_teachers(trials, None):
        finished(trial, tmp_path, figures[trial.row])
    found = {row["row"]: row for row in make_report(config, trials, tmp_path)["rows"]}
    assert list(found) == list(figures)
    assert {name: row["paper"] for name, row in found.items() if row["paper"]} == {
        "direct of paper's": 0.3,
        "teacher": 0.9,
    }
    for name, own, best in (("paper's", 0.3, 0.1), ("listwise", 0.4, 0.2), ("direct of paper's", None, -0.2)):
        row = found[name]
        assert ("difference" in row) == (own is not None)
        assert own is None or row["difference"]["test"]["mean"] == pytest.approx(own)
        assert row["over_best_direct"]["test"]["mean"] == pytest.approx(best)
    assert "test − best direct" in markdown(make_report(config, trials, tmp_path))


def test_figures_of_the_long_tail_are_those_of_rare_relations(tmp_path: Path) -> None:
    base = {"student": {"dim": 8}}
    config = SweepConfig.model_validate({"name": "t", "base": base, "rows": {"a": {}}, "long_tail": True})
    trials = table_trials(config, base, lambda data: data)
    finished(trials[0], tmp_path, 0.5)
    folder = trials[0].folder(tmp_path)
    names = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10")
    rare = {"<1000": dict.fromkeys(names, 0.7), ">=1000": dict.fromkeys(names, 0.2)}
    stage = {"name": "student", "test": dict.fromkeys(names, 0.4), "test_by": {"relation_frequency": rare}}
    report_of({"stages": [stage]}).write(folder)
    report = make_report(config, trials, tmp_path)
    assert report["rows"][0]["test"]["mrr"]["mean"] == 0.7
    assert "Test figures are those of relations with few training triples." in notes(report)
