"""What travels between ranks in a stage: its first batch is looked at, the cheaper way is taken, and it is said."""

import torch
from torch import Tensor

from distkgd.config import StageConfig
from distkgd.distributed.cost import Shape, Speaker, choose, human, memory, traffic
from distkgd.distributed.optim import state_numbers
from distkgd.distributed.rows import BLOCK_NUMBERS
from distkgd.methods import Method
from distkgd.model import Move, SceneBuilder

TERMS = 4  # loss terms of a usual method; they cost a few bytes


def shape_of(scenes: SceneBuilder, method: Method, config: StageConfig, step: int = 0) -> Shape:
    """The shape of one step, its distinct ids counted in the batch of `step`; means over ranks, the same on each."""
    ranks, sampler = scenes.ranks, scenes.sampler
    part = scenes.parts(step, config.accumulate)[0]
    cuts = scenes.cuts_of(part)
    mine = part.part(cuts[ranks.rank], cuts[ranks.rank + 1])
    lo, hi = scenes.cuts[ranks.rank], scenes.cuts[ranks.rank + 1]
    positives = torch.cat([mine.queries.anchor, mine.queries.answer])
    everyone = torch.cat([part.queries.anchor, part.queries.answer])
    drawn, drawn_by_all = scenes.drawn(mine), scenes.drawn(part)
    if sampler.balanced is not None:
        anchors = float(sampler.balanced.per_pair * (ranks.world - 1))
        with_candidates = anchors + (0 if drawn is None else drawn.numel() * (ranks.world - 1) / ranks.world)
    elif drawn is None:
        anchors, with_candidates = _foreign(positives, lo, hi), float(sampler.num_entities - (hi - lo))
    else:
        anchors = _foreign(positives, lo, hi)
        with_candidates = _foreign(torch.cat([positives, drawn.reshape(-1)]), lo, hi)
    if drawn_by_all is None:
        touched = float(hi - lo)
    else:
        everything = torch.unique(torch.cat([everyone, drawn_by_all.reshape(-1)]))
        touched = float(((everything >= lo) & (everything < hi)).sum())
    means = torch.tensor([anchors, with_candidates, touched], dtype=torch.float64, device=ranks.device)
    anchors, with_candidates, touched = (ranks.all_reduce(means) / ranks.world).tolist()
    parts, travel = config.accumulate, method.travel()
    learning = [model for model, learns in method.speakers() if learns]
    return Shape(
        world=ranks.world,
        entities=sampler.num_entities,
        queries=part.sides * len(part.triples) * parts / ranks.world,
        candidates=sampler.num_entities if drawn is None else scenes.num,
        anchors=anchors * parts,
        with_candidates=with_candidates * parts,
        touched=touched,
        speakers=_speakers(method, config),
        columns=travel.columns,
        per_query=travel.per_query,
        widths=travel.widths,
        dense=sum(m.relation.numel() for m in learning) + sum(t.numel() for t in method.evaluators.values()),
        terms=TERMS,
        number_bytes=method.student.relation.element_size(),
        fixed=sampler.balanced is not None,
        parts=parts,
    )


def choose_move(scenes: SceneBuilder, method: Method, config: StageConfig) -> Move:
    """The configured move, or the one that sends fewer bytes for the first batch."""
    if config.move != "auto":
        return config.move
    if scenes.ranks.world == 1:
        # Nobody to send to: what needs the fewest copies.
        return "rows" if scenes.grouped else "queries"
    return "queries" if choose(shape_of(scenes, method, config)) == "queries" else "rows"


def announcement(scenes: SceneBuilder, method: Method, config: StageConfig) -> str:
    """One line: what travels, its expected bytes, and the expected memory, per rank."""
    shape = shape_of(scenes, method, config)
    held = memory(shape, scenes.move, BLOCK_NUMBERS)
    holds = f"memory per rank {human(sum(held.values()))} ({_listed(held)})"
    if shape.world == 1:
        return f"one rank, nothing travels; {holds}"
    sends = traffic(shape, scenes.move)
    why = "chosen" if config.move == "auto" else "as configured"
    other = "rows" if scenes.move == "queries" else "queries"
    instead = human(sum(traffic(shape, other).values()))
    what = {"queries": "queries travel", "rows": "candidate rows travel", "nothing": "candidates from the own shard"}
    return (
        f"{what[scenes.move]} ({why}; with {other} it would be {instead}): "
        f"{human(sum(sends.values()))} per step and rank ({_listed(sends)}); {holds}"
    )


def _speakers(method: Method, config: StageConfig) -> list[Speaker]:
    trained = list(method.trained.values())
    found = []
    for model, learns in method.speakers():
        scorer, table = model.scorer, model.entity
        numbers = state_numbers(config.optimizer.name, scorer.dim) if any(model is t for t in trained) else 0
        found.append(Speaker(scorer.dim, scorer.query_size, learns, table.weight.element_size(), numbers))
    return found


def _foreign(ids: Tensor, lo: int, hi: int) -> float:
    distinct = torch.unique(ids)
    return float(((distinct < lo) | (distinct >= hi)).sum())


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {human(value)}" for name, value in parts.items() if value >= 1)
