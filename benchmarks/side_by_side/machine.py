"""The peers that are installed, and what a process holds."""

import importlib.metadata
from pathlib import Path

PEERS = ("pykeen", "torchkge")


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def status_bytes(key: str) -> int:
    """One line of /proc/self/status in bytes: VmRSS, what this process holds; VmHWM, the most it has held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM start again at what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
