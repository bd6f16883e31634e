"""C++ sources of `cpp/` as loaded libraries: compiled on first use for this very processor, kept on disk.

DISTKGD_KERNELS=off does without them. They are kept in $XDG_CACHE_HOME/distkgd or ~/.cache/distkgd.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch  # first: its OpenMP runtime is the one the libraries resolve their calls to

NAMES = {torch.float32: "float32", torch.float64: "float64"}  # of dtypes in the names of functions
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def wanted() -> bool:
    """Whether compiled kernels, for CPUs or GPUs, are to be used: unless DISTKGD_KERNELS is off."""
    return os.environ.get("DISTKGD_KERNELS", "on").lower() not in ("off", "0", "false", "no")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library made of `name`.cpp, or None where there is no C++ compiler or it was switched off."""
    if not wanted():
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        return None
    source = Path(__file__).parent / "cpp" / f"{name}.cpp"
    made = _folder() / f"{name}-{_digest(source, compiler)}.so"
    if not made.exists():
        _compile(compiler, source, made)
    return ctypes.CDLL(str(made))


def available(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library made of `name`.cpp is there and can work on such tensors: on a CPU, float32 or float64."""
    return device.type == "cpu" and dtype in NAMES and library(name) is not None


def call(name: str, function: str, *arguments: torch.Tensor | float | None) -> None:
    """A function of the library made of `name`.cpp: it takes whole numbers as int64, others as double, and of a tensor,
    which must be contiguous, where it begins."""
    getattr(library(name), function)(*map(_argument, arguments))


def _argument(value: torch.Tensor | float | None) -> Any:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else address(value)


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p | None:
    """Where a contiguous tensor begins, as an argument of a library's function."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise AssertionError("a kernel was given a tensor that is not contiguous")
    return ctypes.c_void_p(tensor.data_ptr())


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distkgd"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _digest(source: Path, compiler: str) -> str:
    # A cache on a shared home serves machines of several kinds.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [source, *sorted(source.parent.glob("*.h"))]
    parts = [
        *(path.read_text(encoding="utf-8") for path in sources),
        " ".join(_FLAGS),
        version,
        *processor,
        torch.__version__,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, made: Path) -> None:
    # One process compiles, those of the same machine that came later wait for it.
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            compiled, linked = Path(folder, "code.o"), Path(folder, "code.so")
            # Linked without an OpenMP runtime: a second one beside torch's would fight it for the cores.
            for command in (
                [compiler, *_FLAGS, "-fopenmp", "-c", str(source), "-o", str(compiled)],
                [compiler, "-shared", str(compiled), "-o", str(linked)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed; DISTKGD_KERNELS=off does without:\n{done.stderr}")
            linked.replace(made)
