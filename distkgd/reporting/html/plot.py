"""A plot as HTML: places are shares of its width and height, so the browser lays it out for any screen.

Words stay words (for search and screen readers), and colours are the page's variables, so that a plot follows it into
the dark. Who is who is never told by colour alone: the page's style gives every role a shape and a dash, and a name
stands beside it. No plotting library: a core install has none, and their pictures do neither.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

POINTS = 160  # of a curve at most
LINE = 16  # px between two lines of words
TICKS = 4  # about as many as fit beside each other on a telephone


@dataclass(frozen=True)
class Axis:
    """From numbers to percent of its length. ticks: (value, word)."""

    name: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(100 * (value - low) / ((high - low) or 1.0), 2)


def linear(name: str, values: Sequence[float], room: float = 0.06) -> Axis:
    """An axis with a few round ticks that shows all of the values and a little more."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = low - room * span, high + room * span
    step = nice((high - low) / TICKS)
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(name, low, high, [(value, _tick(value, digits)) for value in ticks])


def _tick(value: float, digits: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 10_000):
            return f"{value / size:g}{unit}"
    return f"{value + 0.0:.{digits}f}".replace("-", "\u2212")


def nice(step: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) nearest to `step` by ratio."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((power * unit for unit in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / step)))


def logarithmic(name: str, values: Sequence[float], word: Callable[[float], str] = "{:g}".format) -> Axis:
    """An axis of equal ratios for positive values, ticked at powers of ten, or at what fills it better."""
    low, high = min(values), max(values)
    room = max(high / low, 1.5) ** 0.1
    low, high = low / room, high * room
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [power for power in powers if low <= power <= high]
    if len(ticks) < 3:
        ticks = [power * unit for power in powers for unit in (1, 2, 5) if low <= power * unit <= high]
    if len(ticks) < 2:
        ticks = [value for value, _ in linear(name, (low, high), room=0.0).ticks]
    every = -(-len(ticks) // (TICKS + 1))
    return Axis(name, low, high, [(value, word(value)) for value in ticks[::every]], log=True)


@dataclass(frozen=True)
class Mark:
    """A shape at a point, in percent; `size` px wide, and its role's. words: shown to a pointer that rests on it."""

    x: float
    y: float
    role: str
    words: str
    size: int = 11


@dataclass(frozen=True)
class Word:
    """Words at a point, in percent. kind: how the page's style places them there. width: percent, at most."""

    x: float
    y: float
    text: str
    kind: str
    width: float = 50.0


@dataclass
class Plot:
    """What is drawn between two axes. title: what it shows, for who cannot see it. height: px, but for more words.

    curves: (path, role). rules: (x, kind) from top to bottom. room: right of it for words, in letters.
    """

    title: str
    x: Axis
    y: Axis
    height: int = 200
    room: int = 0
    curves: list[tuple[str, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    rules: list[tuple[float, str]] = field(default_factory=list)
    kind = "plot"

    def curve(self, points: Sequence[tuple[float, float]], role: str, start: float = 0.0) -> None:
        """A line through points, whose x is counted from `start`."""
        places = [f"{self.x(start + x)} {100 - self.y(y):.2f}" for x, y in thinned(points)]
        self.curves.append(("M" + "L".join(places), role))

    def dots(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Many points of one kind."""
        self.curves.append(("".join(f"M{self.x(x)} {100 - self.y(y):.2f}h0" for x, y in points), kind))

    def mark(self, x: float, y: float, role: str, words: str, size: int = 11) -> None:
        """The shape of a role."""
        self.marks.append(Mark(self.x(x), self.y(y), role, words, size))

    def labels(self, labels: Sequence[tuple[float, float, str, str]]) -> None:
        """(x, y, words, kind) each, moved up or down so that none covers another."""
        self.height = max(self.height, LINE * len(labels))
        gap = 100 * LINE / self.height
        places = apart([self.y(y) for _, y, _, _ in labels], gap / 2, 100 - gap / 2, gap)
        for (x, _, text, kind), place in zip(labels, places, strict=True):
            self.words.append(Word(self.x(x), place, text, f"label {kind}"))


def apart(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Places as near to the wanted ones as may be, none nearer than `gap` to the next, all within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    floor = low
    for i in order:
        found[i] = max(wanted[i], floor)
        floor = found[i] + gap
    ceiling = high
    for i in reversed(order):
        found[i] = min(found[i], ceiling)
        ceiling = found[i] - gap
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` of the points in order: first and last, and the extremes of every run between them."""
    if len(points) <= most:
        return list(points)
    inner, runs = points[1:-1], (most - 2) // 2
    cuts = [i * len(inner) // runs for i in range(runs + 1)]
    chosen = []
    for low, high in pairwise(cuts):
        run = inner[low:high]
        ends = {min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])}
        chosen += sorted(ends)
    return [points[0], *chosen, points[-1]]
