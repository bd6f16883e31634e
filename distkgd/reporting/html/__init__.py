"""`report.html`: a finished run as one page that needs nothing but itself."""

from distkgd.reporting.html.drawings import Drawing, drawings
from distkgd.reporting.html.page import keep_measured, remake, render, write_html

__all__ = ["Drawing", "drawings", "keep_measured", "remake", "render", "write_html"]
