"""Scales, ticks, thinning, and marks where the numbers are."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from distkgd.reporting.html import plot as module
from distkgd.reporting.html.charts import Bar, Bars, Dot, Matrix, Run, frontier, lines, scatter, timeline
from distkgd.reporting.html.curves import Curves, read_curves
from distkgd.reporting.html.figures import method_figures
from distkgd.reporting.html.plot import LINE, Plot, apart, linear, logarithmic, nice, thinned
from tests.records import STAGE, report_of

RANGES = [(0.0, 1.0), (0.401, 0.467), (-3.0, 12.0), (5.0, 5.0), (0.0, 0.0), (0, 9e6)]


def words(plot: Plot, kind: str) -> dict[str, tuple[float, float]]:
    """Text -> its place, of the words of a kind."""
    return {word.text: (word.x, word.y) for word in plot.words if kind in word.kind.split()}


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_linear_axis_holds_its_range_and_has_a_few_round_ticks(low: float, high: float) -> None:
    axis = linear("x", (low, high))
    assert 0 <= axis(low) <= axis(high) <= 100
    assert 2 <= len(axis.ticks) <= 9
    values = [value for value, _ in axis.ticks]
    assert values == sorted(values) and len({word for _, word in axis.ticks}) == len(values)
    assert all(-1e-6 <= axis(value) <= 100 + 1e-6 for value in values)


@pytest.mark.parametrize(("low", "high"), [(1e3, 1e9), (5e6, 8.4e7), (100.0, 101.0), (7.0, 7.0), (0.002, 5.0)])
def test_a_logarithmic_axis_holds_its_range(low: float, high: float) -> None:
    axis = logarithmic("x", (low, high))
    assert 0 <= axis(low) <= axis(high) <= 100 and 2 <= len(axis.ticks) <= 9
    assert axis(math.sqrt(low * high)) == pytest.approx((axis(low) + axis(high)) / 2, abs=0.02)


def test_round_steps() -> None:
    assert [nice(x) for x in (0.011, 1.0, 1.2, 3.0, 70.0)] == pytest.approx([0.01, 1.0, 1.0, 2.0, 50.0])


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    found = apart([50.0, 52.0, 10.0, 51.0], 0.0, 200.0, 15.0)
    order = sorted(found)
    assert all(b - a >= 15 for a, b in pairwise(order))
    assert sorted(range(4), key=lambda i: found[i]) == [2, 0, 3, 1]
    assert max(apart([99.0, 99.0, 99.0], 0.0, 100.0, 15.0)) <= 100


def test_a_plot_is_as_high_as_its_labels_need() -> None:
    plot = frontier([Dot(f"m{i}", "student", 1e6, 0.3) for i in range(30)], [], [], "test")
    places = sorted(y for _, y in words(plot, "label").values())
    assert len(places) == 30 and places[0] >= 0 and places[-1] <= 100
    assert all((b - a) * plot.height / 100 >= LINE - 1e-6 for a, b in pairwise(places))


def test_thinned_curves_keep_ends_and_extremes() -> None:
    points = [(float(i), math.sin(i / 7)) for i in range(5000)]
    points[2500] = (2500.0, 9.0)
    found = thinned(points, 100)
    assert len(found) <= 100 and (found[0], found[-1]) == (points[0], points[-1])
    assert [p[0] for p in found] == sorted(p[0] for p in found) and (2500.0, 9.0) in found
    assert thinned(points[:100], 100) == points[:100]


def test_a_mark_stands_where_its_numbers_are() -> None:
    dots = [Dot("big", "teacher", 1e8, 0.5), Dot("small", "student", 1e6, 0.4), Dot("alone", "direct", 1e6, 0.3)]
    published = [Dot("RotX 8", "record", 1e7, 0.6)]
    plot = frontier(dots, [[Dot("8", "student", 1e5, 0.2), Dot("16", "student", 1e6, 0.4)]], published, "test")
    places = {mark.words.partition(":")[0]: mark for mark in plot.marks}
    assert places["big"].x > places["small"].x + 25 and places["small"].x == places["alone"].x == places["16"].x
    assert places["big"].x > places["RotX 8"].x > places["small"].x and places["RotX 8"].y > places["big"].y
    assert places["RotX 8"].words == "RotX 8: 10,000,000.0 bytes per entity, 0.600"
    assert places["big"].y > places["small"].y > places["alone"].y > places["8"].y
    assert words(plot, "label").keys() == {
        "0.500 big",
        "0.400 small",
        "0.300 alone",
        "0.600 RotX 8",
    }  # a long name's end is cut
    assert words(plot, "below")["8"] == (places["8"].x, places["8"].y)
    assert {mark.role for mark in plot.marks} == {"teacher", "student", "direct", "record"}


def test_bars_are_told_from_the_first_role_to_the_second() -> None:
    rows = [Bar("one", 9.0, {"teacher": 0.8, "student": 0.4, "direct": 0.1}), Bar("two", 3.0, {"student": 0.0})]
    bars = Bars(rows, {"teacher": "T", "student": "S", "direct": "D"})
    assert [bars.change(row) for row in rows] == [".80 → .40", ".00"]


def test_stages_follow_each_other_with_a_rule_between() -> None:
    one = Curves("first", 100, {"valid/mrr": [(50, 0.1), (100, 0.3)]})
    two = Curves("second", 50, {"valid/mrr": [(25, 0.2), (50, 0.4)], "phase": [(20, 1.0), (25, 2.0), (30, 2.0)]})
    runs = [Run(role, c, c.of("valid/mrr")) for role, c in (("teacher", one), ("student", two))]
    plot = timeline([runs[0], Run("student", two, runs[1].points, (50, 0.4))], "valid MRR")
    first, second, phase = (at for at, _ in plot.rules)
    assert [kind for _, kind in plot.rules] == ["stage", "stage", "phase"]
    assert (phase - second) / (second - first) == pytest.approx(0.2, rel=0.01)
    assert list(words(plot, "stage")) == ["first", "second, best 0.400"] and plot.marks[0].x == 100


def test_every_line_has_its_name_and_a_dash_of_its_own() -> None:
    drawn = lines({f"s{i}": [(0.0, float(i)), (10.0, float(i))] for i in range(4)}, [], "what")
    assert words(drawn, "label").keys() == {f"s{i}" for i in range(4)}
    kinds = [kind for _, kind in drawn.curves]
    style = Path(module.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    dashes = [style.partition(f"path.{kind} ")[2].partition("}")[0].partition("dasharray:")[2] for kind in kinds]
    assert dashes[0] == "" and len(set(dashes)) == 4


def test_evaluators_of_every_teacher_are_drawn() -> None:
    series = {
        f"evaluator/{kind}_{i}": [(0.0, 1.0), (9.0, float(i))] for kind in ("alpha", "beta") for i in range(1, 11)
    }
    found = {
        one.title: one.chart for one in method_figures(report_of({"stages": [STAGE]}).stages[0], Curves("x", 9, series))
    }
    plot = found["Evaluators' slopes α of student"]
    assert isinstance(plot, Plot) and list(words(plot, "label")) == [
        "α1 student, true", "α2 student, false", "α3 teacher, true", "α4 teacher, false", "α5 teacher 2, true",
        "α6 teacher 2, false", "α7 teacher 3, true", "α8 teacher 3, false", "α9 teacher 4, true",
        "α10 teacher 4, false",
    ]  # fmt: skip
    assert len(plot.curves) == 10 and "Evaluators' offsets β of student" in found


def test_true_and_random_triples_have_other_marks() -> None:
    plot = scatter([[1.0, 2.0, 1], [0.0, 0.5, 0], [0.5, 1.0, 0]], ("T", "S"))
    assert {kind: path.count("M") for path, kind in plot.curves} == {"true": 1, "random": 2}
    assert words(plot, "legend").keys() == {"true triple", "one end replaced at random"}


def test_a_stage_without_metrics_has_no_curves(tmp_path: Path) -> None:
    found = read_curves(tmp_path / "metrics.jsonl", "x")
    assert (found.steps, found.of("valid/mrr"), found.kind("mask"), found.phases) == (0, [], {}, [])


def test_ranks_are_counted_by_both_models() -> None:
    found = Matrix([[1.0, 1.0], [1.0, 1.0], [1.0, 1.5], [2.0, 500.0], [40.0, 1.0]], ("T", "S"))
    assert found.counts == {(0, 0): 2, (0, 1): 1, (1, 4): 1, (3, 0): 1}
    assert found.size(0, 0) == pytest.approx(math.sqrt(2) * found.size(1, 4)) and found.size(0, 0) < 100
