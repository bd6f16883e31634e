"""The GPU kernels on a GPU: right first, then how close to the hardware; result in benchmarks/results/gpu.json.

python benchmarks/gpu.py                  # checks, distances, pipeline; under 9 minutes (benchmarks/gpu.sh)
python benchmarks/gpu.py --only distances # some of them
python benchmarks/gpu.py --interpret      # tiny sizes under Triton's interpreter, without a GPU; writes nothing
Exit code 2: no GPU. 1: a kernel is wrong, or a target was missed (the result says which).
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
PARTS = ("checks", "distances", "pipeline")
KINDS = ("dot", "square", "manhattan", "scaled_manhattan", "modulus")
REDUCTIONS = ("logsumexp", "gap", "softplus")
OPTIMISERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
TARGETS = {"distances": 0.60, "pipeline": 300.0}


@dataclass(frozen=True)
class Size:
    """What is measured. copied: numbers copied, for the ceiling."""

    groups: int = 2048
    candidates: int = 64
    rows: int = 1_000_000
    dim: int = 512
    copied: int = 1 << 28
    repeats: int = 9


TINY = Size(3, 5, 11, 8, 1 << 8, 1)


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

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers over √(last size), so that products of rows are of order 1."""
        made = torch.randn(*shape, device=self.device, dtype=torch.float32) * shape[-1] ** -0.5
        return made.to(dtype)

    def say(self, line: str) -> None:
        """A line with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", flush=True)


# -- right ----------------------------------------------------------------------------------------------------------


def checks(bench: Bench) -> dict[str, Any]:
    """Every kernel against the naive formula in float64, on this device."""
    from distkgd.kernels.triton.dualde import How  # noqa: PLC0415
    from tests.kernels.triton import gpu_cases as cases  # noqa: PLC0415

    device, interpreted = str(bench.device), bench.device.type == "cpu"
    todo: list[tuple[Any, ...]] = []
    for kind, shape in product(KINDS, cases.SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            todo.append((cases.distances_are_the_naive_sums, kind, shape, dtype, device))
    for kind in KINDS:
        todo += [(cases.distances_take_narrow_rows, kind, device), (cases.empty_groups_give_empty_sums, kind, device)]
        if kind != "dot":
            todo.append((cases.equal_rows_have_gradient_zero, kind, device))
    todo += [(cases.sums_of_scores_are_those_of_torch, *what, device) for what in product(REDUCTIONS, (3, 64, 2500))]
    todo += [(cases.rows_are_added_up, num, few, device) for num, few in ((300, 1 << 14), (300, 4), (1, 4), (0, 4))]
    segmented = ((3000, 700), (2048, 10**9), (1, 5), (1024, 1))
    todo += [(cases.segments_are_those_of_sorted_numbers, *sizes, device) for sizes in segmented]
    todo += [(cases.updates_are_those_of_the_formula, *what, device) for what in product(OPTIMISERS, (True, False))]
    alone = (
        cases.directions_are_those_of_torch,
        cases.drawn_numbers_are_those_of_the_cpu,
        cases.dualde_shapes_are_those_of_the_formula,
    )
    todo += [(case, device) for case in alone]
    for learning, shaped in product((1, 2), (True, False)):
        for positive, num in ((True, 1), (False, 37), (False, 1500)):
            how = How(positive, learning, 1.5, 0.7, True, False)
            todo.append((cases.dualde_terms_are_those_of_the_formula, how, shaped, num, device))
    wrong = {}
    for case, *arguments in todo[:: 7 if interpreted else 1]:
        name = " ".join((case.__name__, *(str(x) for x in arguments)))
        try:
            case(*arguments)
        except Exception as error:  # whatever a kernel does on a new device, the others are to be heard too
            wrong[name] = f"{type(error).__name__}: {error}"[:300]
            bench.say(f"WRONG {name}: {wrong[name]}")
    bench.say(f"checks: {len(todo)} cases, {len(wrong)} wrong")
    return {"cases": len(todo), "wrong": wrong}


# -- ceilings -------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> dict[str, float]:
    """Copy bandwidth of this device."""
    source = torch.empty(bench.size.copied, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / bench.seconds(partial(target.copy_, source))
    found = {"copy_bytes_per_second": copied}
    bench.say(f"copy {copied / 1e9:.0f} GB/s")
    return found


# -- distances ------------------------------------------------------------------------------------------------------


def distances(bench: Bench, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """One query per group against its own candidates, read through an index: bytes that must move, over time.

    Forward and the queries' gradient read every candidate row from a table larger than any cache. The table's gradient
    is that of looked-up rows, as many as there are (group, candidate) pairs: those that are met are read, all are
    written; the time includes sorting the index.
    """
    out = []
    for kind, dtype in product(KINDS, (torch.float32, torch.bfloat16)):
        out += distances_of(bench, ceiling["copy_bytes_per_second"], kind, dtype)
    return out


def distances_of(bench: Bench, copied: float, kind: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One kind and dtype; copied: bytes per second."""
    from distkgd.kernels.triton import distances as gpu_distances  # noqa: PLC0415
    from tests.kernels.triton.gpu_cases import naive_distances  # noqa: PLC0415

    size, out = bench.size, []
    pairs, shape = size.groups * size.candidates, (size.groups, size.candidates)
    q = bench.normal(size.groups, 1, size.dim * (2 if kind == "scaled_manhattan" else 1), dtype=dtype)
    table, looked_up = (bench.normal(n, size.dim, dtype=dtype) for n in (size.rows, pairs))
    index, places = (torch.randint(n, shape, device=bench.device) for n in (size.rows, pairs))
    grad = torch.randn(size.groups, 1, size.candidates, device=bench.device)
    row = size.dim * q.element_size()
    read = pairs * (row + 8 + 4) + q.nbytes
    used = int(places.unique().numel())
    runs = {
        "forward": (lambda: gpu_distances.forward(kind, q, table, index, size.candidates), read),
        "queries' gradient": (lambda: gpu_distances.query_gradient(kind, q, table, index, grad), read + q.nbytes),
        "table's gradient": (
            lambda: gpu_distances.table_gradient(kind, q, looked_up, places, grad),
            (used + pairs) * row + pairs * (8 + 4) + q.nbytes,
        ),
    }
    for name, (run, moved) in runs.items():
        seconds = bench.seconds(run)
        rate, share = moved / seconds, moved / seconds / copied
        said = {"kind": kind, "dtype": str(dtype), "what": name, "bytes": moved, "seconds": seconds}
        out.append(said | {"bytes_per_second": rate, "share_of_copy": share})
        bench.say(f"{kind} {dtype} {name}: {rate / 1e9:.0f} GB/s, {share:.0%} of copy")

    def plain() -> Any:
        mine, rows = q.detach().requires_grad_(), table[index].reshape(pairs, -1).requires_grad_()
        return torch.autograd.grad(naive_distances(kind, mine, rows, None), (mine, rows), grad.to(dtype))

    out.append({"kind": kind, "dtype": str(dtype), "what": "plain torch, both ways", "seconds": bench.seconds(plain)})
    return out


