"""Scales, ticks, thinning, and marks where the numbers are."""

import math
from itertools import pairwise

import pytest

from distkgd.reporting.html.charts import Bar, Dot, Run, bars, lines, matrix, scatter, sizes, timeline
from distkgd.reporting.html.curves import Curves, read_curves, thinned
from distkgd.reporting.html.svg import GLYPH, Drawing, apart, cut, linear, logarithmic, nice
from tests.reporting.html.pages import Node, read


def drawn(drawing: Drawing) -> Node:
    return read(drawing.markup("wide"))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.401, 0.467), (-3.0, 12.0), (5.0, 5.0), (0.0, 0.0), (0, 9e6)])
def test_a_linear_axis_holds_its_range_and_has_a_few_round_ticks(low: float, high: float) -> None:
    axis = linear(low, high, 300, 20)
    assert 20 <= axis(high) <= axis(low) <= 300
    assert 2 <= len(axis.ticks) <= 12
    values = [value for value, _ in axis.ticks]
    assert values == sorted(values) and len({word for _, word in axis.ticks}) == len(values)
    assert all(axis.low - 1e-6 <= value <= axis.high + 1e-6 for value in values)


@pytest.mark.parametrize(("low", "high"), [(1e3, 1e9), (5e6, 8.4e7), (100.0, 101.0), (7.0, 7.0), (0.002, 5.0)])
def test_a_logarithmic_axis_holds_its_range(low: float, high: float) -> None:
    axis = logarithmic(low, high, 40, 500, str)
    assert 40 <= axis(low) <= axis(high) <= 500 and axis.ticks
    assert axis(math.sqrt(low * high)) == pytest.approx((axis(low) + axis(high)) / 2)


def test_round_steps() -> None:
    assert [nice(x) for x in (0.011, 1.0, 1.2, 3.0, 70.0)] == pytest.approx([0.01, 1.0, 1.0, 2.0, 50.0])


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    found = apart([50.0, 52.0, 10.0, 51.0], 0.0, 200.0, 15.0)
    order = sorted(found)
    assert all(b - a >= 15 for a, b in pairwise(order))
    assert sorted(range(4), key=lambda i: found[i]) == [2, 0, 3, 1]
    assert max(apart([99.0, 99.0, 99.0], 0.0, 100.0, 15.0)) <= 100
    assert cut("abcdefgh", 5 * GLYPH) == "abcd…" and cut("abc", 100) == "abc"


def test_thinned_curves_keep_ends_and_extremes() -> None:
    points = [(float(i), math.sin(i / 7)) for i in range(5000)]
    points[2500] = (2500.0, 9.0)
    found = thinned(points, 100)
    assert len(found) <= 100 and (found[0], found[-1]) == (points[0], points[-1])
    assert [p[0] for p in found] == sorted(p[0] for p in found) and (2500.0, 9.0) in found
    assert thinned(points[:100], 100) == points[:100]


def test_a_mark_stands_where_its_numbers_are() -> None:
    dots = [Dot("big", "teacher", 1e8, 0.5), Dot("small", "student", 1e6, 0.4), Dot("alone", "direct", 1e6, 0.3)]
    svg = drawn(sizes(dots, {}, "test", 800))
    (square,), (disc,) = svg.find("rect", class_="teacher"), svg.find("circle", class_="student")
    assert float(square.attributes["x"]) > float(disc.attributes["cx"]) + 200
    assert float(square.attributes["y"]) < float(disc.attributes["cy"])
    assert {"big 0.500", "small 0.400", "alone 0.300"} <= {text.text for text in svg.find("text")}
    assert len(svg.find("path", class_="direct")) == 1  # roles differ by shape, not by colour alone


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("one", "9", {"teacher": 0.8, "student": 0.4}), Bar("two", "3", {"student": 0.0})]
    svg = drawn(bars(rows, ["teacher", "student"], {"teacher": "T", "student": "S"}, 492))
    broad, slim = (float(svg.find("rect", class_=c)[1].attributes["width"]) for c in ("teacher", "student"))
    assert broad == pytest.approx(2 * slim, rel=0.01)
    assert "0.80" not in svg.text and ".80 → .40" in svg.text


def test_stages_follow_each_other_with_a_rule_between() -> None:
    one = Curves("first", 100, valid=[(50, 0.1), (100, 0.3)])
    two = Curves("second", 50, valid=[(25, 0.2), (50, 0.4)], phases=[25])
    svg = drawn(timeline([Run("teacher", one), Run("student", two, (50, 0.4))], lambda c: c.valid, "valid MRR", 1040))
    first, second = (float(line.attributes["x1"]) for line in svg.find("line", class_="boundary"))
    (phase,) = (float(line.attributes["x1"]) for line in svg.find("line", class_="phase"))
    assert (phase - second) / (second - first) == pytest.approx(0.25, rel=0.01)
    assert "0.400" in svg.text


def test_every_line_has_its_name_and_a_dash_of_its_own() -> None:
    series = {f"s{i}": [(0.0, float(i)), (10.0, float(i))] for i in range(4)}
    svg = drawn(lines(series, [], "what", 492))
    assert {f"s{i}" for i in range(4)} <= {text.text for text in svg.find("text", class_="label")}
    assert len({path.attributes.get("stroke-dasharray", "") for path in svg.find("path", class_="curve")}) == 4


def test_true_and_random_triples_have_other_marks() -> None:
    svg = drawn(scatter([[1.0, 2.0, 1], [0.0, 0.5, 0], [0.5, 1.0, 0]], ("T", "S"), 492))
    assert svg.find("path", class_="dots")[0].attributes["d"].count("M") == 1
    assert svg.find("path", class_="cross")[-1].attributes["d"].count("M") == 2


def test_a_stage_without_metrics_has_no_curves(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = read_curves(tmp_path_factory.mktemp("none") / "metrics.jsonl", "x")
    assert (found.steps, found.valid, found.loss) == (0, [], [])


def test_ranks_are_counted_by_both_models() -> None:
    svg = drawn(matrix([[1.0, 1.0], [1.0, 1.0], [1.0, 1.5], [2.0, 500.0], [40.0, 1.0]], ("T", "S"), 492))
    bubbles = svg.find("circle", class_="bubble")
    assert len(bubbles) == 4 and len(svg.find("circle", class_="direct")) == 2  # those on which the student is behind
    radii = sorted(float(bubble.attributes["r"]) for bubble in bubbles)
    assert radii[-1] == pytest.approx(math.sqrt(2) * radii[0], rel=0.02)
    counts = [t.text for c in ("inside", "small") for t in svg.find("text", class_=c)]
    assert sorted(counts) == ["1", "1", "1", "2"]
