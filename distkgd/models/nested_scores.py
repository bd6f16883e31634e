"""The scores of all crops of a model, from one pass over its columns.

Where the scorer allows it (`Scorer.prefix_form`), a crop's score is the sum of what consecutive blocks of columns
score: each block is scored once, whatever number of crops it belongs to, and a running sum gives all scores. Where all
queries meet the same candidates by inner products, `products` stands for these, and kernels sum them as they are made.
The other scorers (PairRE, whose crops normalise anew, RESCAL, whose crops are corners of a matrix, and those with
biases or in hyperbolic space) score crop by crop.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distkgd.data.filters import Queries
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE, CandidateLayout, valid_mask
from distkgd.errors import ConfigError
from distkgd.kernels import nested_products
from distkgd.kernels.candidates import Candidates, plain
from distkgd.kernels.nested_products import Products
from distkgd.models.model import project
from distkgd.scorers import Scorer
from distkgd.scorers.sums.planes import plane_sums

SMALLEST_SQUARE = 1e-30  # of a distance, below which it has no gradient


def check_dims(scorer: Scorer, dims: Sequence[int]) -> None:
    """ConfigError or UnsupportedError unless `dims` ascend and a model of `scorer` can be cropped to each."""
    if not dims or any(a >= b for a, b in pairwise(dims)):
        raise ConfigError(f"dims {list(dims)} must ascend, each once, and be one at least.")
    for dim in dims:
        scorer.crop(dim)


class NestedScores:
    """How the crops of a scorer's model to each of P `dims` score.

    A field over them has P planes of *contributions*, what each crop adds to the one before it (or, crop by crop, its
    own score); `scores` makes the crops' scores of these.
    """

    def __init__(self, scorer: Scorer, dims: Sequence[int]) -> None:
        check_dims(scorer, dims)
        self.scorer = scorer
        self.dims = tuple(dims)
        self.form = scorer.prefix_form
        self._scorers = [scorer.crop(dim) for dim in dims]
        self._columns = [scorer.crop_columns(dim) for dim in dims]
        self._widths = [b - a for a, b in pairwise([0, *dims])]
        self._term = "dot" if scorer.candidate_form == "dot" else scorer.term

    @property
    def query_sizes(self) -> list[int]:
        """Numbers per query: one query serves all crops, or each has its own."""
        return [s.query_size for s in (self._scorers if self.form is None else self._scorers[-1:])]

    def members(self) -> tuple[Tensor, Tensor]:
        """[P, dim] and [P, relation_size] bool: which coordinates of an entity, and columns of a relation, each has."""
        entity = torch.arange(self.scorer.dim) < torch.tensor(self.dims).unsqueeze(1)
        relation = torch.zeros(len(self.dims), self.scorer.relation_size, dtype=torch.bool)
        for row, columns in zip(relation, self._columns, strict=True):
            row[columns] = True
        return entity, relation

    def queries(self, queries: Queries, reciprocal: bool, anchor: Tensor, relation: Tensor) -> Tensor:
        """[Q, sum of query_sizes] of queries whose anchors are [Q, dim] and relations [Q, relation_size]."""
        parts = []
        for dim, scorer, columns in zip(self.dims, self._scorers, self._columns, strict=True):
            if self.form is None or dim == self.dims[-1]:
                cut = relation if dim == self.scorer.dim else relation[:, columns.to(relation.device)]
                parts.append(project(scorer, reciprocal, queries, anchor[:, : scorer.entity_size], cut))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def score_candidates(self, queries: Tensor, rows: Candidates) -> Tensor:
        """[P, ..., Q, N] contributions of queries [..., Q, sum of query_sizes] and candidates [..., N, dim]."""
        table = plain(rows)
        if self.form is None:
            parts = zip(self._scorers, queries.split(self.query_sizes, -1), strict=True)
            return torch.stack([scorer.score_candidates(q, table[..., : scorer.entity_size]) for scorer, q in parts])
        table = table[..., : self.dims[-1]]
        if len(set(self._widths)) == 1:
            return self._sums(queries, table, len(self.dims))
        cut = queries.split(self._widths, -1), table.split(self._widths, -1)
        return torch.cat([self._sums(q, c, 1) for q, c in zip(*cut, strict=True)])

    def products(self, queries: Tensor, rows: Candidates) -> Products:
        """What stands for `score_candidates` of queries [Q, dim] and candidates [N, dim] where `has_products` is
        true."""
        return Products(queries, plain(rows)[..., : self.dims[-1]], len(self.dims))

    def has_products(self, queries: Tensor, layout: CandidateLayout) -> bool:
        """Whether contributions need not be made: all queries [Q, dim] meet the same candidates, by inner products."""
        alike = self.form == "sum" and self.scorer.candidate_form == "dot" and len(set(self._widths)) == 1
        return alike and layout.groups is None and nested_products.available(queries)

    def score_own_answers(self, queries: Tensor, rows: Tensor) -> Tensor:
        """[P, Q] contributions of queries [Q, sum of query_sizes] and one row [Q, dim] each."""
        if self.form is None or self.scorer.candidate_form != "dot":
            return self.score_candidates(queries.unsqueeze(-2), rows.unsqueeze(-2)).flatten(1)
        products = queries * rows[:, : self.dims[-1]]
        if len(set(self._widths)) == 1:
            return products.view(len(products), len(self.dims), -1).sum(-1).T
        return torch.stack([part.sum(-1) for part in products.split(self._widths, -1)])

    def scores(self, contributions: Tensor) -> Tensor:
        """[P, ...] of contributions [P, ...]; far below MASKED_SCORE / 2 where a pair does not count."""
        if self.form is None:
            return contributions
        sums = contributions.cumsum(0)
        if self.form == "sum":
            return self.scorer.margin + sums
        # Squares have no sign to spare, so a pair that does not count is told apart before the root.
        roots = sums.clamp_min(SMALLEST_SQUARE).sqrt()
        scores: Tensor = torch.where(sums < MASKED_SCORE / 2, MASKED_SCORE, self.scorer.margin - roots)
        return scores

    def steps(self, contributions: Tensor, scores: Tensor) -> Tensor:
        """[P - 1, ...]: each crop's score less that of the one before it; 0 where a pair does not count."""
        apart = contributions[1:] if self.form == "sum" else scores[1:] - scores[:-1]
        return apart * valid_mask(contributions[1:].detach())

    def _sums(self, queries: Tensor, rows: Tensor, planes: int) -> Tensor:
        # [planes, ..., Q, N] of as many equal blocks: products, squares, or distances with their sign turned.
        assert self._term is not None
        distances = self.form == "sum" and self.scorer.candidate_form != "dot"
        return plane_sums(self._term, -1.0 if distances else 1.0, queries, rows, planes)
