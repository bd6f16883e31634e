"""What figures are measured on, and what a process holds."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from distkgd.run_folder import git_sha

PEERS = ("pykeen", "torchkge")


def machine() -> dict[str, Any]:
    """Processor, cores, versions and commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_sha(),
    }


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
