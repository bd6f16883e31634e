"""What one step sends and holds, per rank, from the shapes of its batch alone; decides what travels.

Per rank and step, averaged over ranks, with W ranks, Q queries of this rank, R distinct rows it needs of others, and
w bytes per number; the kinds are those of `Ranks.traffic`:

    ids       8 (W - 1) + 8 R                                   the counts, then the ids that are asked for
    rows      R w (sum of dims, twice for tables that learn)    there, and their gradients back
    queries   (W - 1) Q w (sum of widths, twice if they learn)  if queries travel
    partials  2 (W - 1) Q w columns                             if queries travel; columns <= 5 for one loss; those
                                                                of models that do not learn count once
    dense     2 (W - 1) / W w (replicated + terms + 1)          a ring all-reduce of gradients and loss terms
    totals    2 (W - 1) parts w totals                          sums over the whole batch, and their gradients
    control   2 (W - 1) / W 8                                   the rows' norm, if gradients are clipped
              (W - 1) w shared                                  what normalises over the batch

No term has queries times candidates in it. R grows with the candidates only if rows travel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Speaker:
    """A model that scores in a step.

    dim, query: numbers per entity row and per projected query. row_bytes: per stored number of a row.
    state_numbers: of the row optimiser, per row.
    """

    dim: int
    query: int
    learns: bool
    row_bytes: int
    state_numbers: int


@dataclass(frozen=True)
class Shape:
    """One step of a stage, per rank (means over ranks).

    entities: of the whole graph. queries: of this rank. candidates: per query, over all ranks.
    anchors: distinct rows of anchors and answers that other ranks own.
    with_candidates: the same with the candidates, were they looked up.
    touched: distinct rows of the own shard that one part touches (all: the whole shard).
    columns, per_query, widths, constants, totals, constant_columns, shared: see `losses.Travel`.
    dense: numbers in replicated tensors that learn.
    fixed: whether batches are balanced. clipped: whether gradients are. parts: into which the batch is cut.
    updates: beside the first. also: further step inputs of the step, whose replicated tensors are counted here.
    """

    world: int
    entities: int
    queries: float
    candidates: int
    anchors: float
    with_candidates: float
    touched: float
    speakers: Sequence[Speaker]
    columns: int
    per_query: int
    widths: Sequence[tuple[int, bool]]
    dense: int
    terms: int
    number_bytes: int
    fixed: bool = False
    clipped: bool = False
    parts: int = 1
    constants: int = 0
    updates: int = 0
    also: Sequence["Shape"] = ()
    totals: int = 0
    constant_columns: int = 0
    shared: int = 0


def traffic(shape: Shape, move: str) -> dict[str, float]:
    """Bytes that a rank hands to collectives in one step, by kind, when `move` travels."""
    others, w = shape.world - 1, shape.number_bytes
    needed = shape.with_candidates if move == "rows" else shape.anchors
    row_numbers = sum(s.dim * (2 if s.learns else 1) for s in shape.speakers)
    found = {
        "ids": 8.0 * needed + (0.0 if shape.fixed else 8.0 * others * shape.parts),
        "rows": needed * row_numbers * w,
        "dense": 2.0 * others / shape.world * (shape.dense + shape.terms + 1 + 2 * shape.updates) * w,
    }
    if shape.totals:
        found["totals"] = 2.0 * others * shape.parts * shape.totals * w
    if shape.clipped:
        found["control"] = 2.0 * others / shape.world * 8 * (1 + shape.updates)
    if shape.shared:
        found["control"] = found.get("control", 0.0) + float(others * shape.shared * w * shape.parts)
    if move == "queries":
        widths = [(s.query, s.learns) for s in shape.speakers] + list(shape.widths)
        widths += [(shape.per_query, True), (shape.constants, False)]
        numbers = sum(width * (2 if learns else 1) for width, learns in widths)
        found["queries"] = others * shape.queries * numbers * w
        found["partials"] = others * shape.queries * (2.0 * shape.columns + shape.constant_columns) * w
    for other in shape.also:
        sent = traffic(other, move)
        found |= {kind: found[kind] + sent[kind] for kind in ("ids", "rows", "queries", "partials") if kind in sent}
    return found


def memory(shape: Shape, move: str, at_once: Callable[[float], float]) -> dict[str, float]:
    """Bytes that a rank holds: tables, optimiser state, gradients, and the working set of one block of scores.

    at_once: how many of so many scores exist at the same time.
    """
    shard, w = shape.entities / shape.world, shape.number_bytes
    whole = shape.candidates >= shape.entities and move != "rows"
    learning = [s for s in shape.speakers if s.learns]
    met = shape.queries / shape.parts * (shape.world if move == "queries" else 1)
    numbers = met * (shape.candidates / (shape.world if move == "queries" else 1))
    fields = len(shape.speakers) + len(shape.widths)
    return {
        "tables": shard * sum(s.dim * s.row_bytes for s in shape.speakers),
        "state": shard * sum(s.state_numbers for s in shape.speakers) * w,
        "gradients": sum(s.dim * (shard * s.row_bytes if whole else 2 * shape.touched * w) for s in learning),
        # A block's scores, what the losses make of them, and as much again in backward.
        "scores": (2 * fields + 4) * at_once(numbers) * w,
    }


def choose(shape: Shape) -> Literal["queries", "rows"]:
    """The move that sends less; queries on a tie, and when there is nobody to send to."""
    queries, rows = (sum(traffic(shape, move).values()) for move in ("queries", "rows"))
    return "queries" if queries <= rows else "rows"


def human(num_bytes: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
