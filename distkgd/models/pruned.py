"""The pruned side of a model: which of its numbers stay, and the model that is made of them."""

from dataclasses import replace

from distkgd.distributed.pruning import Mask, Scope, largest
from distkgd.distributed.tables import ShardedTable
from distkgd.models.model import Model


def mask_of(model: Model, rate: float, scope: Scope) -> Mask:
    """What stays when the share `rate` of a model's numbers goes, those of least magnitude; all ranks call it."""
    scorer, table = model.scorer, model.entity
    columns = scorer.relation_columns
    return largest(table.weight, model.relation, rate, scope, table.ranks, scorer.dim_multiple, columns)


def masked_view(model: Model, mask: Mask) -> Model:
    """The same tables, of which views see what `mask` lets them; gradients reach only that."""
    how = model.relation_quantiser
    return Model(model.scorer, model.entity, model.relation, model.num_relations, model.reciprocal, mask, how)


def unrounded(model: Model) -> Model:
    """The same tables, whose rows are seen as they are."""
    table = model.entity.seen(None)
    return Model(model.scorer, table, model.relation, model.num_relations, model.reciprocal, model.mask)


def keeping_zeros(model: Model) -> Model:
    """The same tables; where they are seen rounded, what is 0 stays 0."""
    entity, relation = (
        None if one is None else replace(one, zeros=True) for one in (model.entity.quantiser, model.relation_quantiser)
    )
    table = model.entity.seen(entity)
    return Model(model.scorer, table, model.relation, model.num_relations, model.reciprocal, model.mask, relation)


def pruned(model: Model, mask: Mask) -> Model:
    """A model of its own: what goes is 0, and where whole columns go it has as many fewer. Its rows are seen rounded as
    the model's are, what is 0 as 0."""
    table, relation = model.entity, model.relation.detach()
    if mask.columns is None:
        scorer = model.scorer
        weight = table.weight.masked_fill(~mask.entity, 0.0)
        relation = relation.masked_fill(~mask.relation, 0.0)
    else:
        scorer = model.scorer.crop(int(mask.columns.sum()))
        weight = table.weight[:, mask.columns].contiguous()
        relation = relation[:, model.scorer.relation_columns(mask.columns)].contiguous()
    entity = ShardedTable(weight, table.total, table.ranks, table.dtype, table.quantiser)
    how = model.relation_quantiser
    found = Model(scorer, entity, relation, model.num_relations, model.reciprocal, relation_quantiser=how)
    return keeping_zeros(found) if mask.columns is None else found
