"""The GPU kernels on a GPU: right first, then how close to the hardware; result in benchmarks/results/gpu.json.

python benchmarks/gpu.py                  # checks, distances, losses, pipeline; under 9 minutes (benchmarks/gpu.sh)
python benchmarks/gpu.py --only losses    # some of them
python benchmarks/gpu.py --interpret      # tiny sizes under Triton's interpreter, without a GPU; writes nothing
Exit code 2: no GPU. 1: a kernel is wrong, or a target was missed (the result says which).
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_bench import TINY, Bench, Size

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
PARTS = ("checks", "distances", "losses", "pipeline")
KINDS = ("dot", "square", "manhattan", "scaled_manhattan", "modulus")
REDUCTIONS = ("log_sum_exp", "self_adversarial", "kl")
TARGETS = {"distances": 0.60, "losses": 0.50, "pipeline": 300.0}


# -- right ----------------------------------------------------------------------------------------------------------


def checks(bench: Bench) -> dict[str, Any]:
    """Every kernel against the naive formula in float64, on this device."""
    from tests.kernels.triton import gpu_cases as cases  # noqa: PLC0415

    device, interpreted = str(bench.device), bench.device.type == "cpu"
    tile = cases.Tile(16, 16, 16, 4, 2)
    todo: list[tuple[Any, ...]] = []
    for kind, shape in product(KINDS, cases.SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            todo.append((cases.distances_are_the_naive_sums, kind, shape, dtype, device))
    for kind in KINDS:
        todo += [(cases.distances_take_narrow_rows, kind, device), (cases.empty_groups_give_empty_sums, kind, device)]
        if kind != "dot":
            todo.append((cases.equal_rows_have_gradient_zero, kind, device))
    todo.append((cases.a_second_derivative_is_refused, device))
    for kind, which in product(REDUCTIONS, cases.EXCLUSIONS):
        todo.append((cases.losses_are_the_naive_reductions, kind, which, (18, 70, 16, 21), torch.float32, device, tile))
        if not interpreted:
            for dtype in (torch.float32, torch.bfloat16):
                sizes = (200, 1000, 64, 512)
                todo.append((cases.losses_are_the_naive_reductions, kind, which, sizes, dtype, device, None))
    for kind in REDUCTIONS:
        todo.append((cases.a_query_without_candidates_has_gradient_zero, kind, device, tile))
        todo.append((cases.large_scores_do_not_overflow, kind, device, tile))
    todo.append((cases.a_finished_teacher_gets_no_gradient, device, tile))
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
    """Copy bandwidth and matrix rates of this device."""
    source = torch.empty(bench.size.copied, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / bench.seconds(partial(target.copy_, source))
    found = {"copy_bytes_per_second": copied}
    side = bench.size.gemm
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (bench.normal(side, side, dtype=dtype) for _ in range(2))
        found[f"{name}_flops"] = 2 * side**3 / bench.seconds(partial(torch.mm, a, b))
    bench.say(f"copy {copied / 1e9:.0f} GB/s, bf16 {found['bf16_flops'] / 1e12:.0f} TFLOP/s")
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


# -- losses ---------------------------------------------------------------------------------------------------------


def losses(bench: Bench, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """1-vs-all, forward and backward, with a few excluded pairs per query; 6·B·N·d floating-point operations."""
    from distkgd.kernels.triton.losses import Excluded, Tile  # noqa: PLC0415

    size, tiny = bench.size, bench.size is TINY
    hidden = torch.randint(size.entities, (size.queries, 4), device=bench.device)
    owner = torch.arange(size.queries, device=bench.device).unsqueeze(1).expand_as(hidden)
    excluded = Excluded.of(owner.reshape(-1), hidden.reshape(-1), size.queries)
    if tiny:  # the interpreter has no bfloat16 products
        small = Tile(16, 16, 16, 4, 2)
        return [loss_of(bench, ceiling, kind, torch.float32, excluded, small) for kind in REDUCTIONS]
    out = [loss_of(bench, ceiling, kind, torch.bfloat16, excluded, None) for kind in REDUCTIONS]
    out.append(loss_of(bench, ceiling, "log_sum_exp", torch.float32, excluded, None))
    # Other shapes of the same kernel, to choose better ones by.
    for tile in (Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 3)):
        out.append(loss_of(bench, ceiling, "log_sum_exp", torch.bfloat16, excluded, tile))
    out.append(plain_cross_entropy(bench, ceiling))
    return out


def loss_of(
    bench: Bench, ceiling: dict[str, float], kind: str, dtype: torch.dtype, excluded: Any, tile: Any
) -> dict[str, Any]:
    """One reduction; with kl the teacher is finished, so of its three products only the first counts."""
    from distkgd.kernels.triton import losses as gpu_losses  # noqa: PLC0415

    size = bench.size
    q, wide_q = (bench.normal(size.queries, d, dtype=dtype, grad=True) for d in (size.student_dim, size.dim))
    c, wide_c = (bench.normal(size.entities, d, dtype=dtype, grad=True) for d in (size.student_dim, size.dim))
    grad = torch.randn(size.queries, device=bench.device)

    def run() -> Any:
        if kind == "kl":
            found = gpu_losses.kl(q, c, wide_q.detach(), wide_c.detach(), excluded, tile=tile)
            return torch.autograd.grad(found[1] + found[2], (q, c), grad)
        if kind == "log_sum_exp":
            one = gpu_losses.log_sum_exp(wide_q, wide_c, excluded, tile=tile)
        else:
            one = gpu_losses.self_adversarial(wide_q, wide_c, excluded, tile=tile)[0]
        return torch.autograd.grad(one, (wide_q, wide_c), grad)

    numbers = 3 * size.student_dim + size.dim if kind == "kl" else 3 * size.dim
    flops = 2.0 * size.queries * size.entities * numbers
    said: dict[str, Any] = {"kind": kind, "dtype": str(dtype), "tile": None if tile is None else vars(tile)}
    try:
        seconds = bench.seconds(run)
    except Exception as error:  # a shape that this GPU has no room for
        bench.say(f"{kind} {dtype} {tile or ''}: {type(error).__name__}: {error}"[:300])
        return said | {"failed": f"{type(error).__name__}: {error}"[:300]}
    share = flops / seconds / ceiling["bf16_flops" if dtype == torch.bfloat16 else "fp32_flops"]
    gradients = q.nbytes + c.nbytes if kind == "kl" else wide_q.nbytes + wide_c.nbytes
    said |= {"flops": flops, "seconds": seconds, "flops_per_second": flops / seconds, "share_of_gemm": share}
    bench.say(f"{kind} {dtype} {tile or ''}: {flops / seconds / 1e12:.1f} TFLOP/s, {share:.0%} of the GEMM rate")
    return said | {"peak_bytes": bench.peak(run), "gradient_bytes": gradients}


def plain_cross_entropy(bench: Bench, ceiling: dict[str, float]) -> dict[str, Any]:
    """The same with all scores in memory."""
    size, dtype = bench.size, torch.bfloat16
    q = bench.normal(size.queries, size.dim, dtype=dtype, grad=True)
    c = bench.normal(size.entities, size.dim, dtype=dtype, grad=True)

    def run() -> Any:
        return torch.autograd.grad(torch.logsumexp((q @ c.T).float(), -1).sum(), (q, c))

    seconds, flops = bench.seconds(run), 6.0 * size.queries * size.entities * size.dim
    share = flops / seconds / ceiling["bf16_flops"]
    bench.say(f"plain torch: {flops / seconds / 1e12:.1f} TFLOP/s, {share:.0%} of the GEMM rate")
    said = {"kind": "plain torch, log_sum_exp", "dtype": str(dtype), "flops": flops, "seconds": seconds}
    return said | {"share_of_gemm": share, "peak_bytes": bench.peak(run), "gradient_bytes": q.nbytes + c.nbytes}


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
    for row in result.get("losses", []):
        ours = row["kind"] == "log_sum_exp" and row["dtype"] == "torch.bfloat16" and row["tile"] is None
        if ours and row.get("share_of_gemm", 0.0) < TARGETS["losses"]:
            out.append(f"1-vs-all cross-entropy: {row.get('share_of_gemm', 0.0):.0%} of the bf16 rate")
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
    if {"distances", "losses"} & set(given.only):
        result["ceilings"] = ceilings(bench)
    if "distances" in given.only:
        result["distances"] = distances(bench, result["ceilings"])
        keep()
    if "losses" in given.only:
        result["losses"] = losses(bench, result["ceilings"])
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
