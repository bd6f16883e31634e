"""The student that a budget means: bytes, milliseconds per query, and how much of the teacher is kept.

One croppable model (method med) gives the MRR of every crop, on validation for the choice and on test for showing;
rounded to few bits these are further sizes (`distkgd.pipeline.autoconfig.sizes`). What is chosen of few bits is taught
through the rounding before it is exported, and the better of taught and merely rounded is the student.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.kernels.quantiser import Rounding
from distkgd.methods.med import MedConfig, sub_dims
from distkgd.models.export import export_model
from distkgd.models.model import packed_in_memory
from distkgd.models.model_folder import bytes_on_disk
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.autoconfig import rules
from distkgd.pipeline.autoconfig.request import Budget
from distkgd.pipeline.autoconfig.sizes import WHOLE, fits, looked_at, measured, nearest, pick, with_mrr
from distkgd.pipeline.config import StageConfig
from distkgd.pipeline.plan import Addition, run_stage, valid_mrr
from distkgd.pipeline.stage_job import Run, finished_model, fresh_model, stage_seed
from distkgd.pipeline.stages import Stage, rounding_of, usual_rounding
from distkgd.reporting.report import told_better
from distkgd.reporting.run_report import Figures, Verdict
from distkgd.scorers import build_scorer


def out_of_reach(run: Run, config: StageConfig, budget: Budget, croppable: bool) -> str | None:
    """Why no training can meet the budget with a student of `config`, None where it may. All ranks call it.

    croppable: its crops of all bits are to be chosen from.
    """
    model = fresh_model(run, config, smallest_dim(config), stage_seed(run.config.seed, "student"))
    roundings = [WHOLE, *map(usual_rounding, rules.FEW_BITS)] if croppable else [rounding_of(config)]
    found = [measured(packed_in_memory(model, rounding), run.graph, rounding) for rounding in roundings]
    if any(fits(one, budget) for one in found):
        return None
    return f"not reachable: {budget}; before any training, {nearest(found, budget)}"


def smallest_dim(config: StageConfig) -> int:
    """Of the students that a stage makes: its smallest crop, or its own dim."""
    return crop_dims(config)[0] if isinstance(config.distill, MedConfig) else config.dim


def crop_dims(config: StageConfig) -> tuple[int, ...]:
    """Of the crops of a stage of method med."""
    return sub_dims(config.distill, build_scorer(config.scorer, config.dim, config.margin, config.norm))


def judge_student(run: Run, results: list[StageResult], *, budget: Budget) -> Addition:
    """Whether the student of a plan of teacher, student and direct meets the budget. All ranks call it."""
    student, teacher = run.results["student"], run.config.teacher
    found = measured(finished_model(run, "student"), run.graph, rounding_of(run.config.student))
    whole = None if teacher is None else valid_mrr(run, teacher if isinstance(teacher, str) else "teacher")
    judged = with_mrr(found, {split: student.mrr(split) for split in run.splits}, whole)
    size = judged.dim, judged.bits
    direct = next((one for one in results if one.name == "direct" and (one.dim, one.bits) == size), None)
    met = judged if fits(judged, budget) else None
    return _verdict(budget, met, [judged], "student", f"student: {judged}", direct)


def select_for_budget(run: Run, results: list[StageResult], *, budget: Budget) -> Addition:
    """Choose the crop and its bits, make it the stage student_DIM or student_DIM_BITSbit, and train the direct model
    of its size. All ranks call it.

    Where merely rounding meets no budget, what comes nearest to it of few bits is taught, which may meet it.
    """
    student = run.results["student"]
    found, sentence = looked_at(run, student, budget)
    chosen, made = pick(found, budget), tuple[StageResult, ...]()
    best = chosen or nearest(found, budget)
    if best.bits < 32 and fits(replace(best, retained=None), budget):
        made, one, how = _of_few_bits(run, student, best)
        found.remove(best)
        best = one
        found.append(best)
        sentence = f"{how}; {sentence}"
    elif chosen is not None:
        made = (_crop(run, student, best.dim),)
        sentence = f"the first of {student.dim} numbers, exported to {run.stage_folder(made[0].name)}; {sentence}"
    if not fits(best, budget):
        return _verdict(budget, None, found, None, f"best was {best}; {sentence}")._replace(results=made)
    config = rules.direct_of(run.config.student, best.dim, best.bits)
    direct = run_stage(run, Stage("direct", config, ()))
    added = _verdict(budget, best, found, made[-1].name, f"{best}; {sentence}", direct)
    return added._replace(results=(*made, direct))


def _of_few_bits(run: Run, student: StageResult, size: Figures) -> tuple[tuple[StageResult, ...], Figures, str]:
    """The stages made, the better last; its figures; what it is, in words. size: merely rounded, and ranked."""
    name = f"student_{size.dim}_{size.bits}bit"
    config = rules.few_bits(run.config.student, size.dim, size.bits)
    taught = run_stage(run, Stage(name, config, ("student",)))
    whole = student.mrr("valid")
    figures = with_mrr(size, {split: taught.mrr(split) for split in run.splits}, whole)
    if (figures.valid or 0.0) >= (size.valid or 0.0):
        where = run.stage_folder(name)
        return (taught,), figures, f"taught through its rounding, in {where}; merely rounded {size}"
    rounded = _rounded(run, f"rounded_{size.dim}_{size.bits}bit", size.dim, usual_rounding(size.bits))
    where = run.stage_folder(rounded.name)
    better = with_mrr(size, {split: rounded.mrr(split) for split in run.splits}, whole)
    return (taught, rounded), better, f"merely rounded, exported to {where}, which is better than taught: {figures}"


def _crop(run: Run, student: StageResult, dim: int) -> StageResult:
    name = f"student_{dim}"
    _export(run, name, "safetensors", dim, None)
    figures: dict[str, Any] = {split: of_dim[dim] for split, of_dim in student.curve.items()}
    return StageResult(
        name=name,
        method="crop",
        scorer=student.scorer,
        dim=dim,
        biases=student.biases,
        bytes=bytes_on_disk(run.stage_folder(name)),
        num_entities=student.num_entities,
        teachers=("student",),
        **figures,
    )


def _rounded(run: Run, name: str, dim: int, rounding: Rounding) -> StageResult:
    _export(run, name, "packed", dim, rounding)
    found = run.measured(finished_model(run, name), run.stage_folder(name))
    return StageResult(name=name, method="rounded", teachers=("student",), **found)


def _export(run: Run, name: str, format_: str, dim: int, rounding: Rounding | None) -> None:
    folder = run.stage_folder(name)

    def write() -> None:
        if not (folder / "model").exists():
            folder.mkdir(parents=True, exist_ok=True)
            export_model(run.stage_folder("student"), folder / "model", format_, Ranks(), dim, rounding)

    on_first(run.ranks, write)


def _verdict(
    budget: Budget,
    met: Figures | None,
    found: Sequence[Figures],
    stage: str | None,
    sentence: str,
    direct: StageResult | None = None,
) -> Addition:
    word = "not reachable" if met is None else "met"
    chosen = (None, 32) if met is None else (met.dim, met.bits)
    verdict = Verdict(
        wanted=asdict(budget),
        met=met is not None,
        chosen=chosen[0],
        bits=chosen[1],
        stage=None if met is None else stage,
        sizes=tuple(found),
    )
    remarks = [f"Budget ({budget}): {word}; {sentence}."]
    if met is not None and direct is not None:
        better = told_better(direct.mrr("valid"), met.valid, "the chosen student")
        remarks += [better] if better else []
    return Addition(remarks=remarks, budget=verdict)
