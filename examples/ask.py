"""Asking a finished model: answers, relations, words, truth, and a Parquet file of questions.

python examples/ask.py        # writes into a temporary folder, and says where
"""

import tempfile
from pathlib import Path

import family
import polars as pl

import distkgd
from distkgd.evaluation.questions_file import answer_file

if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="distkgd_"))
    data = family.folder(place / "family", family.triples(63))
    run = distkgd.train({**family.SMALL, "data": str(data)}, out=place / "run")

    model = distkgd.load(run.folder / "stages/student")  # or any model folder; run.student is the same
    print(model.predict(head="person1", relation="parent_of", k=3).table())
    print(model.predict_relation(head="person0", tail="person4", k=2).names)
    print(model.search("person6"))
    print(model.classify([("person0", "parent_of", "person1"), ("person9", "parent_of", "person1")]).table())

    # Each row leaves one column empty: that one is asked.
    asked = {"head": ["person2", None], "relation": ["parent_of", "sibling_of"], "tail": [None, "person8"]}
    pl.DataFrame(asked).write_parquet(place / "asked.parquet")
    answered = answer_file(model, place / "asked.parquet", place / "answers.parquet", k=3)
    print(pl.read_parquet(place / "answers.parquet"))
    print(f"{answered.questions} questions, {answered.errors} errors; all files are in {place}")
