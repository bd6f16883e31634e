"""The foundation's figures, each by one command; results in benchmarks/results/, with the machine and versions.

    python benchmarks/foundation.py demo       # the demo's plan on seeds 0, 1, 2
    python benchmarks/foundation.py wn18rr     # teacher, DualDE, BKD and direct at 32 numbers per entity
    python benchmarks/foundation.py reading    # WN18RR and 10 M generated triples
    python benchmarks/foundation.py quoted     # one file of 1 M triples, as TSV and as CSV with all fields in quotes
    python benchmarks/foundation.py start      # `import distkgd` and `distkgd --help`, in fresh processes
All of them resume: finished stages are not trained again.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `benchmarks` is found

from benchmarks.side_by_side.data import write_triples
from benchmarks.side_by_side.machine import status_bytes
from distkgd.common.provenance import machine
from distkgd.data import Graph, load_graph
from distkgd.data.filters import KnownAnswers, both_sides
from distkgd.data.split import split_file
from distkgd.evaluation.ranking import metrics
from distkgd.kernels.build import library
from distkgd.reporting.run_report import RunReport, read_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = ("name", "method", "scorer", "dim", "bytes", "seconds", "steps", "triples_per_second", "valid", "test")
app = typer.Typer(help=__doc__)


def distill(folder: Path, *arguments: str) -> RunReport:
    """The report of one launch into `folder`."""
    command = [sys.executable, str(ROOT / "launch" / "distill.py"), *arguments, "--out", str(folder), "--resume"]
    subprocess.run(command, check=True, cwd=ROOT)
    return read_report(folder)


def brief(report: RunReport) -> dict[str, Any]:
    """A report without its breakdowns."""
    stages = [{key: value for key, value in stage.to_json().items() if key in KEPT} for stage in report.trained]
    return {"data": report.data.to_json(), "protocol": report.protocol, "seed": report.seed, "stages": stages}


def save(name: str, content: dict[str, Any]) -> None:
    """benchmarks/results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")


@app.command()
def demo(seeds: str = "0,1,2", out: Path = Path("runs/demo_seeds")) -> None:
    """Student and direct model of the demo on several seeds."""
    runs = []
    for seed in seeds.split(","):
        started = time.monotonic()
        report = distill(out / seed, f"seed={seed}", "mlflow.enabled=false")
        runs.append(brief(report) | {"wall_seconds": time.monotonic() - started})
        save("demo_seeds", {"frequency_baseline": frequency_baseline(load_graph("pystdlib")), "runs": runs})
    for run in runs:
        found = {stage["name"]: stage for stage in run["stages"]}
        gaps = [found["student"][s]["mrr"] - found["direct"][s]["mrr"] for s in ("valid", "test")]
        print(f"seed {run['seed']}: student - direct {gaps[0]:+.4f} valid MRR, {gaps[1]:+.4f} test MRR")


def frequency_baseline(graph: Graph) -> dict[str, float]:
    """Test metrics of ranking entities by how often training has them at that end of that relation."""
    queries, seen = both_sides(graph.test), both_sides(graph.train)
    kinds = 2 * graph.num_relations
    counts = torch.zeros(kinds * graph.num_entities, dtype=torch.float64)
    cell = (2 * seen.relation + seen.side) * graph.num_entities + seen.answer
    scores = counts.index_add_(0, cell, torch.ones(len(cell), dtype=torch.float64)).reshape(kinds, -1)
    scores = scores[2 * queries.relation + queries.side]
    own = scores.gather(1, queries.answer.unsqueeze(1))
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    query, entity = known.pairs(queries)
    scores[query, entity] = -1.0
    better, equal = (scores > own).sum(1), (scores == own).sum(1)
    return metrics(1.0 + better + 0.5 * equal)


@app.command()
def wn18rr(out: Path = Path("runs/wn18rr")) -> None:
    """The paper's comparison at 32 real numbers per entity, one teacher for both methods."""
    first = distill(out / "dualde", "configs/wn18rr/dualde_complex.yaml", "mlflow.enabled=false")
    teacher = out / "dualde" / "stages" / "teacher"
    options = (f"teacher={teacher}", "baseline=false", "mlflow.enabled=false")
    second = distill(out / "bkd", "configs/wn18rr/bkd_complex.yaml", *options)
    content = brief(first)
    content["stages"] += [stage | {"name": "student (bkd)"} for stage in brief(second)["stages"]]
    content["seconds"] = sum(stage["seconds"] for stage in content["stages"])
    save("wn18rr_complex32", content)


@app.command()
def reading(triples: int = 10_000_000, entities: int = 2_000_000) -> None:
    """Seconds and peak memory of reading WN18RR and a generated folder, each in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "generated"
        write_triples(folder, triples, entities)
        found = {source: read_in_process(source) for source in ("wn18rr", str(folder))}
    content = {"wn18rr": found["wn18rr"], f"{triples} triples": found[str(folder)]}
    save("reading", content)
    print(json.dumps(content, indent=2))


@app.command()
def quoted(triples: int = 1_000_000, entities: int = 300_000) -> None:
    """Seconds and peak memory of one file between TABs and in quotes between commas, each in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        plain = write_triples(Path(name), triples, entities)
        wrapped = plain.with_name("quoted.csv")
        with plain.open(encoding="utf-8") as rows, wrapped.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(row.rstrip("\n").split("\t") for row in rows)
        found = {"tsv": read_in_process(str(plain)), "quoted csv": read_in_process(str(wrapped))}
    ratio = {key: found["quoted csv"][key] / found["tsv"][key] for key in found["tsv"]}
    content = {f"{triples} triples": found | {"ratio": ratio}}
    save("reading_quoted", content)
    print(json.dumps(content, indent=2))


@app.command()
def start(rounds: int = 9) -> None:
    """Median seconds of whole processes, the interpreter's own start among them; bars: .1 and .5."""
    commands = {"import distkgd": ["-c", "import distkgd"], "distkgd --help": ["-m", "distkgd", "--help"]}
    content = {name: median_seconds([sys.executable, *rest], rounds) for name, rest in commands.items()}
    save("start", {"rounds": rounds, **content})
    print(json.dumps(content, indent=2))


def median_seconds(command: list[str], rounds: int) -> float:
    """Of the wall seconds of a command, after one round that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        started = time.monotonic()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        taken.append(time.monotonic() - started)
    return statistics.median(taken[1:])


def read_in_process(source: str) -> dict[str, float]:
    """{"seconds", "cpu_seconds", "peak_gb"} of reading a data set, or of splitting one file, in a fresh process."""
    command = [sys.executable, __file__, "read-one", source]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@app.command(hidden=True)
def read_one(source: str) -> None:
    """Load one data set and print what it took."""
    library("names")  # compiled once per machine, not once per reading
    started, worked = time.monotonic(), time.process_time()
    if Path(source).is_file():
        split_file(Path(source), "file")
    else:
        load_graph(source)
    took = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
    # VmHWM, not ru_maxrss: that one starts at the size of the process that forked us.
    print(json.dumps(took | {"peak_gb": status_bytes("VmHWM") / 2**30}))


if __name__ == "__main__":
    app()
