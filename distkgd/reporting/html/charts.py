"""The charts of the report, each of the numbers that it shows; `page.html.j2` has a macro for each `kind`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distkgd.common.text import fixed, size_text
from distkgd.reporting.html.curves import Curves, Points
from distkgd.reporting.html.plot import Plot, Word, linear, logarithmic

LETTERS = 18  # of a name beside the end of a curve


@dataclass(frozen=True)
class Dot:
    """A model on the frontier. size: bytes of its tables per entity. short: its name below a small mark; default: the
    whole name."""

    name: str
    role: str
    size: float
    mrr: float
    short: str = ""

    @property
    def words(self) -> str:
        """Shown to a pointer that rests on it."""
        return f"{self.name}: {self.size:,.1f} bytes per entity, {fixed(self.mrr)}"


def frontier(dots: Sequence[Dot], lines: Sequence[Sequence[Dot]], published: Sequence[Dot], split: str) -> Plot:
    """MRR against table bytes per entity. lines: smaller forms of one model each (crops, fewer bits), joined by a line.

    published: of papers; their role is "record".
    """
    every = [*dots, *published, *(dot for line in lines for dot in line)]
    x = logarithmic("table bytes per entity", [dot.size for dot in every], _round_size)
    y = linear(f"{split} MRR", [dot.mrr for dot in every])
    plot = Plot(f"{split} MRR of every model against its table bytes per entity", x, y, 300 if published else 260)
    for line in lines:
        plot.curve([(dot.size, dot.mrr) for dot in line], line[0].role)
        last = -math.inf
        for dot in line:
            plot.mark(dot.size, dot.mrr, dot.role, dot.words, size=7)
            if x(dot.size) - last > 12:  # percent: room for a number on a telephone
                plot.words.append(Word(x(dot.size), y(dot.mrr), dot.short or dot.name, "below"))
                last = x(dot.size)
    for dot in (*published, *dots):
        plot.mark(dot.size, dot.mrr, dot.role, dot.words)
    named = [*dots, *published]
    sides = ["left" if x(dot.size) > 60 else "right" for dot in named]
    # The figure first: of words without room the end is cut.
    plot.labels(
        [
            (dot.size, dot.mrr, f"{fixed(dot.mrr)} {dot.name}", f"{side} {dot.role}")
            for dot, side in zip(named, sides, strict=True)
        ]
    )
    return plot


def _round_size(value: float) -> str:
    return size_text(value).replace(".0 ", " ")


@dataclass(frozen=True)
class Run:
    """A stage's curve in a plot of the whole plan. best: (step, value) of its best validation."""

    role: str
    curves: Curves
    points: Points
    best: tuple[float, float] | None = None


def timeline(runs: Sequence[Run], what: str, *, log: bool = False) -> Plot:
    """A curve of every stage, one after the other as planned, with a rule where a stage or phase begins."""
    values = [value for run in runs for _, value in [*run.points, *([run.best] if run.best else [])]]
    y = logarithmic(what, values) if log and min(values) > 0 else linear(what, values)
    total = max(1, sum(run.curves.steps for run in runs))
    x = linear("training steps, stage after stage", (0, total), room=0.0)
    plot = Plot(f"{what} over the training steps of every stage", x, y, 240)
    begun = 0
    for run in runs:
        name, end = run.curves.stage, begun + run.curves.steps
        plot.rules.append((x(begun), "stage"))
        plot.curve(run.points, run.role, start=begun)
        if run.best is not None:
            name = f"{name}, best {fixed(run.best[1])}"
            plot.mark(begun + run.best[0], run.best[1], run.role, f"{run.curves.stage}: best {fixed(run.best[1])}")
        plot.words.append(Word(x(begun), 100, name, f"stage {run.role}", x(end) - x(begun)))
        phases(plot, [begun + phase for phase in run.curves.phases], end)
        begun = end
    return plot


def phases(plot: Plot, steps: Sequence[float], end: float) -> None:
    """A rule where a method's second phase begins, and words behind it as far as there is room until `end`."""
    for step in steps:
        plot.rules.append((plot.x(step), "phase"))
        plot.words.append(Word(plot.x(step), 100, "phase two", "phase", plot.x(end) - plot.x(step)))


def lines(series: Mapping[str, Points], begun: Sequence[float], what: str) -> Plot:
    """Curves of one stage over its steps, each with its name at its end. begun: the steps at which a phase began."""
    last = max(step for points in series.values() for step, _ in points)
    x = linear("training steps", (0, last), room=0.0)
    y = linear(what, [value for points in series.values() for _, value in points])
    plot = Plot(f"{what} over training steps", x, y, 190, room=min(LETTERS, max(map(len, series))))
    phases(plot, begun, last)
    for i, points in enumerate(series.values()):
        plot.curve(points, f"series{i % 4 + 1}")
    ends = enumerate(series.items())
    plot.labels([(last, points[-1][1], name, f"end series{i % 4 + 1}") for i, (name, points) in ends])
    return plot


def scatter(points: Sequence[Sequence[float]], names: tuple[str, str]) -> Plot:
    """Scores of two models for the same triples: [teacher, student, 1 for a true triple or 0] each."""
    x, y = (linear(f"score by {name}", [point[i] for point in points]) for i, name in enumerate(names))
    plot = Plot(f"Scores of {names[1]} against those of {names[0]}", x, y, 340)
    for true, kind, words in ((1, "true", "true triple"), (0, "random", "one end replaced at random")):
        plot.dots([(a, b) for a, b, one in points if one == true], kind)
        plot.words.append(Word(0, 100, words, f"legend {kind}", 100))
    return plot


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: MRRs by role. count: how much there is of it, None: it is not counted."""

    name: str
    count: float | None
    values: Mapping[str, float]

    @property
    def note(self) -> str:
        """The count in words."""
        return "" if self.count is None else f"{self.count:,.0f}"


@dataclass(frozen=True)
class Bars:
    """MRRs by row: a broad pale bar of the first role, a slim dark one of the second within it, a tick of the third.

    names: of each role.
    """

    rows: Sequence[Bar]
    names: Mapping[str, str]
    shapes = ("broad", "slim", "tick")
    kind = "bars"

    def change(self, row: Bar) -> str:
        """From the first role's MRR to the second's."""
        both = [row.values[role] for role in list(self.names)[:2] if role in row.values]
        return " \u2192 ".join(f"{mrr:.2f}".removeprefix("0") for mrr in both)


RANKS = ((1, "1"), (3, "2\u20133"), (10, "4\u201310"), (100, "11\u2013100"), (math.inf, "> 100"))


class Matrix:
    """How many queries have which rank of their answer by one model (rows) and by the other (columns)."""

    kind = "matrix"
    words = tuple(word for _, word in RANKS)

    def __init__(self, ranks: Sequence[Sequence[float]], names: tuple[str, str]) -> None:
        """ranks: [first, second] each."""
        self.names = names
        self.counts = Counter((_bucket(a), _bucket(b)) for a, b in ranks)

    def size(self, row: int, column: int) -> float:
        """Width of a cell's disc, in percent of it: its area tells the count."""
        return 92 * math.sqrt(self.counts[row, column] / max(self.counts.values()))


def _bucket(rank: float) -> int:
    return next(i for i, (last, _) in enumerate(RANKS) if rank <= last)


Chart = Plot | Bars | Matrix
