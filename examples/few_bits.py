"""A teacher from elsewhere, here a DistMult of plain numpy arrays, to a student of 2 bits per number.

A PyKEEN model comes in the same way: "teacher": "pykeen:results", with "trust_pickle": true.
"""

import json
import tempfile
from pathlib import Path

import family
import numpy as np

import distkgd

if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="distkgd_"))
    data, teacher = family.folder(place / "family", family.triples(63)), place / "teacher"
    train = [line.split("\t") for line in (data / "train.tsv").read_text().splitlines()]
    names = [sorted({row[at] for row in train for at in columns}) for columns in ((0, 2), (1,))]
    h, r, t = np.array([[names[at % 2].index(row[at]) for at in range(3)] for row in train]).T

    rng = np.random.default_rng(0)
    entity, relation = (0.5 * rng.standard_normal((len(words), 64)) for words in names)
    for _ in range(300):  # full batches of softmax over all tails, by gradient descent
        odds = np.exp((entity[h] * relation[r]) @ entity.T)
        wrong = np.eye(len(entity))[t] - odds / odds.sum(1, keepdims=True)
        to_tail, to_head = wrong.T @ (entity[h] * relation[r]), wrong @ entity * relation[r]
        np.add.at(relation, r, 0.05 * (wrong @ entity) * entity[h])
        entity += 0.05 * to_tail
        np.add.at(entity, h, 0.05 * to_head)
    teacher.mkdir()
    tables = {"entity": (entity, "entities"), "relation": (relation, "relations")}
    for words, (kind, (rows, title)) in zip(names, tables.items(), strict=True):
        np.save(teacher / f"{kind}.npy", rows.astype(np.float32))
        (teacher / f"{title}.tsv").write_text("".join(f"{row}\t{word}\n" for row, word in enumerate(words)))
    (teacher / "config.json").write_text(json.dumps({"scorer": {"name": "distmult", "dim": 64}, "reciprocal": False}))
    student = family.SMALL["student"] | {"method": "bkd", "dim": 64, "bits": 2, "relation_bits": 4}
    plan = {**family.SMALL, "data": str(data), "teacher": f"plain:{teacher}", "student": student}
    run = distkgd.train(plan, out=place / "run")
    print(run.table().select("stage", "bits", "bytes", "test_mrr"), place)