# -- pipeline -------------------------------------------------------------------------------------------------------

# DualDE's setting of WN18RR: batches of 1024, 64 negatives per triple, Adam, at most 3000 epochs. How it divides these
# among its two stages is not said; here 2000 and 1000.
PIPELINE = (
    "configs/wn18rr/dualde_complex.yaml",
    "device=cuda",
    "baseline=false",
    "mlflow.enabled=false",
    "student.dim=64",
    "teacher.epochs=3000",
    "student.epochs=2000",
    "student.loss={name: softplus}",
    "teacher.loss={name: softplus}",
    "student.distill={stage_two: {start: 2000, epochs: 1000}}",
    *(
        f"{stage}.{key}"
        for stage in ("teacher", "student")
        for key in (
            "batch_size=1024",
            "negatives={kind: triple, num: 64}",
            "optimizer={name: adam, lr: 0.001}",
            "regulariser={name: none}",
            "validate_every=500",
        )
    ),
)
EPOCHS = {"teacher": 3000, "student": 3000}


def pipeline(bench: Bench, out: Path, limit: float) -> dict[str, Any]:
    """DualDE on WN18RR, teacher included; stopped after `limit` seconds, then projected from the epochs it did."""
    command = [sys.executable, str(ROOT / "launch" / "distill.py"), *PIPELINE, "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        code = None
    seconds = time.monotonic() - started
    done = {}
    for stage in EPOCHS:
        metrics = out / "stages" / stage / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        done[stage] = json.loads(lines[-1])["epoch"] if lines else 0
    said: dict[str, Any] = {"command": list(PIPELINE), "epochs_done": done, "epochs": EPOCHS, "seconds": seconds}
    said |= {"finished": code == 0, "exit_code": code}
    epochs = sum(done.values())
    if code is None and epochs:
        # Rough: an epoch of the student costs more than one of the teacher, and start-up is counted in.
        said["projected_seconds"] = seconds * sum(EPOCHS.values()) / epochs
    bench.say(f"pipeline: {json.dumps({key: said[key] for key in said if key != 'command'})}")
    return said


# -- result ---------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit."""
    import triton  # noqa: PLC0415

    from distkgd.common.provenance import git_sha  # noqa: PLC0415

    said: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git_sha(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        said |= {"device": properties.name, "capability": [properties.major, properties.minor]}
        said |= {"memory": properties.total_memory, "cuda": torch.version.cuda}
    return said


def missed(result: dict[str, Any]) -> list[str]:
    """What was wrong or slower than promised."""
    out = [f"wrong: {name}" for name in result.get("checks", {}).get("wrong", {})]
    for row in result.get("distances", []):
        if row.get("share_of_copy", 1.0) < TARGETS["distances"]:
            out.append(f"{row['kind']} {row['dtype']} {row['what']}: {row['share_of_copy']:.0%} of copy bandwidth")
    run = result.get("pipeline")
    if run is not None and not (run["finished"] and run["seconds"] <= TARGETS["pipeline"]):
        out.append(f"pipeline: {run['epochs_done']} of {run['epochs']} epochs in {run['seconds']:.0f} s")
    return out


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--interpret", action="store_true", help="tiny sizes without a GPU; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu", help="run folder of the pipeline")
    parser.add_argument("--budget", type=float, default=510.0, help="seconds for everything together")
    return parser.parse_args()


def main() -> int:
    """Measure what was asked for; the exit code."""
    given = arguments()
    sys.path.insert(0, str(ROOT))
    if given.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at its import.
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    if not given.interpret and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a CUDA GPU, and torch sees none here; --interpret checks tiny sizes without one."
        )
        return 2
    bench = Bench("cpu" if given.interpret else "cuda", TINY if given.interpret else Size())
    result: dict[str, Any] = {"machine": machine(bench.device)}
    bench.say(json.dumps(result["machine"]))

    def keep() -> None:
        result["missed"] = missed(result)
        result["seconds"] = time.monotonic() - bench.began
        if not given.interpret:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if "checks" in given.only:
        result["checks"] = checks(bench)
        keep()
    if "distances" in given.only:
        result["ceilings"] = ceilings(bench)
        result["distances"] = distances(bench, result["ceilings"])
        keep()
    if "pipeline" in given.only and not given.interpret:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        limit = min(TARGETS["pipeline"], given.budget - (time.monotonic() - bench.began) - 25)
        result["pipeline"] = pipeline(bench, given.runs, max(limit, 10.0))
    keep()
    if given.interpret:
        return 1 if result.get("checks", {}).get("wrong") else 0
    for line in result["missed"]:
        bench.say(f"MISSED {line}")
    bench.say(f"written to {given.out}")
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
