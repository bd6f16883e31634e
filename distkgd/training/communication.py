"""What travels between ranks in a stage: counts the first batch, picks the cheaper communication mode, says so.

Per rank and step, averaged over ranks, with W ranks, R distinct rows that a rank needs of others, and w bytes per
number; the kinds are those of `Ranks.traffic`. R grows with the candidates only if rows travel.

    ids       8 (W - 1) + 8 R                           the counts, then the ids that are asked for; on a GPU none,
                                                        where each rank draws what all ask for
    rows      R times what a rehearsal says of a row    there, and the gradients of tables that learn back
    queries, partials                                   per query, as rehearsed
    dense     2 (W - 1) / W w (replicated + terms + 1)  a ring all-reduce of gradients and loss terms, per update
    control   2 (W - 1) / W 8                           the rows' norm, if gradients are clipped
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distkgd.config.stage import StageOptions
from distkgd.data.sampling import Batch
from distkgd.data.step_inputs import Move, StepInputBuilder
from distkgd.distributed.cost import HeldModel, StepShape, human, memory
from distkgd.distributed.optim.rows import state_numbers
from distkgd.distributed.reductions.candidate_layout import numbers_at_once
from distkgd.methods import Method
from distkgd.methods.base import trained_models
from distkgd.training.rehearsal import Miniature

ID_BYTES = 8


@dataclass(frozen=True)
class Needs:
    """What the batch of one step needs, per rank (means over ranks).

    queries: of a rank. anchors: distinct rows of anchors and answers that other ranks own.
    with_candidates: the same with the candidates, were they looked up.
    touched: distinct rows of the own shard that one part touches (all: the whole shard). parts: of the batch.
    """

    queries: float
    anchors: float
    with_candidates: float
    touched: float
    parts: int

    def rows(self, move: Move) -> float:
        """Rows that a rank looks up elsewhere."""
        return self.with_candidates if move == "rows" else self.anchors


def count_needs(input_builder: StepInputBuilder, step: int, accumulate: int) -> Needs:
    """Of the batch of `step`; all ranks call it and get the same."""
    ranks = input_builder.ranks
    parts = input_builder.parts(step, accumulate)
    counted = torch.tensor([_count(input_builder, part) for part in parts], dtype=torch.float64)
    mine = [*counted[:, :2].sum(0).tolist(), float(counted[:, 2].max())]
    anchors, with_candidates, touched = torch.tensor(ranks.gather_objects(mine)).mean(0).tolist()
    queries = sum(part.sides * len(part.triples) for part in parts) / ranks.world
    return Needs(queries, anchors, with_candidates, touched, len(parts))


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


def _foreign(ids: Tensor, lo: int, hi: int) -> float:
    distinct = torch.unique(ids)
    return float(((distinct < lo) | (distinct >= hi)).sum())


def expected_traffic(
    input_builder: StepInputBuilder, method: Method[Any], config: StageOptions, move: Move, step: int = 0
) -> dict[str, float]:
    """Bytes by kind that a rank hands to collectives in `step` when `move` travels, in the method's present phase."""
    ranks, needs = input_builder.ranks, count_needs(input_builder, step, config.accumulate)
    first, second = (Miniature(input_builder, method, config, move, size) for size in (1, 2))
    further = [one for one in first.made if one.of is not input_builder]
    queries, rows = sum(one.queries for one in further), sum(one.rows for one in further)
    more = [count_needs(one.of, step, 1) for one in further]
    found: dict[str, float] = defaultdict(float, {"ids": 0.0, "rows": 0.0, "dense": 0.0})  # in the order of the line
    for kind in second.sent:
        if kind in ("ids", "rows"):
            continue
        each = (second.sent[kind] - first.sent[kind]) / (second.queries - first.queries)
        fixed = first.sent[kind] - each * first.queries
        found[kind] += each * needs.queries
        if kind in ("queries", "partials"):
            found[kind] += fixed * sum(one.queries for one in more) / max(1, queries)
        else:
            # Sums over ranks in the middle of a step are those of relation tables, and those have more rows.
            size = method.student.num_relations / first.relations if kind == "dense" else 1.0
            found[kind] += fixed * size * needs.parts
    if second.rows > first.rows:
        per_row = (second.sent["rows"] - first.sent["rows"]) / (second.rows - first.rows)
        further_row = (first.sent["rows"] - per_row * first.rows) / max(1, rows)
    else:
        # Every row that there is: as many, then, for further inputs.
        per_row = further_row = first.sent["rows"] / (first.rows + rows)
    found["rows"] += per_row * needs.rows(move) + further_row * sum(one.rows(move) for one in more)
    found["ids"] += _ids(input_builder, needs, move, config.accumulate)
    found["ids"] += sum(_ids(one.of, needed, move, 1) for one, needed in zip(further, more, strict=True))
    ring, number_bytes = 2.0 * (ranks.world - 1) / ranks.world, method.student.relation.element_size()
    for names, terms in first.updates:
        replicated = [tensor for name in names for tensor in method.groups[name].replicated.values()]
        found["dense"] += ring * number_bytes * (sum(tensor.numel() for tensor in replicated) + terms + 1)
        if config.optimizer.clip:
            found["control"] += ring * 8
    return {kind: value for kind, value in found.items() if value}


