"""What is told to a tracker of runs; and one that does nothing."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final

from distkgd.tracking.serving.entries import Entry

Status = Literal["FINISHED", "FAILED", "KILLED"]
Params = Mapping[str, Any]
Tags = Mapping[str, str]
Metrics = Mapping[str, float]
NO_METRICS: Metrics = MappingProxyType({})


class StageTracking(ABC):
    """One stage's run."""

    @abstractmethod
    def log(self, metrics: Metrics, step: int) -> None:
        """Add one point per metric to the curves; buffered, NaN and Inf are allowed."""

    @abstractmethod
    def checkpoint(self, path: Path, step: int, sha256: str) -> None:
        """Note a kept checkpoint; a store that is not on this machine also gets its files."""

    @abstractmethod
    def finish(self, status: Status, model_folder: Path | None, metrics: Metrics = NO_METRICS) -> None:
        """Send what is buffered, the model and the final metrics (at the last step), and close the run."""


class Tracking(ABC):
    """A plan's run."""

    @abstractmethod
    def start(self, params: Params, tags: Tags, dataset: Params) -> None:
        """Create the parent run, or reopen the one this run folder already has.

        `dataset` has name, sha256, num_entities, num_relations, num_train, num_valid and num_test.
        Raises ConfigError when the store cannot be used.
        """

    @abstractmethod
    def attach(self, dataset: Params) -> None:
        """In place of `start`: the parent run is one that another process has started and will finish.

        Where the store cannot be reached there is a warning, and the stages go untracked.
        """

    @abstractmethod
    def stage(self, name: str, params: Params, tags: Tags, title: str | None = None) -> StageTracking:
        """Create or reopen the child run of one stage, which is shown as `title`, default: its name."""

    @abstractmethod
    def register(self, entries: Sequence[Entry], name: str, max_mb: float | None) -> list[str]:
        """Put finished models into the registry (`distkgd.tracking.serving.registry`), and say what became of each."""

    @abstractmethod
    def log(self, metrics: Metrics) -> None:
        """Figures of the plan as a whole, into the parent run."""

    @abstractmethod
    def finish(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Close the parent run, and with the same status every stage that is still open."""


@final
class NoStageTracking(StageTracking):
    """Does nothing."""

    def log(self, metrics: Metrics, step: int) -> None:
        pass

    def checkpoint(self, path: Path, step: int, sha256: str) -> None:
        pass

    def finish(self, status: Status, model_folder: Path | None, metrics: Metrics = NO_METRICS) -> None:
        pass


@final
class NoTracking(Tracking):
    """Does nothing: tracking is off, mlflow is missing, or this is not the first rank."""

    def start(self, params: Params, tags: Tags, dataset: Params) -> None:
        pass

    def attach(self, dataset: Params) -> None:
        pass

    def stage(self, name: str, params: Params, tags: Tags, title: str | None = None) -> StageTracking:
        return NoStageTracking()

    def register(self, entries: Sequence[Entry], name: str, max_mb: float | None) -> list[str]:
        return []

    def log(self, metrics: Metrics) -> None:
        pass

    def finish(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        pass
