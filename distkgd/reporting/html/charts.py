"""The charts of the report, each drawn for several widths, down to a telephone's. The page shows the one that fits."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distkgd.common.text import fixed, size_text
from distkgd.reporting.html.curves import Curves, Points
from distkgd.reporting.html.svg import GLYPH, LINE, Axis, Drawing, Point, apart, cut, frame, linear, logarithmic

FULL, MIDDLE, HALF, NARROW = 1040, 660, 492, 344  # px
LEFT = 46  # px for the words of a vertical axis


@dataclass(frozen=True)
class Dot:
    """A model in the chart of sizes."""

    name: str
    role: str
    size: float
    mrr: float


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: MRRs by role. note: how much there is of it."""

    name: str
    note: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A stage's curves in a chart of the whole plan. best: (step, value) of its best validation."""

    role: str
    curves: Curves
    best: tuple[float, float] | None = None


def drawn(draw: Callable[[float], Drawing], full: bool = False) -> str:
    """The markup of a chart at every width that it may have: across the page, or in one of two columns."""
    widths = {"wide": FULL, "middle": MIDDLE, "narrow": NARROW} if full else {"half": HALF, "narrow": NARROW}
    return "".join(draw(width).markup(name) for name, width in widths.items())


def sizes(dots: Sequence[Dot], crops: Mapping[str, Sequence[Dot]], split: str, width: float) -> Drawing:
    """MRR against bytes. crops: of each stage that has them, joined by a line."""
    drawing = Drawing(width, 340, f"{split} MRR of every model against the bytes of its files")
    every = [*dots, *(dot for line in crops.values() for dot in line)]
    found = [dot.mrr for dot in every]
    y = linear(min(found), max(found), 340 - 52, 34)
    x = logarithmic(min(d.size for d in every), max(d.size for d in every), LEFT, width - 12, _round_size, room=0.14)
    frame(drawing, x, y, "bytes of the model's files", f"{split} MRR")
    for line in crops.values():
        drawing.curve([(x(dot.size), y(dot.mrr)) for dot in line], line[0].role)
        shown = 0.0
        for dot in line:
            drawing.mark(x(dot.size), y(dot.mrr), dot.role, 3, f"{dot.name}: {size_text(dot.size)}, {fixed(dot.mrr)}")
            if x(dot.size) - shown > 34:
                drawing.text(x(dot.size), y(dot.mrr) + 18, dot.name, "small", "middle")
                shown = x(dot.size)
    for left in (False, True):
        side = [dot for dot in dots if (x(dot.size) > LEFT + 0.6 * (width - LEFT)) == left]
        places = apart([y(dot.mrr) + 4 for dot in side], 40, y.start - 6, LINE + 1)
        for dot, place in zip(side, places, strict=True):
            drawing.mark(x(dot.size), y(dot.mrr), dot.role, 5.5, f"{dot.name}: {size_text(dot.size)}, {fixed(dot.mrr)}")
            at, anchor = (x(dot.size) - 12, "end") if left else (x(dot.size) + 12, "start")
            words = f"{cut(dot.name, 0.5 * width - 6 * GLYPH)} {fixed(dot.mrr)}"
            drawing.text(at, place, words, f"label {dot.role}", anchor)
    return drawing


def _round_size(value: float) -> str:
    return size_text(value).replace(".0 ", " ")


def timeline(
    runs: Sequence[Run], pick: Callable[[Curves], Points], what: str, width: float, *, log: bool = False
) -> Drawing:
    """A curve of every stage, one after the other as planned, with a rule where a stage or phase begins."""
    drawing = Drawing(width, 330, f"{what} over the training steps of every stage")
    values = [value for run in runs for _, value in pick(run.curves)]
    values += [run.best[1] for run in runs if run.best and not log]
    total = sum(run.curves.steps for run in runs)
    if log and min(values) > 0:
        y = logarithmic(min(values), max(values), 330 - 52, 56, lambda value: f"{value:g}", room=0.05)
    else:
        y = linear(min(values), max(values), 330 - 52, 56)
    x = linear(0, max(1, total), LEFT, width - 10, max(2, int(width / 110)), room=0.0)
    frame(drawing, x, y, "training steps, stage after stage", what)
    begun = 0
    for run in runs:
        left, right = x(begun), x(begun + run.curves.steps)
        drawing.line(left, 34, left, y.start, "boundary")
        drawing.text(left + 6, 44, cut(run.curves.stage, right - left - 4), f"label {run.role}")
        for phase in run.curves.phases:
            _phase(drawing, x(begun + phase), (50, y.start), 62, left if width > NARROW else 0.5 * width)
        drawing.curve([(x(begun + step), y(value)) for step, value in pick(run.curves)], run.role)
        if run.best is not None:
            at, high = x(begun + run.best[0]), y(run.best[1])
            drawing.mark(at, high, run.role, 4.5, f"{run.curves.stage}: best {fixed(run.best[1])}")
            over = at > left + 0.5 * (right - left)
            if right - left > 60:
                drawing.text(
                    at - 8 if over else at + 8, high + 18, fixed(run.best[1]), "small", "end" if over else "start"
                )
        begun += run.curves.steps
    return drawing


