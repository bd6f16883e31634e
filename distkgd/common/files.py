"""Files and folders that appear, change and vanish in one step."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from distkgd.common.paths import naming

# --- Folders that appear, change and vanish in one step


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder so that no reader sees half of it; what cannot go now is left to `empty_trash`."""
    trash = folder.parent / f".trash-{time.time_ns()}-{folder.name}"
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def empty_trash(parent: Path) -> None:
    """Remove what an interrupted `discard` left."""
    for trash in parent.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def temporary_of(folder: Path) -> Path:
    """Where `folder` is filled before it is published."""
    return folder.parent / f".{folder.name}.tmp"


def replaced_of(folder: Path) -> Path:
    """Where the previous `folder` waits for the instant between two renames."""
    return folder.parent / f".old-{folder.name}"


def restore(folder: Path) -> None:
    """Finish or undo a replacement of `folder` that was cut short."""
    old = replaced_of(folder)
    if old.exists():
        if folder.exists():
            discard(old)
        else:
            os.replace(old, folder)


def publish(temporary: Path, folder: Path) -> None:
    """Rename the temporary folder, its files already durable, to `folder`; an existing one is replaced."""
    old = replaced_of(folder)
    sync(temporary)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    sync(folder.parent)
    if old.exists():
        discard(old)


def begin(folder: Path) -> None:
    """Make an empty temporary folder for `folder` after clearing away what an interrupted writer left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    empty_trash(folder.parent)
    restore(folder)
    if temporary_of(folder).exists():
        discard(temporary_of(folder))
    temporary_of(folder).mkdir()


def abandon(folder: Path) -> None:
    """Drop the temporary folder and put a previous `folder` back; best effort, on the way out of an error."""
    with contextlib.suppress(OSError):
        discard(temporary_of(folder))
    with contextlib.suppress(OSError):
        restore(folder)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: into a temporary neighbour, then one rename. StorageError names the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
