"""The pruned side of a model: which of its numbers stay, and the model that is made of them."""

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
    return Model(model.scorer, model.entity, model.relation, model.num_relations, model.reciprocal, mask)


def pruned(model: Model, mask: Mask) -> Model:
    """A model of its own: what goes is 0, and where whole columns go it has as many fewer."""
    table, relation = model.entity, model.relation.detach()
    if mask.columns is None:
        scorer = model.scorer
        weight = table.weight.masked_fill(~mask.entity, 0.0)
        relation = relation.masked_fill(~mask.relation, 0.0)
    else:
        scorer = model.scorer.crop(int(mask.columns.sum()))
        weight = table.weight[:, mask.columns].contiguous()
        relation = relation[:, model.scorer.relation_columns(mask.columns)].contiguous()
    entity = ShardedTable(weight, table.total, table.ranks, table.dtype)
    return Model(scorer, entity, relation, model.num_relations, model.reciprocal)
