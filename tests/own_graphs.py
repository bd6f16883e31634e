"""Made graphs like people's own: power-law degrees and relations, types, communities, a latent rule, some noise."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

LATENT, MOST_TYPES, COMMUNITIES = 10, 12, 150
NOISE = 0.05  # of the triples follow nothing but who is popular


def own_triples(triples: int, entities: int, relations: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """About `triples` distinct triples, in random order.

    A relation leads from one type to another. Which tails a head has follows from both entities' latent vectors, a
    matrix of the relation, and the tail's popularity; entities of a community have similar vectors.
    """
    rng = np.random.default_rng(seed)
    types = max(2, min(MOST_TYPES, entities // 60))
    kind = rng.integers(types, size=entities)
    centres = rng.normal(size=(COMMUNITIES, LATENT))
    latent = centres[rng.integers(COMMUNITIES, size=entities)] + 0.4 * rng.normal(size=(entities, LATENT))
    popular = 1.0 / (rng.permutation(entities) + 10.0) ** 0.8
    shares = 1.0 / np.arange(1, relations + 1) ** 0.7
    shares /= shares.sum()
    found: set[tuple[int, int, int]] = set()
    for relation, share in enumerate(shares):
        heads, tails = (np.flatnonzero(kind == one) for one in rng.choice(types, size=2))
        rule = rng.normal(size=(LATENT, LATENT)) / np.sqrt(LATENT)
        logits = 2.0 * latent[heads] @ rule @ latent[tails].T + np.log(popular[tails])
        # More than wanted: heads with more draws than tails, and noise that hits what is there, give less.
        number = int(1.1 * share * triples) + 1
        drawn = np.bincount(_draw(rng, popular[heads], number), minlength=len(heads))
        for head in np.flatnonzero(drawn):
            keys = logits[head] + rng.gumbel(size=len(tails))
            best = np.argsort(-keys)[: drawn[head]]
            found |= {(int(heads[head]), relation, int(tails[tail])) for tail in best}
    rows = sorted(found)
    rows = [rows[i] for i in rng.permutation(len(rows))[: round((1 - NOISE) * triples)]]
    while len(rows) < triples:
        head, tail = _draw(rng, popular, 2)
        noise = int(head), int(_draw(rng, shares, 1)[0]), int(tail)
        if noise not in found:
            found.add(noise)
            rows.append(noise)
    width = len(str(entities))
    return [(f"{kind[h]}:e{h:0{width}d}", f"r{r:02d}", f"{kind[t]}:e{t:0{width}d}") for h, r, t in rows]


def write_tsv(path: Path, triples: list[tuple[str, str, str]]) -> Path:
    """One line per triple."""
    path.write_text("".join("\t".join(triple) + "\n" for triple in triples), encoding="utf-8")
    return path


def _draw(rng: np.random.Generator, weights: npt.NDArray[np.float64], number: int) -> npt.NDArray[np.int64]:
    edges = np.cumsum(weights)
    return np.searchsorted(edges, rng.random(number) * edges[-1], side="right")
