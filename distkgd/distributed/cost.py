"""What one step holds on a rank, from the shapes of its models and its batch alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldModel:
    """A model that a step works with.

    dim: numbers per entity row. row_bytes: per stored number of a row. state_numbers: of the row optimiser, per row.
    """

    dim: int
    row_bytes: int
    state_numbers: int
    learns: bool


@dataclass(frozen=True)
class StepShape:
    """One step of a stage, per rank (means over ranks).

    entities: of the whole graph. queries: of this rank. candidates: per query, over all ranks.
    touched: distinct rows of the own shard that one part touches (all: the whole shard).
    number_bytes: of a number in computation. parts: into which the batch is cut.
    """

    world: int
    entities: int
    queries: float
    candidates: int
    touched: float
    models: Sequence[HeldModel]
    number_bytes: int
    parts: int = 1


def memory(shape: StepShape, move: str, at_once: Callable[[float], float]) -> dict[str, float]:
    """Bytes that a rank holds: tables, optimiser state, gradients, and the working set of one block of scores.

    at_once: how many of so many scores exist at the same time.
    """
    shard, w = shape.entities / shape.world, shape.number_bytes
    whole = shape.candidates >= shape.entities and move != "rows"
    learning = [model for model in shape.models if model.learns]
    met = shape.queries / shape.parts * (shape.world if move == "queries" else 1)
    numbers = met * (shape.candidates / (shape.world if move == "queries" else 1))
    return {
        "tables": shard * sum(model.dim * model.row_bytes for model in shape.models),
        "state": shard * sum(model.state_numbers for model in shape.models) * w,
        "gradients": sum(m.dim * (shard * m.row_bytes if whole else 2 * shape.touched * w) for m in learning),
        # A block's scores, what the losses make of them, and as much again in backward.
        "scores": (2 * len(shape.models) + 4) * at_once(numbers) * w,
    }


def human(num_bytes: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
