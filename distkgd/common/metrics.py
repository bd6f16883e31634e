"""Metrics by name; what could not be known has none."""

from collections.abc import Mapping

Metrics = dict[str, float | None]  # None: there was nothing to rank


def known_figures(found: Mapping[str, float | None]) -> dict[str, float]:
    """Those metrics that there are."""
    return {name: value for name, value in found.items() if value is not None}


def crop_metric(dim: int, bits: int | None = None) -> str:
    """Name of the MRR of a model's first `dim` numbers per entity, in a width of theirs where widths are nested."""
    return f"mrr_{dim}" if bits is None else f"mrr_{dim}_{bits}bit"
