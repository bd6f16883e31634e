"""Plans on Ray beside the same plans without: equal figures, stages side by side, links that overlap.

    python benchmarks/cluster.py same       # IterDE and MED on UMLS: Ray and torchrun, 2 ranks, one thread each
    python benchmarks/cluster.py side       # M-DualDE's four teachers on 2 slots, beside one process in a row
    python benchmarks/cluster.py overlap    # IterDE on UMLS with `chain.overlap`, without, and with 2 ranks a link

Each starts afresh in runs/cluster and puts its part into benchmarks/results/cluster.json, with the load of the machine
(the mean number of runnable processes of its last minute, ours among them) before and after every launch.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any

import typer
from foundation import RESULTS, ROOT

from distkgd.common.provenance import machine

OUT = ROOT / "runs" / "cluster"
KEPT = RESULTS / "cluster.json"
COMMON = ["mlflow.enabled=false", "device=cpu", "threads=1"]
SAME = {"iterde": "configs/umls/iterde_complex.yaml", "med": "configs/umls/med_complex.yaml"}
FOUR = "configs/umls/dualde_four_teachers.yaml"
TOLERANCE = 1e-3
app = typer.Typer(help=__doc__)


def launched(name: str, launcher: list[str], *arguments: str) -> dict[str, Any]:
    """A launch into a fresh folder: its report, its wall time in seconds, and the load before and after."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before, began = os.getloadavg()[0], time.monotonic()
    subprocess.run([*launcher, *arguments, *COMMON, "--out", str(folder)], check=True, cwd=ROOT, env=env)
    wall = time.monotonic() - began
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {"report": report, "wall_seconds": round(wall, 1), "load": [round(before, 1), round(os.getloadavg()[0], 1)]}


def chain(workers: int) -> list[str]:
    """launch/chain.py on 2 slots of this machine."""
    return [sys.executable, str(ROOT / "launch/chain.py"), "--address", "local", "--workers", str(workers)]


def torchrun(world: int) -> list[str]:
    """launch/distill.py in that many ranks."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [sys.executable, *(ranks if world > 1 else []), str(ROOT / "launch/distill.py")]


def keep(part: str, content: Any) -> None:
    """Put one part into cluster.json."""
    whole = read() | {part: {"machine": machine(), **content}}
    KEPT.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def read() -> dict[str, Any]:
    """cluster.json, empty where it is not there."""
    return dict(json.loads(KEPT.read_text(encoding="utf-8"))) if KEPT.exists() else {}


def figures(launch: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Stage -> its metrics, split by split."""
    stages = launch["report"]["stages"]
    return {s["name"]: {f"{split}/{k}": v for split in ("valid", "test") for k, v in s[split].items()} for s in stages}


def times(launch: dict[str, Any]) -> dict[str, Any]:
    """How long a launch took, and beside what."""
    return {key: launch[key] for key in ("wall_seconds", "load")}


@app.command()
def same() -> None:
    """Largest difference of any metric of any stage between Ray and torchrun."""
    rows = {}
    for name, config in SAME.items():
        ray, ranks = launched(f"{name}_ray", chain(2), config), launched(f"{name}_torchrun", torchrun(2), config)
        mine, theirs = figures(ray), figures(ranks)
        assert mine.keys() == theirs.keys()
        gaps = {stage: max(abs(mine[stage][key] - theirs[stage][key]) for key in mine[stage]) for stage in mine}
        worlds = sorted({event["world"] for event in ray["report"]["timeline"]})
        about = {"config": config, "world": worlds, "largest_difference": gaps, "within": TOLERANCE}
        mrr = {stage: found["test/mrr"] for stage, found in mine.items()}
        rows[name] = about | {"test_mrr": mrr, "ray": times(ray), "torchrun": times(ranks)}
        print(f"{name}: {len(gaps)} stages, largest difference {max(gaps.values()):.2e}")
        assert worlds == [2] and max(gaps.values()) <= TOLERANCE
        keep("same", rows)


@app.command()
def side(data: Annotated[str, typer.Option(help="Such as umls,codex-s.")] = "umls,codex-s") -> None:
    """Wall time of four teachers, student and direct model: on 2 slots of Ray, and in one process in a row."""
    rows: dict[str, Any] = read().get("side", {}).get("data", {})
    for name in data.split(","):
        given = [FOUR, f"data={name}"]
        ray, alone = launched(f"four_{name}_ray", chain(1), *given), launched(f"four_{name}_alone", torchrun(1), *given)
        events = ray["report"]["timeline"]
        teachers = [e for e in events if e["stage"] not in ("student", "direct")]
        at_once = max(sum(e["started"] <= one["started"] < e["ended"] for e in teachers) for one in teachers)
        zero = min(e["started"] for e in events)
        span, in_a_row = max(e["ended"] for e in events) - zero, sum(e["ended"] - e["started"] for e in events)
        rows[name] = {
            "teachers_at_once": at_once,
            "timeline_seconds": {
                e["stage"]: [round(e["started"] - zero, 1), round(e["ended"] - zero, 1)] for e in events
            },
            "stages_seconds": round(span, 1),
            "sum_of_stages_seconds": round(in_a_row, 1),
            "ray": times(ray),
            "one_process": times(alone),
        }
        keep("side", {"config": FOUR, "data": rows})
        print(
            f"{name}: {at_once} teachers at once; stages {span:.0f} s, one after the other {in_a_row:.0f} s; "
            f"in all {ray['wall_seconds']} s on Ray, {alone['wall_seconds']} s in one process"
        )
        assert at_once >= 2 and span < in_a_row


@app.command()
def overlap(
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    share: Annotated[float, typer.Option(help="chain.overlap.")] = 0.5,
) -> None:
    """Wall time and the last student's MRR of a chain on 2 slots, three ways."""
    arms = {
        "one after the other, 1 rank": (1, 0.0),
        f"overlap {share}, 1 rank": (1, share),
        "one after the other, 2 ranks": (2, 0.0),
    }
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds.split(","):
        for arm, (workers, part) in arms.items():
            more = [f"seed={seed}", f"chain.overlap={part}", "baseline=false"]
            found = launched(f"overlap_{workers}_{part}_{seed}", chain(workers), SAME["iterde"], *more)
            stages = found["report"]["stages"]
            mrr = {s["name"]: {split: s[split]["mrr"] for split in ("valid", "test")} for s in stages}
            early = {s["name"]: s["early_steps"] / s["steps"] for s in stages if "early_steps" in s}
            events = found["report"]["timeline"]
            span = max(e["ended"] for e in events) - min(e["started"] for e in events)
            row = {"seed": int(seed), "mrr": mrr, "early_share": early, "stages_seconds": round(span, 1)}
            runs[arm].append(row | times(found))
            keep("overlap", {"config": SAME["iterde"], "runs": runs})
    for arm, rows in runs.items():
        test = [row["mrr"]["student"]["test"] for row in rows]
        wall = statistics.mean(row["wall_seconds"] for row in rows)
        print(f"{arm}: {wall:.0f} s, test MRR {statistics.mean(test):.4f} ({', '.join(f'{one:.4f}' for one in test)})")


if __name__ == "__main__":
    app()
