"""What a student's bytes would carry beside it: the numbers of its teacher in fewer bits, or the first of them."""

from distkgd.common.text import fixed
from distkgd.kernels.quantiser import BITS
from distkgd.models.model_folder import table_bytes
from distkgd.models.stage_result import Rounded, StageResult
from distkgd.pipeline.plan import Addition
from distkgd.pipeline.stage_job import Run, load_teacher

ROOM = 1.05  # times the student's bytes are the same


def beside_student(run: Run, results: list[StageResult]) -> Addition:
    """A sentence on that, and the teacher's result with what was ranked for it. All ranks call it.

    Nothing where the student has no teacher, or one of few bits. The teacher is merely rounded: to the most bits that
    fit, or where none do to the fewest there are.
    """
    (name, given), student = next(iter(run.config.all_teachers().items())), run.results["student"]
    known = [*results, *(one for result in results for one in result.brought)]
    teacher = next((one for one in known if one.name == name), None)
    if given is None or teacher is None or teacher.bits < 32:
        return Addition()
    model, room = load_teacher(run, given if isinstance(given, str) else name), ROOM * student.bytes
    how = {bits: run.rounding(bits, teacher.dim).quantisers(model.scorer) for bits in BITS if bits < 32}
    sizes = {bits: table_bytes(model, how=one) for bits, one in how.items()}
    bits = max((bits for bits, size in sizes.items() if size <= room), default=min(sizes))
    found = teacher.rounded.get(bits) or run.rounded(model, bits)
    remark = _sentence(run, student, teacher, bits, found) + _first_numbers(run, teacher, room)
    new = teacher.model_copy(update={"rounded": {**teacher.rounded, bits: found}})
    if teacher.source is None:
        return Addition(results=(new,), remarks=(remark,))
    of_students = [
        one.model_copy(update={"brought": tuple(new if other is teacher else other for other in one.brought)})
        for one in results
        if teacher in one.brought
    ]
    return Addition(results=of_students, remarks=(remark,))


def _sentence(run: Run, student: StageResult, teacher: StageResult, bits: int, found: Rounded) -> str:
    entities = run.graph.num_entities
    mrr = ", ".join(f"{split} MRR {fixed(found.mrr(split))}" for split in run.splits)
    own = ", ".join(fixed(student.mrr(split)) for split in run.splits)
    cure = f"--to {teacher.dim} --bits {bits} teaches them"
    if (student.dim, student.bits) == (teacher.dim, bits):
        cure = "student is these, taught"
    return (
        f"The same bytes: {teacher.name}'s {teacher.dim} numbers merely rounded to {bits} bits take "
        f"{found.bytes / entities:.1f} bytes per entity (student: {student.bytes / entities:.1f}) and have {mrr} "
        f"(student: {own}); {cure}."
    )


def _first_numbers(run: Run, teacher: StageResult, room: float) -> str:
    dim = max((dim for dim, size in teacher.crop_bytes.items() if size <= room), default=None)
    if dim is None:
        return ""
    mrr = ", ".join(f"{split} MRR {fixed(teacher.curve[split][dim]['mrr'])}" for split in run.splits)
    size = teacher.crop_bytes[dim] / run.graph.num_entities
    return f" Its first {dim} numbers as they are take {size:.1f} and have {mrr}."