def _ids(input_builder: StepInputBuilder, needs: Needs, move: Move, accumulate: int) -> float:
    # Bytes of what ranks tell each other of the rows that they look up.
    if input_builder.foresees(input_builder.parts(0, accumulate)[0], move):
        return 0.0
    counts = 0 if input_builder.sampler.balanced is not None else (input_builder.ranks.world - 1) * accumulate
    return ID_BYTES * (needs.rows(move) + counts)


def expected_memory(input_builder: StepInputBuilder, method: Method[Any], config: StageOptions) -> dict[str, float]:
    """Bytes per rank by purpose (see `cost.memory`)."""
    needs, entities = count_needs(input_builder, 0, config.accumulate), input_builder.sampler.num_entities
    shape = StepShape(
        world=input_builder.ranks.world,
        entities=entities,
        queries=needs.queries,
        candidates=entities if input_builder.kind == "all" else input_builder.num,
        touched=needs.touched,
        models=_held(method, config),
        number_bytes=method.student.relation.element_size(),
        parts=needs.parts,
    )
    return memory(shape, input_builder.move, lambda numbers: numbers_at_once(numbers, input_builder.ranks.device))


def _held(method: Method[Any], config: StageOptions) -> list[HeldModel]:
    # Each model once, however many groups train it.
    trained = trained_models(method)
    learning = trained_models(method, method.phase(config.epochs).frozen)
    models = {id(model): model for model in (method.student, *method.teachers, *trained.values())}
    found = []
    for key, model in models.items():
        size = model.scorer.entity_size
        recipes = [method.groups[name].recipe(config.optimizer) for name, one in trained.items() if id(one) == key]
        state = sum(state_numbers(recipe.name, size) for recipe in recipes)
        learns = any(id(one) == key for one in learning.values())
        number_bytes = model.entity.weight.element_size()
        if model.entity.quantiser is not None:  # a rounded copy, and which numbers lie inside of the levels
            number_bytes = 2 * number_bytes + 1
        found.append(HeldModel(size, number_bytes, state, learns))
    return found


def choose_communication(input_builder: StepInputBuilder, method: Method[Any], config: StageOptions) -> str:
    """Give `input_builder` the configured move, or the one that sends less for the first batch; the line that says
    so."""
    # With nobody to send to, what needs the fewest copies.
    alone: Move = "rows" if input_builder.grouped else "queries"
    input_builder.move = alone if config.move == "auto" else config.move
    sends = forecast(input_builder, method, config)
    if config.move == "auto" and len(sends) > 1:
        input_builder.move = "queries" if total(sends["queries"]) <= total(sends["rows"]) else "rows"
    return announcement(input_builder, method, config, sends)


def forecast(
    input_builder: StepInputBuilder, method: Method[Any], config: StageOptions
) -> dict[Move, dict[str, float]]:
    """Expected traffic of the first batch in the method's present phase, for each move; nothing at world 1."""
    if input_builder.ranks.world == 1:
        return {}
    moves: list[Move] = ["rows"] if input_builder.drawn_anchors else ["queries", "rows"]
    if input_builder.move == "nothing":
        moves = ["nothing", "queries"]
    return {move: expected_traffic(input_builder, method, config, move) for move in moves}


def total(sends: dict[str, float]) -> float:
    """Bytes of all kinds."""
    return sum(sends.values())


def announcement(
    input_builder: StepInputBuilder,
    method: Method[Any],
    config: StageOptions,
    sends: dict[Move, dict[str, float]],
) -> str:
    """One line: what travels, its expected bytes (of `forecast`), and the expected memory, per rank."""
    held = expected_memory(input_builder, method, config)
    holds = f"memory per rank {human(total(held))} ({_listed(held)})"
    if not sends:
        return f"one rank, nothing travels; {holds}"
    why = "chosen" if config.move == "auto" else "as configured"
    other: Move = "rows" if input_builder.move == "queries" else "queries"
    what = {"queries": "queries travel", "rows": "candidate rows travel", "nothing": "candidates from the own shard"}
    here = sends[input_builder.move]
    if other in sends:
        why += f"; with {other} it would be {human(total(sends[other]))}"
    return f"{what[input_builder.move]} ({why}): {human(total(here))} per step and rank ({_listed(here)}); {holds}"


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {human(value)}" for name, value in parts.items() if value >= 1)
