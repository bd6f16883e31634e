"""A Parquet file of questions answered into one, beside the bare scorer on the same questions as ids.

python benchmarks/questions.py        # ComplEx of 256 numbers, 10,000 questions: benchmarks/results/questions.json
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
import typer
from foundation import ROOT, save

sys.path.insert(0, str(ROOT))
import distkgd
from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import Queries
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.prediction import top_k
from distkgd.evaluation.questions_file import answer_file
from distkgd.evaluation.trained_model import QUESTIONS_AT_ONCE
from distkgd.models.model import new_model
from distkgd.models.model_folder import load_model, save_model
from distkgd.scorers import build_scorer

RELATIONS = 42


def made(folder: Path, entities: int, dim: int) -> Path:
    """A model folder of that size; its rows are random."""
    names = [
        Vocabulary(pl.Series([f"{kind}{i:07d}" for i in range(n)])) for kind, n in (("Q", entities), ("P", RELATIONS))
    ]
    none = torch.empty(0, 3, dtype=torch.int64)
    graph = Graph("made", none, none, none, *names, "0" * 64, ())
    model = new_model(build_scorer("complex", dim), entities, RELATIONS, Ranks(), reciprocal=True, seed=0)
    save_model(folder, model, graph, {})
    return folder


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median of some rounds, after one that is not counted: processor time, as other work may be going on."""
    work()
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def measured(scratch: Path, entities: int, number: int, dim: int, rounds: int) -> dict[str, float]:
    """Seconds of the bare scorer and of the file, and the share of the first in the second."""
    folder = made(scratch / "model", entities, dim)
    model, bare = distkgd.load(folder), load_model(folder, Ranks()).model
    generator = torch.Generator().manual_seed(0)
    heads, relations = (torch.randint(n, (number,), generator=generator) for n in (entities, RELATIONS))
    names = model.entities.names.gather(heads.numpy()), model.relations.names.gather(relations.numpy())
    asked = scratch / "asked.parquet"
    pl.DataFrame({"head": names[0], "relation": names[1]}).write_parquet(asked)
    queries = Queries(heads, relations, torch.zeros_like(heads), heads)

    def score() -> None:
        for at in torch.arange(number).split(QUESTIONS_AT_ONCE):
            top_k(bare, Queries(*(column[at] for column in queries)), 10)

    scorer, file = (
        seconds(work, rounds) for work in (score, lambda: answer_file(model, asked, scratch / "answers.parquet"))
    )
    return {"scorer": scorer, "file": file, "share": scorer / file}


def main(number: int = 10_000, dim: int = 256, rounds: int = 3) -> None:
    """One thread; of as many entities as CoDEx-S and FB15k-237 have."""
    torch.set_num_threads(1)
    found = {}
    for entities in (2034, 14_541):
        with tempfile.TemporaryDirectory() as scratch:
            found[entities] = took = measured(Path(scratch), entities, number, dim, rounds)
        told = f"scorer {took['scorer']:.2f} s, file {took['file']:.2f} s"
        print(f"{entities:,} entities: {told}; {took['share']:.2f} of the scorer's speed")
    save("questions", {"questions": number, "dim": dim, "threads": 1, "by_entities": found})


if __name__ == "__main__":
    typer.run(main)
