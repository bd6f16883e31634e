"""Where numbers come from: the code's commit, the processor, the versions."""

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from distkgd.common.version import __version__

PACKAGE = Path(__file__).resolve().parent.parent
CODE = ("distkgd", "launch", "benchmarks/*.py", "pyproject.toml")  # of a checkout: what may change a figure
SECONDS = 60.0  # that git may take


@cache
def git_sha() -> str:
    """The commit of the checkout that this package is part of; "version …" where it is installed without one.

    Of a checkout whose code was edited: "COMMIT modified HASH", the same for the same edits alone.
    """
    return version_of(PACKAGE)


def version_of(package: Path) -> str:
    """`git_sha` of the distkgd package in a folder."""
    root = package.parent
    if not _is_checkout(root):
        return f"version {__version__}"
    try:
        if _git(root, "ls-files", "--", f"{package.name}/common/provenance.py") == "":
            return f"version {__version__}"  # lies in a checkout of distkgd that does not know it
        commit = _git(root, "rev-parse", "HEAD").strip()
        edited = sorted(set(_edited(root)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"version {__version__}, commit unknown ({type(error).__name__})"
    return f"{commit} modified {_digest(root, edited)[:12]}" if edited else commit


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


def _is_checkout(root: Path) -> bool:
    # Whether a folder is the top of distkgd's own repository: any other one may have the package in it as well.
    project = root / "pyproject.toml"
    if not (root / ".git").exists() or not project.is_file():
        return False
    return re.search(r'^name *= *"distkgd"', project.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _edited(root: Path) -> Iterator[str]:
    """Files of the code that are changed, staged or not, or gone since the last commit, or new to git."""
    for arguments in (("diff", "--name-only", "-z", "HEAD"), ("ls-files", "--others", "--exclude-standard", "-z")):
        yield from filter(None, _git(root, *arguments, "--", *CODE).split("\0"))


def _digest(root: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        content = path.read_bytes() if path.is_file() else b"gone"
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> str:
    # Hooks of git set variables that would lead it to their repository.
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    found = subprocess.run(
        ["git", *arguments], cwd=root, env=surroundings, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return found.stdout
