"""Triple classification: which triples are true, by a threshold per relation, with calibrated probabilities.

Platt's method (1999): the probability is sigmoid(slope * score + offset), here with a slope and an offset per relation,
fitted to validation triples and to false ones beside them. Relations have few validation triples each, so log slope
and offset of each are drawn to those of all relations by a normal prior of deviation 1; scores are standardised first,
and a relation without validation triples has those of all. The threshold is where the probability is one half.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.data import Graph
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.errors import DataError

BINS = 15  # of the calibration error
DRAWS = 20  # of an entity in place of another; a triple for which all make known triples has no false one beside it
STEPS = 100  # at most


@dataclass(frozen=True)
class Classified:
    """What n triples are taken for.

    accepted: [n] bool. probabilities: [n] of being true. scores: [n]; thresholds: [n] from which on one is accepted,
    of its relation. errors: place of a triple with a word that means nothing -> why; it is not accepted, its numbers
    are NaN.
    """

    accepted: Tensor
    probabilities: Tensor
    scores: Tensor
    thresholds: Tensor
    errors: Mapping[int, str] = field(default_factory=dict)

    def table(self) -> pl.DataFrame:
        """One row per triple: accepted, probability, score, threshold, error."""
        columns = self.accepted, self.probabilities, self.scores, self.thresholds
        names = "accepted", "probability", "score", "threshold"
        numbers = {name: pl.Series(column.cpu().numpy()) for name, column in zip(names, columns, strict=True)}
        errors = [self.errors.get(place) for place in range(len(self.accepted))]
        return pl.DataFrame({**numbers, "error": pl.Series(errors, dtype=pl.String)})

    def __len__(self) -> int:
        return len(self.accepted)


@dataclass(frozen=True)
class Classifier:
    """slopes, offsets: [num_relations] float64; the probability of a triple is sigmoid(slope * score + offset)."""

    slopes: Tensor
    offsets: Tensor

    @property
    def thresholds(self) -> Tensor:
        """[num_relations] float64: scores from which on a triple is accepted."""
        return -self.offsets / self.slopes

    def probabilities(self, scores: Tensor, relation: Tensor) -> Tensor:
        """[n] float64 of triples with these scores ([n]) and relations ([n] int64)."""
        return (self.slopes[relation] * scores.double() + self.offsets[relation]).sigmoid()


def fit_classifier(scores: Tensor, relation: Tensor, labels: Tensor, num_relations: int) -> Classifier:
    """The classifier that makes triples with these scores ([n]) and relations ([n] int64) most likely.

    labels: [n] bool, of which triples are true. Raises DataError unless there are both kinds.
    """
    if not (labels.any() and (~labels).any()):
        raise DataError(
            f"a classifier is fitted to true and to false triples; {int(labels.sum())} of {len(labels)} are true."
        )
    scores = scores.double()
    mean, spread = scores.mean(), scores.std().clamp_min(1e-12)
    found = _Fit((scores - mean) / spread, relation, labels.double(), num_relations).solve()
    slopes = found[:, 0].exp() / spread
    return Classifier(slopes, found[:, 1] - slopes * mean)


class _Fit:
    """Newton's method on standardised scores [n]: steps of each relation's (log slope, offset) by turns with steps of
    all at once, halved where they do not help."""

    def __init__(self, scores: Tensor, relation: Tensor, wanted: Tensor, num_relations: int) -> None:
        self.scores, self.relation, self.wanted = scores, relation, wanted
        self.own = scores.new_zeros(num_relations, 2)
        self.center = scores.new_zeros(2)  # of the prior
        self.seen = torch.bincount(relation, minlength=num_relations) > 0

    def solve(self) -> Tensor:
        """[num_relations, 2]."""
        loss = self.loss(self.own, self.center)
        for _ in range(STEPS):
            before = loss
            for together in (False, True):
                loss = self.step(together, loss)
            # The log slope of all has a prior of its own: separable triples would have an infinite one.
            held = self.own[self.seen]
            self.center = held.sum(0) / torch.stack([held.new_tensor(len(held) + 1), held.new_tensor(len(held))])
            self.own[~self.seen] = self.center
            loss = self.loss(self.own, self.center)
            if before - loss < 1e-10 * len(self.scores):
                break
        return self.own

    def loss(self, own: Tensor, center: Tensor) -> Tensor:
        """[] minus log posterior."""
        slope, offset = own[self.relation].unbind(1)
        logit = slope.exp() * self.scores + offset
        prior = (own - center).square().sum() + center[0].square()
        return F.binary_cross_entropy_with_logits(logit, self.wanted, reduction="sum") + prior / 2

    def step(self, together: bool, loss: Tensor) -> Tensor:
        """One step; the loss after it."""
        slope, offset = self.own[self.relation].unbind(1)
        ascent = torch.stack([slope.exp() * self.scores, torch.ones_like(slope)], 1)
        found = (ascent[:, 0] + offset).sigmoid()
        gradient = (found - self.wanted).unsqueeze(1) * ascent
        curvature = (found * (1 - found)).reshape(-1, 1, 1) * ascent.unsqueeze(2) * ascent.unsqueeze(1)
        one = torch.eye(2, dtype=slope.dtype, device=slope.device)
        if together:
            pull = torch.stack([self.center[0], torch.zeros_like(self.center[0])])
            move = -torch.linalg.solve(curvature.sum(0) + one, gradient.sum(0) + pull)
        else:
            of_each = torch.zeros_like(self.own).index_add_(0, self.relation, gradient) + self.own - self.center
            curves = one.repeat(len(self.own), 1, 1).index_add_(0, self.relation, curvature)
            move = -torch.linalg.solve(curves, of_each)
        for halvings in range(30):
            share = move / 2**halvings
            own, center = self.own + share, self.center + share if together else self.center
            if (after := self.loss(own, center)) < loss:
                self.own, self.center = own, center
                return after
        return loss


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error: the mean distance of the share of true triples from their mean probability, over
    15 equal bins of probability, weighed by how many triples are in each (Guo and others, 2017).
    """
    probabilities, labels = probabilities.double(), labels.double()
    place = (probabilities * BINS).long().clamp_max(BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, probabilities - labels)
    return float(apart.abs().sum() / len(labels))


