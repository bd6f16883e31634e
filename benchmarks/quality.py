"""What negatives shared by a chunk of 64 triples cost in quality: validation MRR beside negatives of each triple's own.

    python benchmarks/quality.py                            # six arms; finished ones are skipped, others resume
    python benchmarks/quality.py --scorer rotate --epochs 30

WN18RR, 64 negatives per triple in both, the regimes of `benchmarks/side_by_side`; within a scorer
everything but `negatives` is equal. Results in benchmarks/results/quality.json; the test split is not read.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from foundation import RESULTS, ROOT, distill, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `benchmarks` is found

from benchmarks.side_by_side.tasks import FULL, REGIMES, SCORERS, stage_of

ARMS = ("triple", "chunk")
CLOSE = 0.005
SAME = ("data", "scorer", "regime", "dim", "epochs", "lr", "seed")  # what makes two arms the same one
CONFIG = {"mlflow": {"enabled": False}, "teacher": None, "baseline": False, "test": False}


def run_arm(arm: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train one arm, or go on with it, and return its row."""
    name = "_".join(str(arm[key]).replace("/", "-") for key in SAME)
    stage = stage_of(arm["scorer"], arm["regime"], FULL) | {"dim": arm["dim"], "epochs": arm["epochs"]}
    # Validating once, after the last epoch: neither arm picks its epoch.
    stage |= {"method": "scratch", "validate_every": arm["epochs"], "checkpoint_every": 5}
    stage |= {"optimizer": {"name": "adagrad", "lr": arm["lr"]}}
    path = out / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "name": name, "data": arm["data"], "seed": arm["seed"], "student": stage}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    (result,) = distill(out / name, str(path)).stages
    found = result.to_json()
    kept = {key: found[key] for key in ("seconds", "steps", "triples_per_second", "valid")}
    return {**arm, "negatives": REGIMES[arm["regime"]], **kept}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair of arms that differ in their negatives alone: MRR of chunk-shared minus that of per-triple ones."""
    found = []
    for chunk in rows:
        equal = [row for row in rows if all(row[key] == chunk[key] for key in SAME if key != "regime")]
        own = [row for row in equal if row["regime"] == "triple"]
        if chunk["regime"] == "chunk" and own:
            gap = chunk["valid"]["mrr"] - own[0]["valid"]["mrr"]
            about = {key: chunk[key] for key in SAME if key != "regime"}
            found.append({**about, "triple": own[0]["valid"]["mrr"], "chunk": chunk["valid"]["mrr"], "gap": gap})
    return found


def main(
    scorer: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all three.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 50,
    dim: Annotated[int, typer.Option(min=2, help="Real numbers per entity.")] = FULL.dim,
    lr: float = 0.1,
    seed: int = 0,
    data: str = "wn18rr",
    out: Path = Path("runs/quality"),
    results: Annotated[str, typer.Option(help="Name of the file in benchmarks/results/.")] = "quality",
) -> None:
    """Train what is not there yet and compare."""
    path = RESULTS / f"{results}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for one in scorer or SCORERS:
        for regime in ARMS:
            arm = {"data": data, "scorer": one, "regime": regime, "dim": dim, "epochs": epochs, "lr": lr, "seed": seed}
            if not any(all(row[key] == arm[key] for key in SAME) for row in rows):
                rows.append(run_arm(arm, ROOT / out))
                save(results, {"pairs": compared(rows), "rows": rows})
    for pair in compared(rows):
        verdict = "equal" if abs(pair["gap"]) <= CLOSE else "better" if pair["gap"] > 0 else "WORSE"
        print(
            f"{pair['scorer']} {pair['dim']}, {pair['epochs']} epochs: per triple {pair['triple']:.4f}, "
            f"chunk-shared {pair['chunk']:.4f} valid MRR ({pair['gap']:+.4f}, {verdict} within {CLOSE})"
        )


if __name__ == "__main__":
    typer.run(main)