def _phase(drawing: Drawing, x: float, ends: Point, y: float, right_of: float) -> None:
    # A rule where a method's second phase begins; its words stand on the side that has room.
    drawing.line(x, ends[0], x, ends[1], "phase")
    after = x + 72 < right_of
    drawing.text(x + 5 if after else x - 5, y, "phase two", "small", "start" if after else "end")


def lines(series: Mapping[str, Points], phases: Sequence[int], what: str, width: float) -> Drawing:
    """Curves of one stage over its steps, each with its name at its end."""
    drawing = Drawing(width, 250, f"{what} over training steps")
    values = [value for points in series.values() for _, value in points]
    room = min(0.42 * width, 16 + GLYPH * max(map(len, series)))
    y = linear(min(values), max(values), 250 - 52, 30, 4)
    last = max(step for points in series.values() for step, _ in points)
    x = linear(0, last, LEFT, width - room, max(2, int((width - room) / 90)), room=0.0)
    frame(drawing, x, y, "training steps", what)
    for phase in phases:
        _phase(drawing, x(phase), (18, y.start), 24, 0.5 * width)
    places = apart([y(points[-1][1]) + 4 for points in series.values()], 30, y.start, LINE)
    for i, ((name, points), place) in enumerate(zip(series.items(), places, strict=True)):
        drawing.curve([(x(step), y(value)) for step, value in points], f"series{i % 4 + 1}")
        drawing.text(x.end + 8, place, cut(name, room - 8), f"label series{i % 4 + 1}")
    return drawing


def bars(rows: Sequence[Bar], roles: Sequence[str], names: Mapping[str, str], width: float) -> Drawing:
    """MRR by row: a broad pale bar of the first role, a slim dark one of the second within it, a tick of the third."""
    high, top = (46, 40) if width <= NARROW else (30, 40)
    left = 0 if width <= NARROW else 172
    drawing = Drawing(width, top + high * len(rows) + 22, f"MRR of {', '.join(names[role] for role in roles)}")
    x = Axis(0.0, 1.0, left, width - 84, [(0.0, "0"), (0.5, "0.5"), (1.0, "1")])
    bottom = top + high * len(rows)
    for value, word in x.ticks:
        drawing.line(x(value), top - 8, x(value), bottom, "grid")
        drawing.text(x(value), bottom + 16, word, "tick", "start" if value == 0 else "middle")
    at = 0.0
    for role, shape in zip(roles, _SHAPES, strict=False):
        shape(drawing, at, at + 18, 12, role)
        drawing.text(at + 24, 16, cut(names[role], 90), f"label {role}")
        at += 40 + GLYPH * len(cut(names[role], 90))
    for i, row in enumerate(rows):
        middle = top + high * i + (32 if left == 0 else 12)
        words = cut(row.name, (width - 90 if left == 0 else left - 10) - GLYPH * (len(row.note) + 2))
        drawing.text(0, middle - 13 if left == 0 else middle + 4, words, "word")
        drawing.text(
            left - 10 if left else width - 84, middle - 13 if left == 0 else middle + 4, row.note, "small", "end"
        )
        for role, shape in zip(roles, _SHAPES, strict=False):
            if role in row.values:
                shape(drawing, x(0.0), x(row.values[role]), middle, role)
        said = " \u2192 ".join(f"{row.values[role]:.2f}".removeprefix("0") for role in roles[:2] if role in row.values)
        drawing.text(width, middle + 4, said, "small", "end")
    return drawing


