"""Distil large knowledge-graph-embedding models into small ones, sharded over ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distkgd.common.version import __version__

if TYPE_CHECKING:
    from distkgd.evaluation.answers import Answers
    from distkgd.evaluation.trained_model import TrainedModel, load
    from distkgd.pipeline.autoconfig.program import distill, train
    from distkgd.pipeline.autoconfig.update import update
    from distkgd.pipeline.finished_run import Run

__all__ = ["Answers", "Run", "TrainedModel", "__version__", "distill", "load", "train", "update"]

# Not imported with the package: every module of it imports the package first, and torch takes seconds.
_WHERE = {
    "Answers": "distkgd.evaluation.answers",
    "Run": "distkgd.pipeline.finished_run",
    "TrainedModel": "distkgd.evaluation.trained_model",
    "distill": "distkgd.pipeline.autoconfig.program",
    "load": "distkgd.evaluation.trained_model",
    "train": "distkgd.pipeline.autoconfig.program",
    "update": "distkgd.pipeline.autoconfig.update",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
