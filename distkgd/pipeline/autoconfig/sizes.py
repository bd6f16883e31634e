"""The sizes that a budget chooses from, crops of one model, rounded or not: what they take, how good they are.

It is taken that no crop ranks better with fewer numbers or fewer bits. So of the rounded ones only those are ranked
that can still be the choice, from the best expectation on.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch

from distkgd.common.files import write_atomic
from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import Queries
from distkgd.distributed.node_sharing import on_first
from distkgd.evaluation.prediction import top_k
from distkgd.kernels.quantiser import Rounding
from distkgd.models.model import Model, packed_in_memory
from distkgd.models.model_folder import read_json, table_bytes
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.autoconfig.request import Budget
from distkgd.pipeline.autoconfig.rules import FEW_BITS
from distkgd.pipeline.stage_job import Run, load_teacher
from distkgd.pipeline.stages import usual_rounding
from distkgd.reporting.run_report import Figures

WHOLE = Rounding(32, 32)
SIZES = "sizes.json"  # in the run folder: what was looked at
ANSWERS = 10
QUERIES, WARM_QUERIES = 30, 5
OTHER_BYTES = 4096  # config.json, the model card and the headers of the tables: at most


class Size(NamedTuple):
    """A crop to `dim` of so many bits, and what its export takes."""

    dim: int
    bits: int
    bytes: int


def pick(found: Sequence[Figures], budget: Budget) -> Figures | None:
    """The size that the budget means: of the fewest bytes that meets it all; without `min_retained` every small model
    would do, so the best on validation of those that fit. Of equals the smaller one; None where none fits."""
    fit = sorted((one for one in found if fits(one, budget)), key=lambda one: one.bytes)
    if not fit or budget.min_retained is not None:
        return next(iter(fit), None)
    return max(fit, key=lambda one: one.valid or 0.0)


def nearest(found: Sequence[Figures], budget: Budget) -> Figures:
    """The best of sizes none of which meets the budget: of those that are small and quick enough the one that keeps
    most, and where there is none the smallest."""
    able = [one for one in found if affordable(one, budget)]
    return max(able, key=lambda one: one.retained or 0.0) if able else min(found, key=lambda one: one.bytes)


def fits(one: Figures, budget: Budget) -> bool:
    """Whether a size meets all limits of a budget; what is not known yet counts as met."""
    kept = budget.min_retained is None or one.retained is None or one.retained >= budget.min_retained
    return affordable(one, budget) and kept


def affordable(one: Figures, budget: Budget) -> bool:
    """Whether a size is as small and as quick as a budget asks for."""
    small = budget.max_mb is None or one.bytes <= 1e6 * budget.max_mb
    return small and (budget.max_ms is None or one.ms <= budget.max_ms)


def search(crops: Sequence[Figures], sizes: Sequence[Size], budget: Budget, look: Callable[[Size], Figures]) -> int:
    """Which of the rounded `sizes` the budget may mean: `look` is asked for these alone. Returns how many they were.

    crops: those in full precision, all ranked. `look` ranks what is quick enough and returns what it found.
    """
    found, left = list(crops), sorted(sizes, key=lambda size: size.bytes)

    def expected(size: Size) -> float:
        above = [one for one in found if one.dim >= size.dim and one.bits >= size.bits]
        return min(one.valid for one in above if one.valid is not None)

    def ask(size: Size) -> None:
        left.remove(size)
        found.append(look(size))

    if budget.min_retained is not None:
        goal = budget.min_retained * (max(crops, key=lambda one: one.dim).valid or 0.0)
        while True:
            least = min((one.bytes for one in found if fits(one, budget)), default=math.inf)
            able = [size for size in left if size.bytes < least and expected(size) >= goal]
            if not able:
                break
            ask(able[len(able) // 2])  # what it says rules out the larger ones, or many of the smaller ones
        if least < math.inf:
            return len(found) - len(crops)
    while True:
        best = max((one.valid for one in found if affordable(one, budget) and one.valid is not None), default=-math.inf)
        able = [size for size in left if expected(size) > best]
        if not able:
            return len(found) - len(crops)
        ask(max(able, key=lambda size: (expected(size), size.bits)))


def most_ranked(num_dims: int) -> int:
    """How many rounded sizes `search` ranks at most, of a model with so many crops."""
    return num_dims + 2


def looked_at(run: Run, student: StageResult, budget: Budget) -> tuple[list[Figures], str]:
    """The sizes of a croppable student that the budget may mean, and a sentence on those that were not looked at.

    All ranks call it. Every crop in full precision is among them. They are kept in the run folder: measured again, a
    resumed run might choose another one.
    """
    path, about = run.folder / SIZES, {"budget": asdict(budget), "student": student.digest}
    kept = run.ranks.gather_objects(read_json(path) if run.ranks.first and path.is_file() else None)[0]
    if kept is not None and kept["about"] == about:
        return [Figures(**one) for one in kept["sizes"]], kept["sentence"]
    found, sentence = _looked_at(run, student, budget)
    content = {"about": about, "sentence": sentence, "sizes": [asdict(one) for one in found]}
    on_first(run.ranks, lambda: write_atomic(path, json.dumps(content, indent=2) + "\n"))
    return found, sentence


def _looked_at(run: Run, student: StageResult, budget: Budget) -> tuple[list[Figures], str]:
    model, curve = load_teacher(run, "student"), student.curve
    dims = sorted(curve["valid"])
    whole = curve["valid"][dims[-1]]["mrr"]
    crops = [
        with_mrr(measured(model.crop(dim), run.graph), {split: curve[split][dim]["mrr"] for split in run.splits}, whole)
        for dim in dims
    ]
    names, found = names_bytes(run.graph), list(crops)
    how = {bits: usual_rounding(bits).quantisers(model.scorer) for bits in FEW_BITS}
    every = [Size(dim, bits, table_bytes(model, dim, how[bits]) + names) for dim in dims for bits in FEW_BITS]
    small = [one for one in every if budget.max_mb is None or one.bytes <= 1e6 * budget.max_mb]

    def look(size: Size) -> Figures:
        rounding = usual_rounding(size.bits)
        rounded = packed_in_memory(model.crop(size.dim), rounding)
        figures = measured(rounded, run.graph, rounding)
        if affordable(figures, budget):
            mrr = {split: run.evaluate(rounded, split)[0].get("mrr") for split in run.splits}
            figures = with_mrr(figures, mrr, whole)
        found.append(figures)
        return figures

    number = search(crops, small, budget, look)
    said = f"of {len(every)} sizes rounded to {', '.join(map(str, FEW_BITS))} bits {len(small)} are small enough, and "
    return found, said + f"{number} were looked at: the others cannot be expected to be chosen"


def measured(model: Model, graph: Graph, rounding: Rounding = WHOLE) -> Figures:
    """Bytes and milliseconds of a model, trained or not, whose tables are packed as `rounding` says.

    model: as it would be loaded. All ranks call it.
    """
    tables, ms = table_bytes(model, how=rounding.quantisers(model.scorer)), query_ms(model, graph)
    return Figures(model.scorer.dim, tables + names_bytes(graph), ms, bits=rounding.bits, tables=tables)


def with_mrr(figures: Figures, mrr: Mapping[str, float | None], whole: float | None) -> Figures:
    """`figures` with MRRs by split. whole: the valid MRR of the teacher."""
    valid = mrr["valid"]
    retained = valid / whole if valid is not None and whole else None
    return replace(figures, valid=valid, test=mrr.get("test"), retained=retained)


def query_ms(model: Model, graph: Graph) -> float:
    """Median milliseconds of a top-10 query asked alone, as `distkgd predict` asks it. All ranks call it."""
    triples = next(part for part in (graph.test, graph.valid, graph.train) if len(part))
    triples = triples[torch.arange(QUERIES + WARM_QUERIES) % len(triples)].to(model.relation.device)
    side = torch.zeros(1, dtype=torch.int64, device=triples.device)
    seconds = []
    for triple in triples:
        head, relation, tail = triple.split(1)
        begun = time.perf_counter()
        scores, _ = top_k(model, Queries(head, relation, side, tail), ANSWERS)
        scores.tolist()  # a GPU has finished only now
        seconds.append(time.perf_counter() - begun)
    ms = 1000 * statistics.median(seconds[WARM_QUERIES:])
    return float(model.entity.ranks.gather_objects(ms)[0])


def names_bytes(graph: Graph) -> int:
    """What `distkgd export` writes beside a model's tables: names exactly, besides `OTHER_BYTES`."""
    return _vocabulary_bytes(graph.entities) + _vocabulary_bytes(graph.relations) + OTHER_BYTES


def _vocabulary_bytes(vocabulary: Vocabulary) -> int:
    # `id<TAB>name`, and the same of labels where there are any.
    number = len(vocabulary)
    digits = sum(number - 10**k for k in range(len(str(max(number - 1, 0)))) if k) + number
    columns = [column for column in (vocabulary.names, vocabulary.labels) if column is not None]
    return sum(int(column.str.len_bytes().fill_null(0).sum()) + digits + 2 * number for column in columns)
