"""A graph of your own, one file of triples, to a small model and the figures of its report.

python examples/own_graph.py        # writes into a temporary folder, and says where
"""

import tempfile
from pathlib import Path

import family

import distkgd

if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="distkgd_"))
    file = family.write(place / "my_triples.tsv", family.triples(127))

    # Split, teacher, student of 16 numbers per entity and the direct model of equal size, all chosen by rules;
    # overrides go over the choice (here: fewer epochs, so that it takes seconds).
    short = ["teacher.epochs=10", "student.epochs=10", "mlflow.enabled=false", "device=cpu"]
    run = distkgd.distill(file, to=16, overrides=short, out=place / "run")

    print(run.table().select("stage", "dim", "bytes_per_entity", "test_mrr"))
    for title, figure in run.figures.items():
        figure.save(place / f"{title.lower().replace(' ', '_').replace('/', '_')}.html")
    print(f"{len(run.figures)} figures and run/report.html are in {place}")
