"""What travels between ranks in a stage: its first batch is looked at, the cheaper way is taken, and it is said."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distkgd.config.stage import StageOptions
from distkgd.data.sampling import Batch
from distkgd.data.step_inputs import Move, StepInputBuilder
from distkgd.distributed.cost import Shape, Speaker, choose, human, memory, traffic
from distkgd.distributed.optim.rows import state_numbers
from distkgd.distributed.reductions.candidate_layout import numbers_at_once
from distkgd.methods import FurtherInputs, Method
from distkgd.models.model import Model

TERMS = 4  # loss terms of a usual method; they cost a few bytes


def shape_of(input_builder: StepInputBuilder, method: Method[Any], config: StageOptions, step: int = 0) -> Shape:
    """The shape of one step, its distinct ids counted in the batch of `step`; means over ranks, the same on each."""
    whole = FurtherInputs(input_builder, method.speakers(), method.travel())
    also = [_shape(one, method, config, 1, step) for one in method.further_inputs()]
    return replace(_shape(whole, method, config, config.accumulate, step), also=also)


def _shape(part: FurtherInputs, method: Method[Any], config: StageOptions, accumulate: int, step: int) -> Shape:
    input_builder, travel = part.input_builder, part.travel
    ranks, sampler = input_builder.ranks, input_builder.sampler
    parts = input_builder.parts(step, accumulate)
    counted = torch.tensor([_count(input_builder, part) for part in parts], dtype=torch.float64, device=ranks.device)
    sums = torch.cat([counted[:, :2].sum(0), counted[:, 2:].amax(0)])
    anchors, with_candidates, touched = (ranks.all_reduce(sums) / ranks.world).tolist()
    learning = {id(model.relation): model.relation for model, learns in part.speakers if learns}
    return Shape(
        world=ranks.world,
        entities=sampler.num_entities,
        queries=sum(part.sides * len(part.triples) for part in parts) / ranks.world,
        candidates=sampler.num_entities if input_builder.kind == "all" else input_builder.num,
        anchors=anchors,
        with_candidates=with_candidates,
        touched=touched,
        speakers=_speakers(part.speakers, method, config),
        columns=travel.columns,
        per_query=travel.per_query,
        widths=travel.widths,
        constants=travel.constants,
        updates=travel.updates,
        totals=travel.totals,
        constant_columns=travel.constant_columns,
        shared=travel.shared,
        dense=sum(t.numel() for t in [*learning.values(), *method.evaluators.values()]) + travel.dense,
        terms=TERMS,
        number_bytes=method.student.relation.element_size(),
        fixed=sampler.balanced is not None,
        clipped=bool(config.optimizer.clip),
        parts=len(parts),
    )


def _count(input_builder: StepInputBuilder, part: Batch) -> tuple[float, float, float]:
    # Distinct rows this rank needs of others for anchors and answers, the same with candidates, rows it touches here.
    rank, sampler = input_builder.ranks.rank, input_builder.sampler
    cuts, (lo, hi) = input_builder.cuts_of(part), input_builder.cuts[rank : rank + 2]
    mine = part.part(cuts[rank], cuts[rank + 1])
    positives, everyone = (torch.cat([b.queries.anchor, b.queries.answer]) for b in (mine, part))
    drawn, drawn_by_all = input_builder.drawn(mine), input_builder.drawn(part)
    if drawn is None or drawn_by_all is None:
        with_candidates, touched = float(sampler.num_entities - (hi - lo)), float(hi - lo)
    else:
        everything = torch.unique(torch.cat([everyone, drawn_by_all.reshape(-1)]))
        touched = float(((everything >= lo) & (everything < hi)).sum())
        with_candidates = _foreign(torch.cat([positives, drawn.reshape(-1)]), lo, hi)
    anchors = _foreign(positives, lo, hi)
    if sampler.balanced is not None:
        # Nothing is de-duplicated in balanced batches, but for a shared list of candidates.
        others = input_builder.ranks.world - 1
        anchors = float(sampler.balanced.per_pair * others)
        if input_builder.grouped and drawn is not None:
            with_candidates = anchors + drawn.numel() * others / input_builder.ranks.world
    return anchors, with_candidates, touched


def choose_communication(input_builder: StepInputBuilder, method: Method[Any], config: StageOptions) -> str:
    """Give `input_builder` the configured move, or the one that sends less for the first batch; the line that says
    so."""
    if config.move != "auto":
        input_builder.move = config.move
    shape = shape_of(input_builder, method, config)
    if config.move == "auto":
        # With nobody to send to, what needs the fewest copies.
        alone: Move = "rows" if input_builder.grouped else "queries"
        input_builder.move = alone if shape.world == 1 else choose(shape)
    for one in method.further_inputs():
        one.input_builder.move = input_builder.move
    return announcement(input_builder, shape, config)


def expected_memory(input_builder: StepInputBuilder, shape: Shape) -> dict[str, float]:
    """Bytes per rank by purpose (see `cost.memory`)."""
    return memory(shape, input_builder.move, lambda numbers: numbers_at_once(numbers, input_builder.ranks.device))


def announcement(input_builder: StepInputBuilder, shape: Shape, config: StageOptions) -> str:
    """One line: what travels, its expected bytes, and the expected memory, per rank."""
    held = expected_memory(input_builder, shape)
    holds = f"memory per rank {human(sum(held.values()))} ({_listed(held)})"
    if shape.world == 1:
        return f"one rank, nothing travels; {holds}"
    sends = traffic(shape, input_builder.move)
    why = "chosen" if config.move == "auto" else "as configured"
    other = "rows" if input_builder.move == "queries" else "queries"
    instead = human(sum(traffic(shape, other).values()))
    what = {"queries": "queries travel", "rows": "candidate rows travel", "nothing": "candidates from the own shard"}
    return (
        f"{what[input_builder.move]} ({why}; with {other} it would be {instead}): "
        f"{human(sum(sends.values()))} per step and rank ({_listed(sends)}); {holds}"
    )


def _speakers(models: list[tuple[Model, bool]], method: Method[Any], config: StageOptions) -> list[Speaker]:
    # A model that speaks again travels again, but it is in memory once.
    found, seen = [], set()
    trained = [(group, id(model)) for group, model in method.trained.items()]
    for model, learns in models:
        scorer, first = model.scorer, id(model) not in seen
        groups = [group for group, one in trained if one == id(model) and first]
        size = scorer.entity_size
        numbers = sum(state_numbers(method.recipe(group, config.optimizer).name, size) for group in groups)
        row_bytes = model.entity.weight.element_size() if first else 0
        query = scorer.query_size if method.asks(model) else 0
        found.append(Speaker(size, query, learns, row_bytes, numbers))
        seen.add(id(model))
    return found


def _foreign(ids: Tensor, lo: int, hi: int) -> float:
    distinct = torch.unique(ids)
    return float(((distinct < lo) | (distinct >= hi)).sum())


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {human(value)}" for name, value in parts.items() if value >= 1)
