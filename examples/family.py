"""The tiny graph of the examples: a family tree of people with the numbers 0, 1, 2, … as text files of triples."""

from collections.abc import Iterable
from pathlib import Path

Triple = tuple[str, str, str]


def triples(people: int) -> list[Triple]:
    """Parents, grandparents and siblings; the children of person n are 2n + 1 and 2n + 2."""
    found = [(f"person{(n - 1) // 2}", "parent_of", f"person{n}") for n in range(1, people)]
    found += [(f"person{((n - 1) // 2 - 1) // 2}", "grandparent_of", f"person{n}") for n in range(3, people)]
    return found + [(f"person{n ^ 1 if n % 2 else n - 1}", "sibling_of", f"person{n}") for n in range(2, people - 1)]


def write(file: Path, rows: Iterable[Triple]) -> Path:
    """One triple a line, with tabs between its words."""
    file.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return file


def folder(at: Path, rows: list[Triple]) -> Path:
    """A data set: every tenth triple in valid.tsv, every tenth in test.tsv, the others in train.tsv."""
    at.mkdir()
    for split, part in (("valid", rows[::10]), ("test", rows[5::10])):
        write(at / f"{split}.tsv", part)
    write(at / "train.tsv", [row for n, row in enumerate(rows) if n % 5])
    return at


# A plan that takes a second: one small model, trained without a teacher. MLflow is left out.
SMALL = {
    "device": "cpu",
    "mlflow": {"enabled": False},
    "report": {"queries": 5},
    "student": {"dim": 16, "epochs": 20, "batch_size": 64, "optimizer": {"name": "adagrad", "lr": 0.3}},
}
