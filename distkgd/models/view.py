"""What one batch sees of a model: the rows that it needs, and the scores of its queries."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.data.filters import Queries
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.candidate_layout import PairScores
from distkgd.distributed.tables import OpenRows
from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.models.model import Model
from distkgd.scorers import Scorer

ScoreCandidates = Callable[[Tensor, Candidates], Tensor]


class View:
    """The embeddings and scores of one model for one part of a batch.

    anchor, answer: [Q, ·] rows before dropout.
    relations: the whole relation table. positive: [Q] scores of the queries' own answers.
    negatives: the scores of the other candidates, as a Field.
    """

    def __init__(
        self,
        model: Model,
        inputs: StepInputs,
        *,
        grad: bool,
        dropout: float = 0.0,
        relation_dropout: float = 0.0,
        bf16: bool = False,
    ) -> None:
        with torch.set_grad_enabled(grad):
            queries = inputs.batch.queries
            n = len(queries.anchor)
            self.model, self.inputs = model, inputs
            mask = model.mask
            self.opened: OpenRows = model.entity.open(
                inputs.route, grad=grad, mask=None if mask is None else mask.entity
            )
            self.relations = model.relations
            shape = inputs.candidates
            candidates: Candidates
            drawn: list[Tensor] = []  # anchors of the negatives
            if shape is not None and inputs.looked_up:
                sizes = [n, n, n * inputs.drawn_anchors] if inputs.drawn_anchors else [n, n]
                (self.anchor, self.answer, *drawn), candidates = self.opened.lookup_and_list(sizes, shape)
            else:
                self.anchor, self.answer = self.opened.lookup([n, n])
                candidates = self.opened.candidates()
                if shape is not None:
                    candidates = plain(candidates).reshape(*shape, candidates.shape[-1])
            self._grad, self._relation_dropout = grad, relation_dropout
            self._anchor = _drop(self.anchor, dropout, inputs, Stream.ENTITY_DROPOUT, model.scorer.biases)
            score_candidates = _score_candidates_bf16(model.scorer) if bf16 else model.scorer.score_candidates
            lists = self.lists_relations and not relation_dropout
            if lists:
                projected = model.scorer.listed_query(self._anchor, self.listed(self.relations))
            else:
                projected = model.project(queries, *self.dropped)
            if lists or (projected.device.type != "cpu" and model.scorer.candidate_form == "dot"):
                # The same but for rounding, which is said to stay as it is on CPUs, in a fourth of the kernels.
                self.positive = (projected * self.answer).sum(-1)
            else:
                self.positive = model.answer_scores(queries, *self.dropped, self.answer)
            if drawn:
                times = inputs.drawn_anchors
                each = Queries(*(column.repeat_interleave(times) for column in queries))
                own = model.project(each, drawn[0], self.relation.repeat_interleave(times, 0))
                projected = own.reshape(n, times * own.shape[1])
                score_candidates = partial(_score_by_anchor, score_candidates, times)
            self.negatives = PairScores(inputs.layout, score_candidates, projected, candidates)

    @property
    def lists_relations(self) -> bool:
        """Whether queries are made of relations that are listed, not copied."""
        model = self.model
        on_host = model.relation.device.type == "cpu"
        return model.scorer.lists_relations and model.reciprocal and on_host and model.query_bits != 8

    def listed(self, relations: Tensor) -> GatheredRows:
        """Each query's row of a table of relations."""
        return GatheredRows(relations, self.model.relation_ids(self.inputs.batch.queries))

    @cached_property
    def relation(self) -> Tensor:
        """[Q, relation_size]: each query's relation, before dropout."""
        with torch.set_grad_enabled(self._grad):
            return plain(self.listed(self.relations))

    @cached_property
    def dropped(self) -> tuple[Tensor, Tensor]:
        """Anchor and relation after dropout."""
        with torch.set_grad_enabled(self._grad):
            return self._anchor, _drop(self.relation, self._relation_dropout, self.inputs, Stream.RELATION_DROPOUT)

    def masters(self) -> tuple[Tensor, Tensor, Tensor]:
        """[Q, ·] anchor, relation, answer as they are trained: not rounded; all ranks call it."""
        anchor, answer = self.master_entities()
        if self.model.relation_quantiser is None:
            return anchor, self.relation, answer
        return anchor, plain(self.listed(self.model.master_relations)), answer

    def master_entities(self) -> tuple[Tensor, Tensor]:
        """[Q, ·] anchor and answer of `masters`; all ranks call it."""
        if self.model.entity.quantiser is None:
            return self.anchor, self.answer
        anchor, answer = self.opened.lookup_unrounded([len(self.anchor)] * 2)
        return anchor, answer

    def field(self, queries: Tensor, score_candidates: ScoreCandidates) -> PairScores:
        """Another number per (query, candidate) over the same candidates, e.g. a cosine."""
        return PairScores(self.inputs.layout, score_candidates, queries, self.negatives.rows)


def _score_by_anchor(score_candidates: ScoreCandidates, anchors: int, queries: Tensor, rows: Candidates) -> Tensor:
    # [groups, 1, N] of [groups, 1, anchors * query_size] queries, each of which meets N / anchors of the candidates.
    assert isinstance(rows, GatheredRows)
    groups, num = rows.index.shape
    parts = replace(rows, index=rows.index.reshape(groups * anchors, num // anchors))
    each = queries.reshape(groups * anchors, 1, queries.shape[-1] // anchors)
    return score_candidates(each, parts).reshape(groups, 1, num)


def _score_candidates_bf16(scorer: Scorer) -> ScoreCandidates:
    def score_candidates(queries: Tensor, rows: Candidates) -> Tensor:
        return scorer.score_candidates(queries.bfloat16(), rows.to(torch.bfloat16)).to(queries.dtype)

    return score_candidates


def _drop(rows: Tensor, rate: float, inputs: StepInputs, stream: Stream, biases: int = 0) -> Tensor:
    # Inverted dropout whose mask depends on the query's global index, never on the rank. Biases are not dropped.
    if not rate:
        return rows
    dim = rows.shape[1]
    index = inputs.batch.query_index().unsqueeze(1) * dim + torch.arange(dim, device=rows.device)
    keep = random.uniform(inputs.seed, stream, inputs.batch.step, index) >= rate
    factor = keep.to(rows.dtype) / (1.0 - rate)
    factor[:, :biases] = 1.0
    return rows * factor
