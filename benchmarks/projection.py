"""What a step would send on machines that were not measured: the closed formula of a plain step's traffic.

Per rank and step, with W ranks, Q queries of this rank, R distinct rows it needs of others, and w bytes per number:

    ids       8 (W - 1) + 8 R
    rows      R w (sum of dims, twice for tables that learn)
    queries   (W - 1) Q w (sum of widths, twice if they learn)    if queries travel
    partials  2 (W - 1) Q w columns                               if queries travel
    dense     2 (W - 1) / W w (replicated + terms + 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distkgd.distributed.cost import HeldModel, StepShape

TERMS = 4  # loss terms of a usual method


@dataclass(frozen=True)
class Projection:
    """A step of 1-to-many scores.

    shape: what it holds; each of its models sends queries as wide as its rows.
    anchors, with_candidates: distinct rows of anchors and answers that other ranks own, and with the candidates.
    columns: partial sums per query. replicated: numbers in relation tables that learn.
    """

    shape: StepShape
    anchors: float
    with_candidates: float
    columns: int
    replicated: int


def projected(entities: int, world: int, kind: str, dim: int, triples: int = 1024) -> Projection:
    """A step of `triples` per GPU; every id distinct, an upper bound.

    kind: chunk, 256 negatives per 64 triples; or all, with a teacher of 256 numbers.
    """
    models = [HeldModel(dim, row_bytes=4, state_numbers=1, learns=True)]
    anchors = 2.0 * triples * (world - 1) / world
    drawn = triples / 64 * 256 * (world - 1) / world if kind == "chunk" else entities * (world - 1) / world
    if kind == "all":
        models.append(HeldModel(256, row_bytes=4, state_numbers=0, learns=False))
    shape = StepShape(
        world=world,
        entities=entities,
        queries=2.0 * triples,
        candidates=256 if kind == "chunk" else entities,
        touched=anchors + drawn,
        models=models,
        number_bytes=4,
    )
    return Projection(shape, anchors, anchors + drawn, columns=2 if kind == "chunk" else 4, replicated=2 * 1000 * dim)


def traffic(step: Projection, move: str) -> dict[str, float]:
    """Bytes that a rank hands to collectives in one step, by kind, when `move` travels."""
    shape, others = step.shape, step.shape.world - 1
    needed, w = step.with_candidates if move == "rows" else step.anchors, shape.number_bytes
    numbers = _there_and_back(shape.models)
    found = {
        "ids": 8.0 * needed + 8.0 * others,
        "rows": needed * numbers * w,
        "dense": 2.0 * others / shape.world * (step.replicated + TERMS + 1) * w,
    }
    if move == "queries":
        found["queries"] = others * shape.queries * numbers * w
        found["partials"] = 2.0 * others * shape.queries * step.columns * w
    return found


def choose(step: Projection) -> Literal["queries", "rows"]:
    """The move that sends less; queries on a tie."""
    queries, rows = (sum(traffic(step, move).values()) for move in ("queries", "rows"))
    return "queries" if queries <= rows else "rows"


def _there_and_back(models: Sequence[HeldModel]) -> int:
    return sum(model.dim * (2 if model.learns else 1) for model in models)
