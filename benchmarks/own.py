"""docs/your_own_graph.md as a new user meets it: a file of 100,000 triples, one command, a report.

python benchmarks/own.py                  # a made graph, --to 32: benchmarks/results/own_graph.json
python benchmarks/own.py --threads 1      # the same on one thread: benchmarks/results/own_graph_1_thread.json
python benchmarks/own.py --budget         # the same file and a budget: benchmarks/results/own_budget.json
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from foundation import ROOT, save

sys.path.insert(0, str(ROOT))
from tests.own_graphs import own_triples, write_tsv

ENTITIES, RELATIONS = 12_000, 24


def main(
    triples: int = 100_000,
    threads: int = 2,
    budget: Annotated[
        bool, typer.Option(help="At least 0.9 of the MRR in at most 2 MB and 5 ms, in place of --to 32.")
    ] = False,
    seed: int = 0,
    keep: Annotated[Path | None, typer.Option(help="Where the run stays.")] = None,
) -> None:
    """Wall seconds of the whole command, what it had forecast, and what came out."""
    with tempfile.TemporaryDirectory() as scratch:
        place = keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        file = write_tsv(place / "my_triples.tsv", own_triples(triples, ENTITIES, RELATIONS, seed))
        asked = ["--max-mb", "2", "--max-ms-per-query", "5", "--min-retained", "0.9"] if budget else ["--to", "32"]
        command = [
            sys.executable,
            str(ROOT / "launch" / "distill.py"),
            "--data",
            str(file),
            "--out",
            str(place / "run"),
            *asked,
        ]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        load, begun = os.getloadavg()[0], time.monotonic()
        done = subprocess.run(
            [*command, f"threads={threads}"], cwd=place, env=env, stderr=subprocess.PIPE, text=True, check=False
        )
        seconds = time.monotonic() - begun
        sys.stderr.write(done.stderr)
        if done.returncode not in (0, 3):  # 3: no size meets the budget, which is a result too
            sys.exit(done.returncode)
        report: dict[str, Any] = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    for row in report["stages"]:
        row.pop("test_by", None)
    forecast = re.findall(r"in all about ([^,]+),", done.stderr)
    found = {
        "command": " ".join(["launch/distill.py --data my_triples.tsv", *asked]),
        "triples": triples,
        "threads": threads,
        "exit_code": done.returncode,
        "wall_seconds": seconds,
        "forecast": forecast[0],
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "report": {key: report[key] for key in ("data", "stages", "budget", "remarks") if key in report},
    }
    print(f"{found['command']}: {seconds:.0f} s, forecast {forecast[0]}, load {load:.1f} to {found['load_after']:.1f}")
    save(("own_budget" if budget else "own_graph") + ("" if threads == 2 else f"_{threads}_thread"), found)


if __name__ == "__main__":
    typer.run(main)
