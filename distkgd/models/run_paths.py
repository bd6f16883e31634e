"""Where the models of a run are."""

import hashlib
from pathlib import Path

from distkgd.models.importers import is_foreign
from distkgd.models.remote import is_remote


def imported_folder(run_folder: Path, source: str) -> Path:
    """Where a run keeps the model that LIBRARY:PATH or a URI names."""
    return run_folder / "imported" / hashlib.sha256(source.encode()).hexdigest()[:12]


def is_brought(source: str) -> bool:
    """Whether a teacher is one of those."""
    return is_foreign(source) or is_remote(source)


RESULT = "result.json"  # of a finished stage


def stage_folder(run_folder: Path, name: str) -> Path:
    """Where a stage keeps everything."""
    return run_folder / "stages" / name


def teacher_folder(run_folder: Path, name: str) -> Path:
    """The folder of a teacher: a finished stage of this plan, a path, or what was brought from elsewhere."""
    if is_brought(name):
        return imported_folder(run_folder, name)
    own = stage_folder(run_folder, name)
    return own if (own / "model").is_dir() else Path(name)
