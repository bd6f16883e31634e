"""Which candidates queries meet, on which rank and in which blocks, and their scores."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks
from distkgd.kernels.candidates import Candidates

# Scores of a field that are kept for backward, and the size of the blocks that are computed again beyond that. On a CPU
# a block belongs into the cache: on 2e7 scores and more, computing them twice there was measured to be 1.6 times faster
# than writing them to memory once. An accelerator needs large blocks to hide the cost of launching kernels.
KEPT_NUMBERS = {"cpu": 1 << 24}
BLOCK_NUMBERS = {"cpu": 1 << 20}
DEVICE_NUMBERS = 1 << 27


def numbers_at_once(numbers: float, device: torch.device) -> float:
    """How many of a field's `numbers` (queries x candidates) exist at the same time."""
    if numbers <= KEPT_NUMBERS.get(device.type, DEVICE_NUMBERS):
        return numbers
    return BLOCK_NUMBERS.get(device.type, DEVICE_NUMBERS)


NO_LIMIT = 1 << 62

LANES = 16  # of a vector instruction: matrix products are up to a fifth faster for multiples of it


def whole_lanes(number: int) -> int:
    """The number of rows without those that would leave a vector part empty; a few stay as they are."""
    return number - number % LANES if number >= LANES else number


# Candidates of a block with many planes at least: products with fewer would cost more than what the cache saves.
_NARROWEST = 32

# The score of a pair that does not count, in every field: exp of it is 0, and unlike -inf it makes no NaN in backward.
MASKED_SCORE = -1e30


def valid_mask(scores: Tensor) -> Tensor:
    """[..., Q, n]: 1 where a candidate counts, 0 where it was left out."""
    return (scores > MASKED_SCORE / 2).to(scores.dtype)


