"""Entities that a finished model has never seen, placed by their neighbours, without training.

A newcomer h of a triple (h, r, t) stands at the mean of the rows of those of whom train says the same, (e, r, t). Of
several triples the means are averaged, and what few entities share weighs more: by 1 / log(1 + their number). Where a
triple is shared by nobody, those count that have its relation at the same place; of an entity without any triple, all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distkgd.common.paths import AnyPath
from distkgd.data import Graph
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable
from distkgd.errors import ConfigError, ModelError
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import LoadedModel, find_model, read_config, save_model


@torch.no_grad()
def place_newcomers(rows: Tensor, triples: Tensor, newcomers: Tensor) -> Tensor:
    """[m, size]: rows of newcomers ([m] int64 ids, ascending) by their neighbours.

    rows: [num_entities, size], of which those of newcomers are not read. triples: [n, 3] int64, theirs among them.
    """
    size = len(rows)
    is_new = torch.zeros(size, dtype=torch.bool)
    is_new[newcomers] = True
    head, relation, tail = triples.unbind(1)
    entity = torch.cat([head, tail])
    place = torch.cat([2 * relation, 2 * relation + 1])  # whose head, or whose tail it is
    sharing = place * size + torch.cat([tail, head])
    weight, total = rows.new_zeros(len(newcomers), 1), rows.new_zeros(len(newcomers), rows.shape[1])
    position = torch.searchsorted(newcomers, entity.clamp_max(int(newcomers[-1])))
    open_ = is_new[entity]
    for key in (sharing, place):
        asked = key[open_].unique()
        old = ~is_new[entity] & torch.isin(key, asked)
        group = torch.searchsorted(asked, key[old])
        count = torch.bincount(group, minlength=len(asked)).to(rows.dtype).unsqueeze(1)
        mean = rows.new_zeros(len(asked), rows.shape[1]).index_add_(0, group, rows[entity[old]]) / count.clamp_min(1)
        mine = torch.searchsorted(asked, key[open_])
        share = torch.where(count > 0, 1 / count.add(1).log(), 0.0)[mine]
        total.index_add_(0, position[open_], share * mean[mine])
        weight.index_add_(0, position[open_], share)
        left = open_.clone()
        left[open_] = count[mine, 0] == 0  # triples that nobody shares
        open_ = left
    every = rows[~is_new].mean(0)
    return torch.where(weight > 0, total / weight.clamp_min(1e-30), every)


class Grown(NamedTuple):
    """A model of a newer graph's entities and relations, in one process, and the ids of those that are new."""

    model: Model
    entities: Tensor
    relations: Tensor

    def save(self, folder: AnyPath, graph: Graph, source: str) -> None:
        """Write the model; `newcomers_of` reads back who is new. source: of the graph."""
        of_rows = [self.relations + half * graph.num_relations for half in range(2 if self.model.reciprocal else 1)]
        new = {"entity": self.entities.tolist(), "relation": torch.cat(of_rows).tolist()}
        save_model(folder, self.model, graph, {"data": graph.summary(), "source": source, "newcomers": new})


def newcomers_of(folder: AnyPath) -> dict[str, list[int]]:
    """The rows of new entities ("entity") and of new relations ("relation") of a model that `Grown.save` wrote."""
    found = read_config(find_model(folder)).get("newcomers")
    if not isinstance(found, dict) or found.keys() != {"entity", "relation"}:
        raise ConfigError(
            f"first_rows: {folder} does not say which rows are new; old_rows are free, or use distkgd update."
        )
    return found


def grown(loaded: LoadedModel, graph: Graph, seed: int = 0) -> Grown:
    """A finished model with the rows that a newer graph needs.

    Rows are matched by name. Newcomers are placed by their neighbours in train; new relations have random rows. Names
    that the graph has no longer are dropped. ModelError where none of the model's entities is in it.
    """
    old = loaded.model.widened().rounded()
    model = new_model(
        old.scorer,
        graph.num_entities,
        graph.num_relations,
        Ranks(device=old.relation.device),
        reciprocal=old.reciprocal,
        seed=seed,
        dtype=old.relation.dtype,
    )
    there = graph.entities.rows_of(loaded.entities)
    known = there >= 0
    if not known.any():
        raise ModelError(
            f"none of the model's {len(known):,} entities is in {graph.name}; give a newer state of its data."
        )
    rows = model.entity.weight
    rows[there[known]] = old.entity.weight[known].to(rows.dtype)
    newcomers = _missing(there[known], graph.num_entities)
    if len(newcomers):
        rows[newcomers] = place_newcomers(rows, graph.train, newcomers)
    relations = graph.relations.rows_of(loaded.relations)
    kept = relations >= 0
    for half in range(2 if old.reciprocal else 1):
        to, of = half * graph.num_relations, half * old.num_relations
        model.relation[relations[kept] + to] = old.relation[of : of + old.num_relations][kept]
    return Grown(model, newcomers, _missing(relations[kept], graph.num_relations))


def _missing(ids: Tensor, size: int) -> Tensor:
    # [m] ascending: what of 0 … size - 1 is not among ids.
    is_new = torch.ones(size, dtype=torch.bool)
    is_new[ids] = False
    return is_new.nonzero().flatten()


def with_row(model: Model, row: Tensor) -> Model:
    """A model of its own with one entity more, the last, whose row is [size]."""
    old = model.widened().rounded()
    rows = torch.cat([old.entity.weight, row.to(old.entity.weight).unsqueeze(0)])
    table = ShardedTable(rows, len(rows), old.entity.ranks, old.entity.dtype)
    return Model(old.scorer, table, old.relation, old.num_relations, old.reciprocal)
