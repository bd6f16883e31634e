"""Learning through a step of another model: its gradient as a model, and the slope of a divergence along it."""

import torch
from torch import Tensor

from distkgd.distributed.pruning import Mask
from distkgd.distributed.reductions.candidate_layout import valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.distributed.reductions.partials import Partial, SoftmaxMean
from distkgd.distributed.tables import ShardedTable
from distkgd.models.model import Model
from distkgd.models.view import View


def model_like(
    model: Model, weight: Tensor, relation: Tensor, mask: Mask | None = None, rounded: bool = False
) -> Model:
    """A model of other tables: weight [rows of this shard, dim], relation [rows, relation_size].

    rounded: its rows are seen rounded as the model's are.
    """
    entity_how, relation_how = (model.entity.quantiser, model.relation_quantiser) if rounded else (None, None)
    table = ShardedTable(weight, model.entity.total, model.entity.ranks, model.entity.dtype, entity_how)
    return Model(model.scorer, table, relation, model.num_relations, model.reciprocal, mask, relation_how)


def gradient_of(model: Model) -> Model:
    """The gradient that backward left in all tables of a model, as the tables of another; all ranks call it."""
    table = model.entity
    whole = torch.zeros(len(table.weight), table.dim, dtype=table.dtype, device=table.weight.device)
    for opened in table.opened:
        found = opened.gradient()
        if found is None:
            continue
        touched, gradient = found
        if touched is None:
            whole += gradient
        else:
            whole.index_add_(0, touched, gradient)
    table.opened.clear()
    relation = torch.zeros_like(model.relation) if model.relation.grad is None else model.relation.grad
    return model_like(model, whole, table.ranks.all_reduce(relation, "dense"))


def divergence_slope(
    small: View, way: View, source: View, temperature: float, kl: float, reverse_kl: float
) -> LossRequest:
    """Asks for [Q]: how fast T^2 (kl KL(S || T) + reverse_kl KL(T || S)) (MetaSD Eq. 2) changes as S moves along `way`.

    Up to what does not depend on T's scores z, in which alone it is to be differentiated. With S's scores changing at
    the rate d it is -kl Cov_S(d, z) - reverse_kl temperature E_T(d), under the softmaxes of S and T.
    """
    model, queries = small.model, small.inputs.batch.queries

    def scored(anchor: Tensor, relation: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        return model.answer_scores(queries, anchor, relation, answer), model.project(queries, anchor, relation)

    found = torch.func.jvp(scored, (*small.dropped, small.answer), (*way.dropped, way.answer))
    own_d, query = found[1]
    score_candidates = small.negatives.score_candidates
    fields = [
        small.negatives,
        small.field(query, score_candidates),
        way.field(small.negatives.queries, score_candidates),
        source.negatives,
    ]

    def partials(zs: Tensor, by_query: Tensor, by_rows: Tensor, zt: Tensor) -> dict[str, Partial]:
        # Where a pair does not count its share is 0 and d finite, but d * zt would not be.
        d, zt_or_0 = by_query + by_rows, zt * valid_mask(zs)
        out: dict[str, Partial] = {}
        if kl:
            logit = zs / temperature
            parts = {"product": d * zt_or_0, "rate": d, "score": zt_or_0}
            out |= {name: SoftmaxMean(logit, value) for name, value in parts.items()}
        if reverse_kl:
            out["expected"] = SoftmaxMean(zt / temperature, d)
        return out

    def finish(got: dict[str, Tensor], own_s: Tensor, own_d: Tensor, own_t: Tensor) -> Tensor:
        def mean(name: str, logit: Tensor, own: Tensor) -> Tensor:
            # With the query's own answer, which is none of its other candidates.
            part = torch.sigmoid(logit / temperature - got[f"{name}.lse"])
            return got[name] + part * (own - got[name])

        out = torch.zeros_like(own_t)
        if kl:
            rate, score = mean("rate", own_s, own_d), mean("score", own_s, own_t)
            out = out - kl * (mean("product", own_s, own_d * own_t) - rate * score)
        if reverse_kl:
            out = out - reverse_kl * temperature * mean("expected", own_t, own_d)
        return out

    return LossRequest(partials, fields, finish, local=(small.positive, own_d, source.positive))