def false_triples(triples: Tensor, graph: Graph, known: KnownAnswers, seed: int) -> Tensor:
    """[m, 3] triples that no split of a graph holds, one for nearly each of [n, 3]: one end, drawn by `seed`, replaced
    by an entity that train has at that place of that relation, which makes them hard to tell from true ones.

    known: the answers of all splits.
    """
    index = torch.arange(len(triples))
    side = random.integers(seed, Stream.CORRUPTED, 0, index, 2)  # 0: the tail is replaced
    head, relation, tail = graph.train.unbind(1)
    size = graph.num_entities
    places = torch.cat([(2 * relation) * size + tail, (2 * relation + 1) * size + head]).unique()
    key = (2 * triples[:, 1] + side) * size
    first, last = torch.searchsorted(places, key), torch.searchsorted(places, key + size)
    made, open_ = triples.clone(), index[last > first]
    for draw in range(1, DRAWS + 1):
        drawn = random.bits(seed, Stream.CORRUPTED, draw, open_).bitwise_and(2**62 - 1) % (last - first)[open_]
        row = places[first[open_] + drawn] % size
        made[open_, 2 - 2 * side[open_]] = row
        heads, relations, tails = made[open_].unbind(1)
        query, answer = known.pairs(Queries(heads, relations, torch.zeros_like(heads), tails))
        open_ = open_[query[answer == tails[query]].unique()]
    wrong = torch.zeros(len(triples), dtype=torch.bool)
    wrong[open_] = True
    return made[~wrong & (last > first)]