class CandidateLayout:
    """Where the candidates of a batch are and which (query, candidate) pairs do not count.

    Queries travel to all ranks or stay on their own; and all of them meet the same candidates, or group g of them
    meets candidate rows [g].
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        num_candidates: int,
        most_candidates: int | None = None,
        counts: Sequence[int] | None = None,
        groups: int | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
        answers: Tensor | None = None,
        mask: Tensor | None = None,
        block_numbers: int | None = None,
    ) -> None:
        """
        num_candidates: N of this rank, or of each group. most_candidates: an upper bound that all ranks share.
        counts: queries of each rank when they travel; None: they stay.
        groups: number of groups met on this rank (those of all ranks when queries travel), or None.
        excluded: ([p] query, [p] candidate), sorted by candidate: pairs that do not count (without groups).
        answers: in their place [queries met here] the one candidate that does not count for each; outside of
            0 … N - 1 there is none.
        mask: [groups, queries per group, N], without groups [queries met here, N] bool, True = does not count.
        block_numbers: so many scores at most exist at a time; NO_LIMIT: all candidates are met in one block.
        """
        self.ranks = ranks
        self.counts = counts
        self.groups = groups
        self.num_candidates = num_candidates
        self.most_candidates = num_candidates if most_candidates is None else most_candidates
        self._excluded = excluded
        self._answers = answers
        self._mask = mask
        self._block_numbers = block_numbers

    def gather(self, per_query: Sequence[Tensor]) -> list[Tensor]:
        """Each [Q, k] of this rank's queries as the blocks see it: of all queries met here, [groups, q, k] in groups.

        What takes a gradient travels in one exchange, what takes none in another.
        """
        gathered = list(per_query)
        if self.counts is not None and self.ranks.world > 1:
            for grad in (True, False):
                which = [i for i, x in enumerate(per_query) if x.requires_grad == grad]
                if which:
                    joined = torch.cat([per_query[i] for i in which], 1)
                    moved = self.ranks.gather(joined, self.counts, "queries")
                    parts = moved.split([per_query[i].shape[1] for i in which], 1)
                    for i, part in zip(which, parts, strict=True):
                        gathered[i] = part.to(per_query[i].dtype)
        if self.groups is None:
            return gathered
        return [x.reshape(self.groups, len(x) // max(1, self.groups), x.shape[1]) for x in gathered]

    def blocks(self, queries: int, planes: int = 1) -> list[tuple[int, int]]:
        """Ranges of candidates small enough that queries x range x planes stays below the block budget."""
        budget = self._block_numbers or numbers_at_once(queries * self.num_candidates * planes, self.ranks.device)
        width = max(1 if planes == 1 else _NARROWEST, int(budget) // max(1, queries * planes))
        if width >= self.num_candidates:
            return [(0, self.num_candidates)]
        pieces = -(-self.num_candidates // width)
        cuts = [self.num_candidates * i // pieces for i in range(pieces + 1)]
        return list(pairwise(cuts))

    def group_size(self, queries: int) -> int:
        """Queries of each group, of `queries` on this rank; 1 without groups."""
        if not self.groups:
            return 1
        return (queries if self.counts is None else sum(self.counts)) // self.groups

    def block_cuts(self, queries: int, blocks: int) -> list[int]:
        """[blocks + 1]: where one rank's `queries` are cut into blocks; groups stay whole."""
        size = self.group_size(queries)
        if self.groups is None:
            width = -(-queries // blocks)
            width = whole_lanes(width + LANES - 1) if width >= LANES else width
            return [min(queries, width * i) for i in range(blocks + 1)]
        return [queries // size * i // blocks * size for i in range(blocks + 1)] if size else [0] * (blocks + 1)

    def query_blocks(self, blocks: int, queries: int) -> list[tuple["CandidateLayout", Tensor]]:
        """The layout of each of `blocks` parts of this rank's `queries`, groups kept whole, and which of the queries
        met here belong to it: ([met in the part] positions, ascending)."""
        counts = [queries] if self.counts is None else list(self.counts)
        cuts = [
            [at + cut for cut in self.block_cuts(n, blocks)]
            for n, at in zip(counts, accumulate(counts, initial=0), strict=False)
        ]
        sizes = [[cut[i + 1] - cut[i] for cut in cuts] for i in range(blocks)]
        parts = [
            torch.cat([torch.arange(cut[i], cut[i + 1], device=self.ranks.device) for cut in cuts])
            for i in range(blocks)
        ]
        size = self.group_size(queries)

        def masked(met: Tensor) -> Tensor | None:
            return None if self._mask is None else self._mask[torch.div(met[::size], size, rounding_mode="floor")]

        return [
            (
                CandidateLayout(
                    self.ranks,
                    num_candidates=self.num_candidates,
                    counts=None if self.counts is None else counts,
                    groups=None if self.groups is None else len(met) // max(1, size),
                    excluded=pairs,
                    answers=None if self._answers is None else self._answers[met],
                    mask=masked(met),
                    block_numbers=NO_LIMIT,
                ),
                met,
            )
            for counts, met, pairs in zip(sizes, parts, self._excluded_of(parts), strict=True)
        ]

    def _excluded_of(self, parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
        # The pairs that do not count of each part of the queries met here, whose numbers are those in the part.
        if self._excluded is None:
            return [None] * len(parts)
        query, candidate = self._excluded
        part, place = (query.new_zeros(sum(map(len, parts))) for _ in range(2))
        for i, met in enumerate(parts):
            part[met], place[met] = i, torch.arange(len(met), device=met.device)
        order = torch.sort(part[query], stable=True).indices
        sizes = torch.bincount(part[query], minlength=len(parts)).tolist()
        return list(zip(place[query[order]].split(sizes), candidate[order].split(sizes), strict=True))

    def leave_out(self, scores: "Tensor | LazyScores", start: int, stop: int) -> None:
        """Write MASKED_SCORE, in place, over the pairs of candidates start … stop - 1 that do not count."""
        if self._mask is not None:
            assert isinstance(scores, Tensor), "scores of groups are made"
            scores.masked_fill_(self._mask[..., start:stop], MASKED_SCORE)
        elif self._answers is not None and stop > start:
            assert isinstance(scores, Tensor), "where scores are not made, there are pairs"
            shape = *scores.shape[:-1], 1
            if self.ranks.world == 1 and (start, stop) == (0, self.num_candidates):
                scores.scatter_(-1, self._answers.unsqueeze(-1).expand(shape), MASKED_SCORE)
            else:
                at = self._answers - start
                least = torch.where((at >= 0) & (at < stop - start), MASKED_SCORE, torch.inf).to(scores.dtype)
                at = at.clamp(0, stop - start - 1).unsqueeze(-1)
                scores.scatter_reduce_(-1, at.expand(shape), least.unsqueeze(-1).expand(shape), "amin")
        elif self._excluded is not None:
            query, candidate = self._excluded
            if (start, stop) != (0, self.num_candidates):
                ends = torch.tensor([start, stop], device=candidate.device)
                first, last = torch.searchsorted(candidate, ends).tolist()
                query, candidate = query[first:last], candidate[first:last] - start
            if isinstance(scores, Tensor):
                scores[..., query, candidate] = MASKED_SCORE
            else:
                scores.leave_out(query, candidate)

    def return_to_owner(self, partials: Tensor) -> Tensor:
        """[k, queries met here] partials of this rank's candidates as [pieces, k, Q] of this rank's queries."""
        width = len(partials)
        if self.counts is None or self.ranks.world == 1:
            return partials.reshape(1, width, -1)
        mine = self.counts[self.ranks.rank]
        by_query = partials.reshape(width, -1).T
        moved = self.ranks.exchange(by_query, self.counts, [mine] * self.ranks.world, "partials")
        return moved.reshape(self.ranks.world, mine, width).transpose(1, 2)


class LazyScores(Protocol):
    """Scores that are never in memory: whoever made the field knows what they are, and its asks how to sum them."""

    def leave_out(self, query: Tensor, candidate: Tensor) -> None:
        """These pairs ([p], [p]) do not count."""


class PairScores:
    """One number per (query, candidate), computed block by block: a model's scores, a cosine, a norm ratio.

    meet: (queries [..., Q, a], rows [..., n, b], copied or listed) -> [..., Q, n], or what stands for it.
    queries: [Q, a] of this rank, moved to the candidates when the first ask is answered.
    rows: [N, b], or [groups, N, b], copied or listed; narrower numbers than the queries' are widened block by block.
    planes: how many numbers there are for each pair if `score_candidates` puts them in front: [planes, ..., Q, n].
    masked: whether numbers of pairs that do not count are written over; off where those of another field tell.
    """

    def __init__(
        self,
        layout: CandidateLayout,
        score_candidates: Callable[[Tensor, Candidates], Any],
        queries: Tensor,
        rows: Candidates,
        planes: int = 1,
    ) -> None:
        self.layout = layout
        self.score_candidates = score_candidates
        self.queries = queries
        self.rows = rows
        self.planes = planes
        self.masked = True
        self.moved: Tensor | None = None
        self._whole: Any = None

    def block(self, queries: Tensor, rows: Candidates, start: int, stop: int) -> Any:
        """[..., Q, stop - start]: the numbers of candidates start … stop - 1; MASKED_SCORE: does not count."""
        scores = self.score_candidates(queries, rows.to(queries.dtype))
        if self.masked:
            with torch.no_grad():
                # Untracked on purpose: what is summed vanishes at MASKED_SCORE, and so does its gradient.
                self.layout.leave_out(scores, start, stop)
        return scores

    def whole(self) -> Any:
        """[..., Q, N]: all numbers at once, computed once however many asks use them."""
        if self._whole is None:
            assert self.moved is not None
            self._whole = self.block(self.moved, self.rows, 0, self.layout.num_candidates)
        return self._whole