def _broad(drawing: Drawing, x1: float, x2: float, y: float, role: str) -> None:
    drawing.add("rect", x=x1, y=y - 8.0, width=max(1.0, x2 - x1), height=16.0, class_=f"pale {role}")


def _slim(drawing: Drawing, x1: float, x2: float, y: float, role: str) -> None:
    drawing.add("rect", x=x1, y=y - 3.5, width=max(1.0, x2 - x1), height=7.0, class_=f"mark {role}")


def _tick(drawing: Drawing, x1: float, x2: float, y: float, role: str) -> None:
    drawing.line(x2, y - 10, x2, y + 10, f"rule {role}")


_SHAPES = (_broad, _slim, _tick)


def scatter(points: Sequence[Sequence[float]], names: tuple[str, str], width: float) -> Drawing:
    """Scores of two models for the same triples: [teacher, student, 1 for a true triple or 0] each."""
    high = min(width, 400) + 40
    drawing = Drawing(width, high, f"Scores of {names[1]} against those of {names[0]}")
    across, up = ([point[i] for point in points] for i in (0, 1))
    x = linear(min(across), max(across), LEFT, width - 10, 4)
    y = linear(min(up), max(up), high - 52, 56)
    frame(drawing, x, y, f"score by {cut(names[0], 150)}", f"score by {cut(names[1], 200)}")
    drawing.mark(LEFT + 6, 34, "student", 3.5)
    drawing.text(LEFT + 16, 38, "true triple", "label student")
    drawing.add("path", d=_cross(LEFT + 110, 34), class_="cross")
    drawing.text(LEFT + 120, 38, "one end replaced at random", "small")
    places = [(x(a), y(b), kind) for a, b, kind in points]
    drawing.add("path", d="".join(_cross(a, b) for a, b, kind in places if not kind), class_="cross")
    drawing.add("path", d="".join(f"M{a:.0f} {b:.0f}h0" for a, b, kind in places if kind), class_="dots")
    return drawing


RANKS = ((1, "1"), (3, "2\u20133"), (10, "4\u201310"), (100, "11\u2013100"), (math.inf, "over 100"))


def matrix(ranks: Sequence[Sequence[float]], names: tuple[str, str], width: float) -> Drawing:
    """How many queries have which rank of their answer by one model (rows) and by the other: [first, second] each."""
    left, top, side = 66.0, 64.0, (min(width, 400) - 76) / len(RANKS)
    drawing = Drawing(width, top + side * len(RANKS) + 8, f"Ranks of true answers by {names[0]} and by {names[1]}")
    drawing.text(0, 12, f"rank by {cut(names[0], 150)}, downwards; by {cut(names[1], 150)}, across", "name")
    counts: Counter[tuple[int, int]] = Counter((_bucket(a), _bucket(b)) for a, b in ranks)
    most = max(counts.values(), default=1)
    for i, (_, word) in enumerate(RANKS):
        drawing.text(left + side * (i + 0.5), top - 10, word, "tick", "middle")
        drawing.text(left - 10, top + side * (i + 0.5) + 4, word, "tick", "end")
        for k in range(len(RANKS)):
            class_ = "cell same" if i == k else "cell"
            drawing.add("rect", x=left + side * k, y=top + side * i, width=side, height=side, class_=class_)
    for (row, column), count in sorted(counts.items()):
        x, y, r = left + side * (column + 0.5), top + side * (row + 0.5), 0.46 * side * math.sqrt(count / most)
        role = "direct" if column > row else "student"
        drawing.add("circle", cx=x, cy=y, r=max(2.0, r), class_=f"bubble {role}")
        inside = 2 * r > GLYPH * len(str(count)) + 6
        drawing.text(
            x if inside else x + r + 4,
            y + 4,
            f"{count}",
            "inside" if inside else "small",
            "middle" if inside else "start",
        )
    return drawing


def _bucket(rank: float) -> int:
    return next(i for i, (last, _) in enumerate(RANKS) if rank <= last)


def _cross(x: float, y: float) -> str:
    return f"M{x - 2.5:.0f} {y - 2.5:.0f}l5 5m0-5l-5 5"
