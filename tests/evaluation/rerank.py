"""Filtered ranking of an exported model by NumPy alone: nothing of distkgd is imported, so that nothing is shared.

    python launch/export.py RUN/stages/student EXPORTED --format numpy
    python tests/evaluation/rerank.py EXPORTED DATA_FOLDER [--split test]

DATA_FOLDER holds train.txt, valid.txt and test.txt, or these with .gz: head, relation, tail a line, tabs between. All
entities are candidates, those of all splits that answer the question are left out, both directions are asked, and the
rank among equal scores is the middle one. Scores closer than 1e-9 of their size count as equal.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
SPLITS = ("train", "valid", "test")


def complex_scores(h: Array, r: Array, tails: Array) -> Array:
    """[N]: Re <h, r, conj(t)> of interleaved complex numbers (Trouillon et al. 2016, Eq. 11)."""
    product = (h[0::2] + 1j * h[1::2]) * (r[0::2] + 1j * r[1::2])
    found: Array = tails[:, 0::2] @ product.real + tails[:, 1::2] @ product.imag
    return found


def _turned(x: Array, angle: Array) -> Array:
    out = np.empty_like(x)
    out[0::2] = x[0::2] * np.cos(angle) - x[1::2] * np.sin(angle)
    out[1::2] = x[0::2] * np.sin(angle) + x[1::2] * np.cos(angle)
    return out


def rote_scores(h: Array, r: Array, tails: Array) -> Array:
    """[N]: b_h + b_t - |Rot(h) + r - t|^2 (Chami et al. 2020, section 4); a relation holds (angle, r_2k, r_2k+1)."""
    parts = r.reshape(-1, 3)
    moved = _turned(h[1:], parts[:, 0]) + parts[:, 1:].reshape(-1)
    found: Array = h[0] + tails[:, 0] - ((moved - tails[:, 1:]) ** 2).sum(1)
    return found


def _exp_0(v: Array, c: float) -> Array:
    length = np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-15)
    found: Array = np.minimum(np.tanh(np.sqrt(c) * length), 1 - 1e-5) * v / (np.sqrt(c) * length)
    return found


def _mobius_add(x: Array, y: Array, c: float) -> Array:
    xy, xx, yy = (x * y).sum(-1, keepdims=True), (x * x).sum(-1, keepdims=True), (y * y).sum(-1, keepdims=True)
    found: Array = ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c * c * xx * yy)
    return found


def roth_scores(h: Array, r: Array, tails: Array) -> Array:
    """[N]: b_h + b_t - d_c(exp(Rot(h)) (+) exp(r), exp(t))^2 (the same); c = softplus of a relation's first number."""
    c, parts = float(np.log1p(np.exp(r[0]))), r[1:].reshape(-1, 3)
    moved = _mobius_add(_exp_0(_turned(h[1:], parts[:, 0]), c), _exp_0(parts[:, 1:].reshape(-1), c), c)
    apart = np.linalg.norm(_mobius_add(-moved[None], _exp_0(tails[:, 1:], c), c), axis=1)
    distance = 2 / np.sqrt(c) * np.arctanh(np.minimum(np.sqrt(c) * apart, 1 - 1e-15))
    found: Array = h[0] + tails[:, 0] - distance**2
    return found


SCORES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "complex": complex_scores,
    "rote": rote_scores,
    "roth": roth_scores,
}


def _names(path: Path) -> dict[str, int]:
    """Name -> row, of a file of lines `row, tab, name`."""
    rows = (line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: int(row) for row, name in rows}


def _triples(folder: Path, split: str, entities: dict[str, int], relations: dict[str, int]) -> list[tuple[int, ...]]:
    packed = folder / f"{split}.txt.gz"
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / f"{split}.txt").read_bytes()
    lines = [line.split("\t") for line in data.decode("utf-8").splitlines() if line]
    return [(entities[h], relations[r], entities[t]) for h, r, t in lines]


def rerank(exported: Path, data: Path, split: str = "test") -> dict[str, float]:
    """MRR and Hits@10 of an export in format numpy; KeyError for a name that it lacks or a scorer that is not here."""
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    entity, relation = (np.load(exported / f"{name}.npy").astype(np.float64) for name in ("entity", "relation"))
    entities, relations = _names(exported / "entities.tsv"), _names(exported / "relations.tsv")
    triples = {one: _triples(data, one, entities, relations) for one in SPLITS}
    known: dict[tuple[int, int, int], set[int]] = {}
    for h, r, t in (triple for one in SPLITS for triple in triples[one]):
        known.setdefault((h, r, 0), set()).add(t)
        known.setdefault((t, r, 1), set()).add(h)
    score, ranks = SCORES[config["scorer"]["name"]], []
    for h, r, t in triples[split]:
        for anchor, side, answer in ((h, 0, t), (t, 1, h)):
            if config["reciprocal"] or side == 0:
                scores = score(entity[anchor], relation[r + side * config["num_relations"]], entity)
            elif config["scorer"]["name"] == "complex":
                row = relation[r] * np.tile([1.0, -1.0], len(relation[r]) // 2)  # the head's formula: conjugated
                scores = score(entity[anchor], row, entity)
            else:
                raise KeyError(f"{config['scorer']['name']} without reciprocal relations")
            own, near = scores[answer], 1e-9 * max(1.0, abs(scores[answer]))
            others = np.ones(len(scores), bool)
            others[list(known[anchor, r, side])] = False
            ahead, equal = (scores > own + near)[others].sum(), (np.abs(scores - own) <= near)[others].sum()
            ranks.append(1 + ahead + equal / 2)
    found = np.array(ranks)
    return {"mrr": float((1 / found).mean()), "hits_at_10": float((found <= 10).mean()), "questions": len(found)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    given = parser.parse_args()
    print(json.dumps(rerank(given.exported, given.data, given.split)))
