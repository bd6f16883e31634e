"""The smallest student that a budget allows: bytes, milliseconds per query, and how much of the teacher is kept.

One croppable model (method med) gives the MRR of every crop, on validation for the choice and on test for showing.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import Queries
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.prediction import top_k
from distkgd.methods.med import MedConfig, sub_dims
from distkgd.models.export import export_model
from distkgd.models.model import Model
from distkgd.models.model_folder import bytes_on_disk
from distkgd.models.run_paths import stage_folder
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.autoconfig.request import Budget
from distkgd.pipeline.config import StageConfig, alone, resized
from distkgd.pipeline.plan import Addition, run_stage, valid_mrr
from distkgd.pipeline.stage_job import Run, finished_model, fresh_model, load_teacher, stage_seed
from distkgd.pipeline.stages import Stage
from distkgd.reporting.report import told_better
from distkgd.reporting.run_report import Figures, Verdict
from distkgd.scorers import build_scorer

ANSWERS = 10
QUERIES, WARM_QUERIES = 30, 5
OTHER_BYTES = 4096  # config.json, the model card and the headers of the tables: at most


def pick(found: Sequence[Figures], budget: Budget) -> Figures | None:
    """The size that the budget means: the smallest that meets it all; without `min_retained` every small model would
    do, so the best on validation of those that fit. Of equals the smaller one; None where none fits."""
    fit = sorted((one for one in found if fits(one, budget)), key=lambda one: one.dim)
    if not fit or budget.min_retained is not None:
        return next(iter(fit), None)
    return max(fit, key=lambda one: one.valid or 0.0)


def nearest(found: Sequence[Figures], budget: Budget) -> Figures:
    """The best of sizes none of which meets the budget: of those that are small and quick enough the one that keeps
    most, and where there is none the smallest."""
    affordable = Budget(budget.max_mb, budget.max_ms)
    able = [one for one in found if fits(one, affordable)]
    return max(able, key=lambda one: one.retained or 0.0) if able else min(found, key=lambda one: one.dim)


def fits(one: Figures, budget: Budget) -> bool:
    """Whether a size meets all limits of a budget; what is not known yet counts as met."""
    small = budget.max_mb is None or one.bytes <= 1e6 * budget.max_mb
    quick = budget.max_ms is None or one.ms <= budget.max_ms
    kept = budget.min_retained is None or one.retained is None or one.retained >= budget.min_retained
    return small and quick and kept


def out_of_reach(run: Run, config: StageConfig, dim: int, budget: Budget) -> str | None:
    """Why no training can meet the budget with a student of `dim` numbers, None where it may. All ranks call it."""
    model = fresh_model(run, config, dim, stage_seed(run.config.seed, "student"))
    found = measured(model, run.graph)
    return None if fits(found, budget) else f"not reachable: {budget}; before any training, {found}"


def smallest_dim(config: StageConfig) -> int:
    """Of the students that a stage makes: its smallest crop, or its own dim."""
    scorer = build_scorer(config.scorer, config.dim, config.margin, config.norm)
    return sub_dims(config.distill, scorer)[0] if isinstance(config.distill, MedConfig) else config.dim


def measured(model: Model, graph: Graph) -> Figures:
    """Bytes and milliseconds of a model, trained or not. All ranks call it."""
    return Figures(model.scorer.dim, export_bytes(model, graph), query_ms(model, graph))


def export_bytes(model: Model, graph: Graph) -> int:
    """What `launch/export.py` writes of a model: tables and names exactly, beside them `OTHER_BYTES`."""
    table, relation = model.entity, model.relation
    tables = table.total * table.dim * table.shard.dtype.itemsize + relation.numel() * relation.element_size()
    return tables + _name_bytes(graph.entities) + _name_bytes(graph.relations) + OTHER_BYTES


def query_ms(model: Model, graph: Graph) -> float:
    """Median milliseconds of a top-10 query asked alone, as `launch/predict.py` asks it. All ranks call it."""
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


def judge_student(run: Run, results: list[StageResult], *, budget: Budget) -> Addition:
    """Whether the student of a plan of teacher, student and direct meets the budget. All ranks call it."""
    student, teacher = run.results["student"], run.config.teacher
    found = measured(finished_model(run, "student"), run.graph)
    whole = None if teacher is None else valid_mrr(run, teacher if isinstance(teacher, str) else "teacher")
    judged = _with_mrr(found, {split: student.mrr(split) for split in run.splits}, whole)
    met = judged if fits(judged, budget) else None
    direct = next((one for one in results if one.name == "direct" and one.dim == judged.dim), None)
    return _verdict(budget, met, [judged], f"student: {judged}", direct)


def select_for_budget(run: Run, results: list[StageResult], *, budget: Budget) -> Addition:
    """Choose the crop, export it as the stage student_DIM, and train the direct model of its dim. All ranks call it."""
    student = run.results["student"]
    curve = student.curve
    model, largest = load_teacher(run, "student"), max(curve["valid"])
    found = [
        _with_mrr(
            measured(model.crop(dim), run.graph),
            {split: curve[split][dim]["mrr"] for split in run.splits},
            curve["valid"][largest]["mrr"],
        )
        for dim in sorted(curve["valid"])
    ]
    chosen = pick(found, budget)
    if chosen is None:
        return _verdict(budget, None, found, f"best was {nearest(found, budget)}")
    folder = stage_folder(run.folder, f"student_{chosen.dim}")

    def write() -> None:
        if not (folder / "model").exists():
            folder.mkdir(parents=True, exist_ok=True)
            export_model(stage_folder(run.folder, "student"), folder / "model", "safetensors", Ranks(), chosen.dim)

    on_first(run.ranks, write)
    figures: dict[str, Any] = {split: of_dim[chosen.dim] for split, of_dim in curve.items()}
    crop = StageResult(
        name=folder.name,
        method="crop",
        scorer=student.scorer,
        dim=chosen.dim,
        biases=student.biases,
        bytes=bytes_on_disk(folder),
        teachers=("student",),
        **figures,
    )
    config = alone(resized(run.config.student, chosen.dim, {"method": "scratch"}, "direct"))
    direct = run_stage(run, Stage("direct", config, ()))
    where = f"the first of {largest} numbers, exported to {folder}: {chosen}"
    return _verdict(budget, chosen, found, where, direct)._replace(results=(crop, direct))


def _with_mrr(found: Figures, mrr: Mapping[str, float | None], whole: float | None) -> Figures:
    valid = mrr["valid"]
    retained = valid / whole if valid is not None and whole else None
    return Figures(found.dim, found.bytes, found.ms, valid, mrr.get("test"), retained)


def _verdict(
    budget: Budget, met: Figures | None, found: Sequence[Figures], sentence: str, direct: StageResult | None = None
) -> Addition:
    word = "not reachable" if met is None else "met"
    chosen = None if met is None else met.dim
    verdict = Verdict(wanted=asdict(budget), met=met is not None, chosen=chosen, sizes=tuple(found))
    remarks = [f"Budget ({budget}): {word}; {sentence}."]
    if met is not None and direct is not None:
        better = told_better(direct.mrr("valid"), met.valid, "the chosen student")
        remarks += [better] if better else []
    return Addition(remarks=remarks, budget=verdict)


def _name_bytes(vocabulary: Vocabulary) -> int:
    # `id<TAB>name`, and the same of labels where there are any.
    number = len(vocabulary)
    digits = sum(number - 10**k for k in range(len(str(max(number - 1, 0)))) if k) + number
    columns = [column for column in (vocabulary.names, vocabulary.labels) if column is not None]
    return sum(int(column.str.len_bytes().fill_null(0).sum()) + digits + 2 * number for column in columns)
