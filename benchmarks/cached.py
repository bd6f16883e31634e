"""What soft labels in files save: BKD students of 32 numbers of a teacher of 512 on WN18RR, live and from files.

python -m benchmarks.cached TEACHER [--k 64] [--kind batch] [--seeds 3]    # benchmarks/results/cached_labels.json
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import distkgd
from benchmarks.foundation import save
from distkgd.evaluation.soft_labels import write_labels

CONFIG = Path(__file__).resolve().parent.parent / "configs/wn18rr/bkd_complex.yaml"


def tree_of(teacher: str | None, labels: str | None, seed: int, kind: str) -> dict[str, Any]:
    """The config's student, of a live teacher or of labels."""
    student = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["student"]
    student["distill"] |= {"labels": labels} if labels else {}
    student["negatives"] = student["negatives"] | {"kind": kind}
    return {"data": "wn18rr", "seed": seed, "threads": 1, "teacher": teacher, "student": student}


def main(
    teacher: Annotated[Path, typer.Argument(help="Folder of a finished ComplEx of 512 numbers on WN18RR.")],
    k: int = 64,
    kind: str = "batch",
    seeds: int = 3,
) -> None:
    """Seconds of training and test MRR of both, the runs of a seed one after the other."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="distkgd-") as scratch:
        begun = time.perf_counter()
        write_labels([teacher], Path(scratch) / "labels", k=k)
        writing = time.perf_counter() - begun
        for seed in range(seeds):
            row: dict[str, Any] = {"seed": seed}
            for name, given in (("live", (str(teacher), None)), ("cached", (None, f"{scratch}/labels"))):
                out = Path(scratch) / f"{name}{seed}"
                distkgd.train(tree_of(*given, seed, kind), out=out)
                result = json.loads((out / "stages/student/result.json").read_text(encoding="utf-8"))
                row[name] = {"seconds": result["train_seconds"], "mrr": result["test"]["mrr"]}
            rows.append(row)
            print(row, flush=True)
    share = statistics.median(row["cached"]["seconds"] / row["live"]["seconds"] for row in rows)
    gain = statistics.mean(row["cached"]["mrr"] - row["live"]["mrr"] for row in rows)
    print(f"labels written in {writing:.0f} s; {share:.2f} of the live teacher's seconds, MRR {gain:+.4f}")
    save("cached_labels", {"k": k, "kind": kind, "writing": writing, "share": share, "gain": gain, "runs": rows})


if __name__ == "__main__":
    typer.run(main)
