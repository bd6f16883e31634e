"""Metrics by name; what could not be known has none."""

from collections.abc import Mapping

Metrics = dict[str, float | None]  # None: there was nothing to rank


def known_figures(found: Mapping[str, float | None]) -> dict[str, float]:
    """Those metrics that there are."""
    return {name: value for name, value in found.items() if value is not None}


def crop_metric(dim: int, bits: int | None = None, what: str = "mrr") -> str:
    """Name of a figure of a model's first `dim` numbers per entity, or of so many bits of each."""
    return f"{what}_{dim}" if bits is None else f"{what}_{dim}_{bits}bit"
