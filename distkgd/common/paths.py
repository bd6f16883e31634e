"""Paths that users give: as text or as a path, and places that must be writable before any work is done for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distkgd.errors import ConfigError, StorageError

AnyPath = str | os.PathLike[str]
LONGEST_NAME = 200  # bytes; temporary neighbours have longer names, and file systems end at 255
LONGEST_PATH = 3800  # bytes; what lies below has longer ones, and systems end at 4096


def check_name(name: str) -> str:
    """`name`, which becomes that of a folder; ValueError where it is none, or would lie elsewhere."""
    if name.strip() in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(f"{name[:60]!r} names no folder; use letters, digits, _, - and . without / or \\")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ValueError(f"{name[:20]!r}… is too long; use at most {LONGEST_NAME} bytes")
    return name


def check_folder(path: AnyPath, flag: str = "--out") -> Path:
    """`path`, where a folder is or can be made and written into; ConfigError where not. Nothing is left there."""
    return _tried(Path(path), Path(path), flag)


def check_file(path: AnyPath, flag: str = "--json") -> Path:
    """`path`, where a file can be written; ConfigError where not. Nothing is left there."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ConfigError(f"{flag} {path} is a folder; name a file.")
        if path.exists() and not path.is_file():  # a file would be put in its place, of /dev/null for instance
            raise ConfigError(f"{flag} {path} is a device or pipe; name a file.")
    except OSError:
        pass  # too long, or below a folder that may not be looked into: told below
    return _tried(path, path.parent, flag)


def _tried(path: Path, folder: Path, flag: str) -> Path:
    made: list[Path] = []
    try:
        absolute = os.path.abspath(path)
        if len(os.fsencode(absolute)) > LONGEST_PATH or len(os.fsencode(path.name)) > LONGEST_NAME:
            raise ConfigError(f"{flag} {str(path)[:60]}… is too long; choose a shorter one.")
        made = make_folder(folder)
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        at = "" if error.filename in (None, str(path)) else f": {error.filename}"
        raise ConfigError(
            f"{flag} {path} cannot be written ({error.strerror or error}{at}); choose another place."
        ) from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{flag} {path!r} is no path: {error}.") from None
    finally:
        unmake(made)
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """StorageError that names `path` from what goes wrong in writing it, on a full disk for instance."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error


def make_folder(folder: Path) -> list[Path]:
    """Make a folder with all above it; those that were made, it first. Nothing is left of them after an OSError."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        unmake(made)
        raise
    return made


def unmake(folders: list[Path]) -> None:
    """Remove what `make_folder` has made, as far as it is empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return  # it holds something by now
