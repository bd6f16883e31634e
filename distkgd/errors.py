"""The errors a user can meet. Each message says what was given, what is allowed and what to change.

    DistkgdError (ValueError)
    ├── ConfigError       a config file or an override
    ├── DataError         a data set: its files, its lines, its name, its checksum
    ├── ModelError        a model folder
    ├── CheckpointError   a checkpoint that is missing, damaged or from another run
    ├── StorageError      a URI that cannot be read or written, or a file that cannot be written
    ├── UnsupportedError  two things that are right alone and cannot be combined
    ├── DivergedError     a loss term or a trained table that became NaN or Inf
    └── RendezvousError   ranks that have not found each other, or lost one

`Stopped` is no error: it carries a signal's number out of the loop after the checkpoint was written.
"""


class DistkgdError(ValueError):
    """Base of all errors meant for the user; launchers print the message without a traceback."""


class ConfigError(DistkgdError):
    """A config file or override that cannot be used."""


class DataError(DistkgdError):
    """A data set that cannot be read."""


class ModelError(DistkgdError):
    """A model folder that cannot be read."""


class CheckpointError(DistkgdError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class StorageError(DistkgdError):
    """A URI that cannot be read or written, or a file that cannot be written."""


class UnsupportedError(DistkgdError):
    """A combination of options that has no meaning or no implementation."""


class DivergedError(DistkgdError):
    """A loss term or a trained table that became NaN or Inf; the message names it and what to change."""


class RendezvousError(DistkgdError):
    """Ranks that were started did not find each other, or have lost one; each rank knows only its own part of it."""


class Stopped(Exception):  # noqa: N818 - it is not an error
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved what it needs to go on."""

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f"Stopped {where}; add --resume to the same command to go on.")
        self.signal_number = signal_number


def shorten(text: str, length: int = 80) -> str:
    """The beginning of a long text."""
    return text if len(text) <= length else text[: length - 1] + "…"
