"""Made graphs of any size whose degrees follow a power law, for measuring what real data sets are too small for.

Heads and tails are drawn with P(k-th most popular entity) ∝ k^-skew and relations with P(k-th) ∝ k^-skew, k = 1, 2, …,
independently of each other: all there is to learn is who is popular. Repeated triples are drawn anew, so the most
popular combinations, which would come up several times, stand there once. Self-loops stay.

A number is a function of the arguments and its place, not of any state. `sha256` covers the arguments and the triples:
the last bit of a power may differ between kinds of CPU, and a draw that falls on it would.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.data.triples import Graph, Vocabulary, told_unseen
from distkgd.errors import DataError

PREFIX = "powerlaw:"
EXAMPLE = "powerlaw:entities=100000,triples=500000,relations=50,skew=0.8,seed=0,valid=1000,test=1000"
Keys = npt.NDArray[np.int64]  # a triple as one number, (head * relations + relation) * entities + tail
_REQUIRED = ("entities", "triples", "relations", "skew", "seed")
_OPTIONAL = ("valid", "test")
_CHUNK = 1 << 18  # draws at a time: what they need on the way stays in the cache
_PATIENCE = 50  # draws per triple before too few distinct ones are left to find


def power_law_graph(
    entities: int, triples: int, relations: int, *, skew: float, seed: int, valid: int = 0, test: int = 0
) -> Graph:
    """A graph of exactly `triples` train, `valid` and `test` triples, all distinct, sorted, under random entity ids.

    skew: 0 (everyone alike) … 5. Raises DataError where so many distinct triples do not exist or are not found.
    """
    arguments = {"entities": entities, "triples": triples, "relations": relations, "skew": float(skew), "seed": seed}
    arguments |= {"valid": valid, "test": test}
    _check(arguments)
    name = PREFIX + ",".join(f"{key}={value}" for key, value in arguments.items())
    # A seed of its own kind: training with the same number must not meet the numbers that made its data.
    own_seed = int.from_bytes(hashlib.sha256(f"power law {seed}".encode()).digest()[:7], "big")
    keys = _distinct(own_seed, entities, relations, skew, triples + valid + test)
    digest = hashlib.sha256(name.encode())
    digest.update(keys.data)
    rows = {split: _rows(part, entities, relations) for split, part in _split(keys, valid, test, own_seed).items()}
    return Graph(
        name=name,
        **rows,
        entities=Vocabulary(_names("e", entities)),
        relations=Vocabulary(_names("r", relations)),
        sha256=digest.hexdigest(),
        warnings=tuple(told_unseen(rows, entities).values()),
    )


def read_power_law(text: str) -> Graph:
    """The graph that "powerlaw:entities=…,triples=…,…" describes: the arguments of `power_law_graph` by name."""
    given: dict[str, float] = {}
    for part in filter(None, text.partition(":")[2].split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in _REQUIRED + _OPTIONAL or key in given:
            what = "stands there twice" if key in given else "is no option of it"
            raise DataError(f"{text}: {key!r} {what}; allowed: {', '.join(_REQUIRED + _OPTIONAL)}; e.g. {EXAMPLE}")
        pattern, kind = (r"\d+(\.\d*)?|\.\d+", "number") if key == "skew" else (r"\d+(_\d+)*", "whole number")
        if not re.fullmatch(pattern, value):
            raise DataError(f"{text}: {key} must be a {kind}, not {value!r}; e.g. {EXAMPLE}")
        given[key] = float(value) if key == "skew" else int(value)
    if missing := [key for key in _REQUIRED if key not in given]:
        raise DataError(f"{text}: {', '.join(missing)} missing; e.g. {EXAMPLE}")
    return power_law_graph(**given)  # type: ignore[arg-type]  # the patterns see to it


@dataclass(frozen=True)
class _PowerLaw:
    """Numbers 1 … size with P(k) ∝ k^-skew, by rejection-inversion (Hörmann & Derflinger, TOMACS 1996).

    The area under x^-skew between k - ½ and k + ½ is at least k^-skew, so k is the rounded inverse of the area's
    integral, kept where it falls into the last k^-skew of k's area. There is no table, and of the draws 99% are kept at
    skew 0.8, 82% at 2 and 26% at 5.
    """

    size: int
    skew: float

    def ranks(self, seed: int, column: int, start: int, stop: int) -> Tensor:
        """[stop - start] int64, from 0: the draws start … stop - 1 of a column."""
        low, high = (self._integral(torch.tensor(edge, dtype=torch.float64)) for edge in (0.5, self.size + 0.5))
        found = torch.empty(stop - start, dtype=torch.int64)
        left = torch.arange(stop - start)
        attempt = 0
        while len(left):
            drawn = random.uniform(seed, Stream.NEGATIVES, 3 * attempt + column, left + start)
            area = drawn.mul_(high - low).add_(low)
            rank = self._inverse(area).round_().clamp_(1, self.size)
            kept = area >= self._integral(rank + 0.5) - rank.pow(-self.skew)
            found[left[kept]] = rank[kept].long() - 1
            left = left[~kept]
            attempt += 1
        return found

    def _integral(self, x: Tensor) -> Tensor:
        # From 1 to x. expm1 and log1p stay exact where the skew is all but 1.
        power = 1 - self.skew
        return x.log().mul_(power).expm1_().div_(power) if power else x.log()

    def _inverse(self, area: Tensor) -> Tensor:
        power = 1 - self.skew
        return (area * power).log1p_().div_(power).exp_() if power else area.exp()


def _distinct(seed: int, entities: int, relations: int, skew: float, number: int) -> Keys:
    # [number] keys of triples, ascending.
    ids = torch.sort(random.bits(seed, Stream.SHUFFLE, 0, torch.arange(entities))).indices.numpy()
    laws = (_PowerLaw(entities, skew), _PowerLaw(relations, skew), _PowerLaw(entities, skew))
    keys = np.empty(0, np.int64)
    drawn = 0
    while (missing := number - len(keys)) > 0:
        if drawn > _PATIENCE * number:
            raise DataError(
                f"powerlaw: {drawn:,} draws gave {len(keys):,} distinct triples of the {number:,} wanted; "
                "ask for fewer, for more entities or relations, or for less skew."
            )
        new = np.empty(missing if not drawn else missing + missing // 4 + 64, np.int64)
        for start in range(0, len(new), _CHUNK):
            place = drawn + start, drawn + min(start + _CHUNK, len(new))
            head, relation, tail = (law.ranks(seed, i, *place).numpy() for i, law in enumerate(laws))
            new[start : start + _CHUNK] = (ids[head] * relations + relation) * entities + ids[tail]
        drawn += len(new)
        new = _without_repeats(new)
        if len(keys):
            new = new[keys[np.minimum(np.searchsorted(keys, new), len(keys) - 1)] != new]
        # Of too many, some from everywhere: the first ones would all have the same heads.
        keys = np.concatenate([keys, new[_spread(missing, len(new))] if len(new) > missing else new])
        keys.sort()
    return keys


def _without_repeats(keys: Keys) -> Keys:
    keys.sort()  # in place; np.unique would copy
    first = np.empty(len(keys), np.bool_)
    first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first]


def _spread(number: int, total: int) -> Keys:
    # [number] positions of `total`, evenly apart.
    return (2 * np.arange(number) + 1) * total // (2 * max(1, number))


def _split(keys: Keys, valid: int, test: int, seed: int) -> dict[str, Keys]:
    # Each ascending; what is held out is drawn among triples evenly apart.
    held = _spread(valid + test, len(keys))
    order = torch.sort(random.bits(seed, Stream.SHUFFLE, 1, torch.arange(len(held)))).indices.numpy()
    train = np.ones(len(keys), np.bool_)
    train[held] = False
    parts = {"valid": held[order[:valid]], "test": held[order[valid:]]}
    return {"train": keys[train], **{split: np.sort(keys[part]) for split, part in parts.items()}}


def _rows(keys: Keys, entities: int, relations: int) -> Tensor:
    pair = keys // entities
    head = pair // relations
    return torch.from_numpy(np.stack([head, pair - head * relations, keys - pair * entities], axis=1))


def _names(letter: str, number: int) -> pl.Series:
    digits = pl.int_range(number).cast(pl.String).str.zfill(len(str(number - 1)))
    return pl.select(pl.format(letter + "{}", digits)).to_series()


def _check(given: dict[str, float]) -> None:
    for key, least in {"entities": 1, "triples": 1, "relations": 1, "valid": 0, "test": 0}.items():
        if given[key] < least:
            raise DataError(f"powerlaw: {key}={given[key]} is too small; at least {least}, e.g. {EXAMPLE}")
    if not 0 <= given["skew"] <= 5:
        raise DataError(f"powerlaw: skew={given['skew']} is outside 0 … 5; real graphs have some 0.5 to 1.5")
    possible = int(given["entities"]) ** 2 * int(given["relations"])
    wanted = sum(int(given[key]) for key in ("triples", "valid", "test"))
    if wanted > possible:
        raise DataError(f"powerlaw: {wanted:,} distinct triples are wanted and {possible:,} exist; ask for fewer")
    if possible >= 2**63:
        raise DataError("powerlaw: entities² x relations must stay below 2^63; ask for fewer")
