"""Metrics by name; what could not be known has none."""

from collections.abc import Mapping

Metrics = dict[str, float | None]  # None: there was nothing to rank


def known_figures(found: Mapping[str, float | None]) -> dict[str, float]:
    """Those metrics that there are."""
    return {name: value for name, value in found.items() if value is not None}
