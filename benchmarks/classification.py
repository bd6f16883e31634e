"""Triple classification on CoDEx-S: hard negatives of the data set, accuracy and calibration before and after.

python benchmarks/classification.py                   # trains a ComplEx of 256 numbers first, three minutes
python benchmarks/classification.py --model FOLDER    # one that is trained on codex-s

Results go to benchmarks/results/classification_codex-s.json.
"""

import gzip
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from foundation import ROOT, save

sys.path.insert(0, str(ROOT))
import distkgd
from distkgd.evaluation.classification import calibration_error

CONFIG, OVERRIDES = "codex-s/scratch_complex", ["mlflow.enabled=false"]


def main(
    model: Annotated[Path | None, typer.Option(help="A finished model of codex-s; default: one is trained.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the files; default: $DISTKGD_DATA/codex-s.")] = None,
    threads: int = 1,
) -> None:
    """Fit to valid and its negatives, judge on test and its negatives."""
    torch.set_num_threads(threads)
    folder = data or Path(os.environ["DISTKGD_DATA"]) / "codex-s"
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            model = distkgd.train(CONFIG, OVERRIDES, out=Path(scratch) / "run", show=True).folder / "stages/student"
        m = distkgd.load(model)
    true, false = ((folder / f"test{kind}.txt.gz") for kind in ("", "_negatives"))
    every = [tuple(line.split("\t")) for path in (true, false) for line in lines_of(path)]
    labels = torch.arange(len(every)) < len(lines_of(true))
    found = {}
    for name, negatives in (("hard", folder / "valid_negatives.txt.gz"), ("drawn", None)):
        judged = m.classify(every, classifier=m.classifier(negatives=negatives))
        found[name] = {
            "accuracy": float((judged.accepted == labels).double().mean()),
            "calibration_error": calibration_error(judged.probabilities, labels),
            "calibration_error_of_sigmoid": calibration_error(judged.scores.sigmoid(), labels),
        }
        print(f"validation negatives {name}: {found[name]}")
    save("classification_codex-s", {"num_triples": len(every), "model": str(m), "validation_negatives": found})


def lines_of(path: Path) -> list[str]:
    """Of a gzip file."""
    return gzip.decompress(path.read_bytes()).decode().splitlines()


if __name__ == "__main__":
    typer.run(main)
