"""Distil large knowledge-graph-embedding models into small ones, sharded over ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distkgd.common.version import __version__

if TYPE_CHECKING:
    from distkgd.evaluation.answers import Answers
    from distkgd.evaluation.trained_model import TrainedModel, load

__all__ = ["Answers", "TrainedModel", "__version__", "load"]

# Not imported with the package: every module of it imports the package first, and torch takes seconds.
_WHERE = {
    "Answers": "distkgd.evaluation.answers",
    "TrainedModel": "distkgd.evaluation.trained_model",
    "load": "distkgd.evaluation.trained_model",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
