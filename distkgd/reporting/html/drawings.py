"""The charts of a run's page one by one, for notebooks and files."""

import html
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from distkgd.common.files import write_atomic
from distkgd.common.paths import AnyPath
from distkgd.reporting.html.figures import Figure, Section, parts_section, training_section
from distkgd.reporting.html.frontier import frontier_section
from distkgd.reporting.html.page import page_of
from distkgd.reporting.html.pairs import pair_of
from distkgd.reporting.run_report import RunReport

HEIGHT = 520  # pixels of a chart in a notebook


@dataclass(frozen=True)
class Drawing:
    """A chart that a notebook shows where it is the last word of a cell. page: it as a page by itself, in HTML.

    caption: what it shows. header, rows: its numbers as texts, where there are any.
    """

    title: str
    caption: str
    page: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def save(self, path: AnyPath) -> None:
        """Write it as a page of HTML that needs nothing but itself."""
        write_atomic(Path(path), self.page)

    def table(self) -> pl.DataFrame:
        """Its numbers, as they are written in the page."""
        return pl.DataFrame(self.rows, schema=dict.fromkeys(self.header, pl.String), orient="row")

    def __repr__(self) -> str:
        return f"Drawing({self.title!r})"

    def _repr_html_(self) -> str:
        # In a frame, so that the page's style stays with it.
        source = html.escape(self.page, quote=True)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: {HEIGHT}px; border: 0"></iframe>'


def drawings(report: RunReport, folder: Path) -> dict[str, Drawing]:
    """The charts of a finished run in `folder`, by their titles: the frontier, learning curves, what each method has,
    and metrics in parts."""
    pair = pair_of(report, folder)
    found: dict[str, Drawing] = {}
    for section in (frontier_section(report), training_section(report, folder), parts_section(report, pair)):
        for figure in section.figures:
            title, number = figure.title, 2
            while title in found:  # of several stages
                title, number = f"{figure.title} ({number})", number + 1
            found[title] = _drawing(report, section, figure)
    return found


def _drawing(report: RunReport, section: Section, figure: Figure) -> Drawing:
    page = page_of(report, Section(section.id, section.title, [figure]))
    return Drawing(figure.title, figure.caption, page, tuple(figure.header), tuple(tuple(row) for row in figure.rows))
