"""Charts as inline SVG: a frame with two axes, marks and words in it. No script, no picture from elsewhere.

Own lines rather than a plotting library: a core install has none, words stay words (for search and screen readers), and
colours are the page's variables, so that a chart follows it into the dark. Who is who is never told by colour alone:
every role has a shape and a dash of its own, and a name beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

FONT = 12  # px, of words in a chart
LINE = 15  # px between two of them
GLYPH = 7.0  # px, about the width of a letter
DASHES = {"direct": "6 4", "assistant": "2 3", "series2": "6 4", "series3": "2 3", "series4": "9 3 2 3"}

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """From numbers to pixels. ticks: (value, word)."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)


@dataclass
class Drawing:
    """A picture of `width` x `height` px that grows element by element. title: what it shows, for who cannot see it."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, inner: str = "", **attributes: object) -> None:
        """One element. inner: of markup; class_ and the like lose their underscore."""
        said = "".join(f' {k.rstrip("_").replace("_", "-")}="{_attribute(v)}"' for k, v in attributes.items())
        self.parts.append(f"<{tag}{said}>{inner}</{tag}>" if inner else f"<{tag}{said}/>")

    def text(self, x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> None:
        """Words whose baseline is at y."""
        if words:
            self.add("text", escape(words), x=x, y=y, class_=class_, text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        """A straight one."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def curve(self, points: Sequence[Point], role: str) -> None:
        """A line through points in px, dashed as its role is."""
        if len(points) > 1:
            path = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
            dash = {"stroke_dasharray": DASHES[role]} if role in DASHES else {}
            self.add("path", d=path, class_=f"curve {role}", **dash)

    def mark(self, x: float, y: float, role: str, size: float = 5.0, words: str = "") -> None:
        """The shape of a role: a square teaches, a disc learns, a triangle is direct, a diamond stands between."""
        inner = f"<title>{escape(words)}</title>" if words else ""
        s = size
        match role:
            case "teacher":
                self.add("rect", inner, x=x - s, y=y - s, width=2 * s, height=2 * s, class_=f"mark {role}")
            case "direct":
                path = (
                    f"M{_number(x)} {_number(y - 1.2 * s)}l{_number(1.2 * s)} {_number(2.1 * s)}h{_number(-2.4 * s)}z"
                )
                self.add("path", inner, d=path, class_=f"mark {role}")
            case "assistant":
                r = 1.25 * s
                path = f"M{_number(x)} {_number(y - r)}l{_number(r)} {_number(r)}l{_number(-r)} {_number(r)}"
                self.add("path", inner, d=f"{path}l{_number(-r)} {_number(-r)}z", class_=f"mark {role}")
            case _:
                self.add("circle", inner, cx=x, cy=y, r=1.1 * s, class_=f"mark {role}")

    def markup(self, class_: str) -> str:
        """The whole as an element."""
        w, h = _number(self.width), _number(self.height)
        return (
            f'<svg class="{class_}" role="img" aria-label="{escape(self.title)}" width="{w}" height="{h}" '
            f'viewBox="0 0 {w} {h}">{"".join(self.parts)}</svg>'
        )


def _attribute(value: object) -> str:
    return _number(value) if isinstance(value, float) else escape(str(value))


def _number(value: float) -> str:
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def linear(low: float, high: float, start: float, end: float, number: int = 5, room: float = 0.06) -> Axis:
    """An axis with about `number` round ticks that shows all of [low, high] and a little more."""
    span = (high - low) or abs(high) or 1.0
    low, high = low - room * span, high + room * span
    step = nice((high - low) / max(1, number))
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, high, start, end, [(value, _tick(value, digits)) for value in values])


def _tick(value: float, digits: int) -> str:
    if abs(value) >= 10_000:
        for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{unit}"
    return f"{value + 0.0:.{digits}f}".replace("-", "\u2212")


def nice(step: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) nearest to `step` by ratio."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((power * unit for unit in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / step)))


def logarithmic(
    low: float, high: float, start: float, end: float, word: Callable[[float], str], room: float = 0.08
) -> Axis:
    """An axis of equal ratios, ticked at powers of ten, and at 2 and 5 times them where there are few of those."""
    ratio = max(high / low, 1.5)
    low, high = low / ratio**room, high * ratio**room
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [power for power in powers if low <= power <= high]
    if len(ticks) < 3:
        ticks = [power * unit for power in powers for unit in (1, 2, 5) if low <= power * unit <= high]
    ticks = ticks or [low, high]
    while len(ticks) > max(2, abs(end - start) / 62):
        ticks = ticks[::2]
    return Axis(low, high, start, end, [(value, word(value)) for value in ticks], log=True)


def frame(drawing: Drawing, x: Axis, y: Axis, x_title: str = "", y_title: str = "") -> None:
    """Horizontal rules at the ticks of y, words at those of both, what they are in their corners."""
    for value, word in y.ticks:
        drawing.line(x.start, y(value), x.end, y(value), "grid")
        drawing.text(x.start - 8, y(value) + 4, word, "tick", "end")
    drawing.line(x.start, y.start, x.end, y.start, "axis")
    for value, word in x.ticks:
        drawing.text(x(value), y.start + 18, word, "tick", "middle")
        drawing.line(x(value), y.start, x(value), y.start + 4, "axis")
    if y_title:
        drawing.text(0, 12, y_title, "name")
    if x_title:
        drawing.text(x.end, y.start + 36, x_title, "name", "end")


def apart(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
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


def cut(words: str, width: float) -> str:
    """As many letters as fit into `width` px."""
    most = max(2, int(width / GLYPH))
    return words if len(words) <= most else words[: most - 1] + "\u2026"
