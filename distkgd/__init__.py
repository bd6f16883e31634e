"""Distil large knowledge-graph-embedding models into small ones, sharded over ranks."""

from typing import TYPE_CHECKING, Any

from distkgd.common.version import __version__

if TYPE_CHECKING:
    from distkgd.api import TrainedModel, load

__all__ = ["TrainedModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Not imported with the package: every module of it imports the package first.
    if name in ("TrainedModel", "load"):
        from distkgd import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
