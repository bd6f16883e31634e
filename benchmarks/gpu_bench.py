"""What `benchmarks/gpu.py` measures with: sizes, a clock, an eye on the whole."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """What is measured. copied, gemm: numbers copied, and the side of the matrices multiplied, for the ceilings."""

    groups: int = 2048
    candidates: int = 64
    rows: int = 1_000_000
    dim: int = 512
    student_dim: int = 64
    queries: int = 1024
    entities: int = 40_943
    copied: int = 1 << 28
    gemm: int = 8192
    repeats: int = 9


TINY = Size(3, 5, 11, 8, 4, 18, 37, 1 << 8, 32, 1)


class Bench:
    """Where and how long: times functions, keeps an eye on the whole."""

    def __init__(self, device: str, size: Size) -> None:
        self.device = torch.device(device)
        self.size = size
        self.began = time.monotonic()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of some runs after two that do not count (the first one compiles)."""
        found = []
        for turn in range(2 + self.size.repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                torch.cuda.synchronize()
                took = begin.elapsed_time(end) / 1000
            else:
                started = time.perf_counter()
                run()
                took = time.perf_counter() - started
            if turn >= 2:
                found.append(took)
        return statistics.median(found)

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes that `run` needs beyond what is there already."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def normal(self, *shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
        """Normal numbers over √(last size), so that products of rows are of order 1."""
        made = torch.randn(*shape, device=self.device, dtype=torch.float32) * shape[-1] ** -0.5
        return made.to(dtype).requires_grad_(grad)

    def say(self, line: str) -> None:
        """A line with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", flush=True)
