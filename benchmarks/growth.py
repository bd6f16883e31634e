"""CoDEx-S grows by 5% of its entities: a trained model updated, beside the same trained anew on all triples.

python benchmarks/growth.py train --out runs/growth     # the model of before, and the one of all: two trainings
python benchmarks/growth.py update --out runs/growth    # the updates, and what all models know

Results go to benchmarks/results/growth_codex-s.json.
"""

import sys
import time
from pathlib import Path

import torch
import typer
from foundation import ROOT, save

sys.path.insert(0, str(ROOT))
import distkgd
from distkgd.data import Graph, load_graph
from distkgd.data.filters import KnownAnswers
from distkgd.data.growth import drawn_newcomers, holding, write_before
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import metrics, ranks_of
from distkgd.models.model_folder import load_model

SHARE = 0.05
ARMS = ("anchored", "frozen", "free")
CONFIG = "codex-s/scratch_complex"
OVERRIDES = ["mlflow.enabled=false", "report.html=false", "threads=1", "student.validate_every=16"]
app = typer.Typer(help=__doc__)


@app.command()
def train(out: Path = Path("runs/growth"), data: str = "codex-s", seed: int = 0) -> None:
    """The model of before, and the one of all."""
    graph = load_graph(data)
    if not (out / "before_data").exists():
        write_before(graph, drawn_newcomers(graph, SHARE, seed), out / "before_data")
    for name, source in (("all", data), ("before", str(out / "before_data"))):
        distkgd.train(CONFIG, OVERRIDES, data=source, out=out / name, resume=(out / name).exists(), show=True)


def mrr(folder: Path, graph: Graph, here: torch.Tensor) -> float:
    """Filtered, of some of the graph's test triples."""
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    rank = ranks_of(load_model(folder, Ranks()).model, graph.test[here], known, Ranks())
    return float(metrics(rank)["mrr"] or 0.0)


@app.command()
def update(out: Path = Path("runs/growth"), data: str = "codex-s", seed: int = 0) -> None:
    """The update with old rows frozen, anchored and free, and what each of these and the two trainings knows."""
    torch.set_num_threads(1)
    graph = load_graph(data)
    newcomers = drawn_newcomers(graph, SHARE, seed)
    new = holding(graph.test, newcomers)
    took = {}
    for arm in ARMS:
        begun = time.process_time()
        made = out / arm
        distkgd.update(out / "before/stages/student", data, ["report.html=false"], old_rows=arm, out=made, show=True)
        took[f"processor time of {arm}"] = time.process_time() - begun
    for name in ("all", *ARMS):
        took[f"steps of {name}"] = distkgd.Run(out / name).stages["student"].train_seconds or 0.0
    folders = {
        "placed": out / ARMS[0] / "first_rows/student",
        **{one: out / one / "stages/student" for one in (*ARMS, "all")},
    }
    found = {name: {"old": mrr(path, graph, ~new), "new": mrr(path, graph, new)} for name, path in folders.items()}
    before = load_graph(str(out / "before_data"))
    everywhere = torch.ones(len(before.test), dtype=torch.bool)
    found["before, on the graph of before"] = {"old": mrr(out / "before/stages/student", before, everywhere)}
    for name, one in found.items():
        print(name, {kind: round(value, 4) for kind, value in one.items()})
    print({name: round(seconds, 1) for name, seconds in took.items()})
    sizes = {"new_entities": len(newcomers), "old_test_triples": int((~new).sum()), "new_test_triples": int(new.sum())}
    save("growth_codex-s", {"seed": seed, **sizes, "test_mrr": found, "seconds": took})


if __name__ == "__main__":
    app()
