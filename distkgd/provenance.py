"""Where numbers come from: the code's commit, the processor, the versions."""

import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def git_sha() -> str:
    """The commit this code is run from, or "unknown" outside a checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
        return out.stdout.strip()
    return "unknown"


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
