"""The one training loop. Read `train_stage` from top to bottom and you know what happens, and in which order."""

import math
import signal
import time
from collections.abc import Mapping

import torch

from distkgd.common.stop_signal import listen_for_stop
from distkgd.config.stage import ScheduleConfig
from distkgd.distributed.optim.dense import begin_reducing
from distkgd.distributed.optim.rows import clip_factor
from distkgd.errors import DivergedError, ModelError, Stopped
from distkgd.methods.base import trained_models
from distkgd.models.model import Model, broken_row_of, overflows
from distkgd.training.communication import announcement, forecast
from distkgd.training.job import (
    Job,
    Progress,
    load_group,
    restore,
    schedule_scale,
    step_name,
    wait_for_checkpoint,
    write,
)
from distkgd.training.metrics_log import MetricsLog
from distkgd.training.step_terms import Number, StepTerms

SCORED = 1024  # training triples, evenly spaced, whose scores must be finite
OVERFLOWS = 1e9  # numbers of a model that was trained are never as large; three of them multiplied are soon infinite


def train_stage(job: Job) -> Progress:
    """Train until the epochs are over, validation stops rising, or the method has finished; leaves the best rows in the
    student. Resumes from the newest checkpoint in the stage's folder if there is one.

    Raises Stopped (the checkpoint is written) after a signal, when `job.watch` has seen enough, or where `job.early`
    steps aside for an unfinished teacher; DivergedError on a NaN or Inf loss or row; ModelError for such a teacher.
    """
    progress, unwanted = restore(job), False
    at_once = job.ranks.device.type == "cpu"
    check_rows(job, progress)  # those of a checkpoint, or of its start
    per_epoch = job.input_builder.sampler.steps_per_epoch
    begun = time.monotonic() - progress.seconds
    finished_before = progress.done
    with (
        MetricsLog(job, progress) as log,
        listen_for_stop() as stop,
        job.display.bar(job.name, job.phase.last * per_epoch) as move_bar,
        job.writer,
    ):
        seen: list[dict[str, float]] = []
        unseen = StepTerms(lambda step, terms: check_finite(terms, job, step), seen.extend)
        if job.early is not None:
            unwanted = not job.early.follow(progress, stop)
        while progress.epoch < job.phase.last and not progress.done and not unwanted:
            started = time.monotonic()
            found = train_step(job, progress, stop.signal_number)
            progress.step += 1
            epoch_ends = progress.step % per_epoch == 0
            stopping = unseen.add(progress.step - 1, *found, look=at_once or epoch_ends or log.due)
            progress.train_seconds += time.monotonic() - started
            log.steps(seen)  # which is no training
            seen.clear()
            move_bar(progress.step)
            if epoch_ends:
                progress.epoch += 1
                validated = end_epoch(job, progress, log, begun)
                if validated and job.watch is not None:
                    unwanted = not job.watch(job.name, progress.epoch, progress.best_mrr)
                if job.early is not None:
                    unwanted = not job.early.follow(progress, stop) or unwanted
                stopping = stopping or unwanted
            if stopping:
                break
        job.prefetcher.drop()
        unseen.look()
        log.steps(seen)
        if not finished_before:
            progress.done = progress.done or progress.epoch >= job.phase.last
            progress.seconds = time.monotonic() - begun
            if progress.step % per_epoch:
                check_model(job, progress)  # `end_epoch` has seen the others
            write(job, progress)
            wait_for_checkpoint(job)
        # A signal may also have come in the last step or validation, after which no step would see it.
        unwanted = unwanted and not progress.done
        if any(job.ranks.gather_objects(stop.signal_number)) or unwanted:
            raise Stopped(stop.signal_number or int(signal.SIGTERM), f"in stage {job.name} after step {progress.step}")
    if job.validate is not None and progress.best_step >= 0:
        load_group(job, "student", job.checkpoints / step_name(progress.best_step))
    return progress


def train_step(job: Job, progress: Progress, signal_number: int) -> tuple[dict[str, Number], Number]:
    """One global batch: the loss terms it had ({name: value}), and whether a signal asked any rank to stop.

    On a CPU a NaN or Inf term raises DivergedError on all ranks. On an accelerator nothing is looked at.
    """
    method, accumulate = job.method, job.config.accumulate
    totals: dict[tuple[str, ...], torch.Tensor] = {}
    values: dict[str, Number] = {}
    stopping: Number = False
    on_host = job.ranks.device.type == "cpu"
    for i in range(accumulate):
        inputs = job.prefetcher.inputs(progress.step, i)
        for update in method.updates(inputs):
            terms = _stacked(update.terms)
            if on_host:
                job.prefetcher.advance()
                terms.sum().backward()  # with a gradient given, torch would first import sympy: a second, and memory
            else:
                terms.backward(torch.ones_like(terms))  # of their sum, in one launch fewer
                job.prefetcher.advance()  # which may have to wait for ids: by now the device has enough to do
            names = (*update.terms, *update.watched)
            numbers = terms.detach()
            if update.watched:
                numbers = torch.cat([numbers, _stacked(update.watched).detach()])
            numbers = numbers.double() if on_host or accumulate > 1 else numbers
            totals[names] = numbers + totals[names] if names in totals else numbers
            if i + 1 == accumulate:
                values, stopping = apply(job, progress, sorted(update.groups), totals, signal_number)
    return values, stopping


def apply(
    job: Job, progress: Progress, groups: list[str], totals: Mapping[tuple[str, ...], torch.Tensor], signal_number: int
) -> tuple[dict[str, Number], Number]:
    """One simultaneous step of some groups on the gradients that backward left behind.

    totals: [n] of n names each. Returns the loss terms summed over ranks, and what `train_step` does.
    """
    rows = [job.rows[group] for group in groups if group in job.rows]
    dense = [job.dense[group] for group in groups if group in job.dense]
    limit, alone = job.config.optimizer.clip, job.ranks.world == 1
    if any(one.kept is not None for one in rows):
        keep_relations(job)
    told = [] if alone else [torch.full((1,), float(signal_number), device=job.ranks.device)]
    said = [*totals.values(), *told]
    # An engine that sums over ranks itself may do so, unless the norm of the sum is needed first.
    reduced = bool(limit) or not all(one.sums_ranks for one in dense)
    arrived = begin_reducing(dense if reduced else [], job.ranks, said[0] if len(said) == 1 else torch.cat(said))

    def agree() -> tuple[dict[str, Number], Number]:
        agreed = arrived()
        looked_at = agreed.device.type == "cpu"
        numbers = agreed.tolist() if looked_at else list(agreed.unbind())
        stopping = bool(signal_number) if alone else numbers.pop()
        values: dict[str, Number] = {}
        for name, number in zip((name for names in totals for name in names), numbers, strict=True):
            values[name] = values[name] + number if name in values else number
        if looked_at:
            check_finite({name: float(value) for name, value in values.items()}, job, progress.step)
        return dict(sorted(values.items())), stopping

    if limit:
        found = agree()
    clip = clip_factor(rows, [t for one in dense for t in one.tensors.values()], limit, job.ranks)
    scale, scales = schedule_scale(job, progress), job.phase.lr_scale
    rates = {group: scale * scales.get(group, 1.0) for group in groups}
    for group in groups:
        if group in job.rows:
            job.rows[group].step(rates[group], clip)
    if not limit:
        found = agree()  # it travelled while the rows moved; after an error nothing of them is kept
    for group in groups:
        if group in job.dense:
            job.dense[group].step(rates[group], clip, reduced=reduced)
    return found


def keep_relations(job: Job) -> None:
    """What the rows of relations that are kept add to this rank's gradient, or take from it."""
    assert job.kept is not None
    relation = job.method.student.relation
    with torch.no_grad():
        grad = torch.zeros_like(relation) if relation.grad is None else relation.grad
        relation.grad = job.kept[1].pulled(None, relation, grad, 1.0 / job.ranks.world)


def _stacked(numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    # [n] of [] each.
    listed = list(numbers.values())
    return listed[0].reshape(1) if len(listed) == 1 else torch.stack(listed)


def end_epoch(job: Job, progress: Progress, log: MetricsLog, begun: float) -> bool:
    """Validate, remember the best, advance the method's phases, decide whether to go on, and checkpoint.

    Returns whether there was a validation.
    """
    check_model(job, progress)
    config, epoch = job.config, progress.epoch
    phase_end = job.phase.end
    due = bool(config.validate_every) and (epoch % config.validate_every == 0 or epoch == phase_end)
    improved = False
    if due and job.validate is not None:
        found = job.validate()
        improved = found["mrr"] > progress.best_mrr
        if improved:
            progress.best_mrr, progress.best_step = found["mrr"], progress.step
        progress.stale = 0 if improved else progress.stale + 1
        follow_plateau(config.schedule, progress, improved)
        log.validation(found, improved)
    plateau = bool(config.patience) and progress.stale >= config.patience
    if job.method.advance(epoch, config.epochs, plateau):
        job.display.line(f"{job.name}: next phase at epoch {epoch}")
        progress.stale, progress.plateau_stale, progress.plateau_scale = 0, 0, 1.0
        if progress.best_step >= 0 and not improved:
            # The phase starts from the best student so far, as the authors' code does.
            load_group(job, "student", job.checkpoints / step_name(progress.best_step))
        if sends := forecast(job.input_builder, job.method, config):
            job.display.line(f"{job.name}: {announcement(job.input_builder, job.method, config, sends)}")
    elif plateau and phase_end == job.phase.last:
        progress.done = True  # patience ends the last phase, never a stage that has another one ahead
    # The loop itself writes after the last epoch.
    ends = progress.done or epoch >= job.phase.last
    if not ends and (improved or (config.checkpoint_every and epoch % config.checkpoint_every == 0)):
        progress.seconds = time.monotonic() - begun
        write(job, progress)
    return due and job.validate is not None


def follow_plateau(schedule: ScheduleConfig, progress: Progress, improved: bool) -> None:
    """Lower the learning rate after `patience` validations without a better MRR."""
    progress.plateau_stale = 0 if improved else progress.plateau_stale + 1
    if schedule.name == "plateau" and progress.plateau_stale >= schedule.patience:
        progress.plateau_scale *= schedule.factor
        progress.plateau_stale = 0


def check_finite(values: Mapping[str, float], job: Job, step: int) -> None:
    """Stop all ranks (each sees the same sums) when a term is NaN or Inf."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise DivergedError(
            f"Stage {job.name}, step {step}: loss term {', '.join(broken)} is "
            f"{', '.join(str(values[name]) for name in broken)}. {_remedy(job)}"
        )


def check_rows(job: Job, progress: Progress) -> None:
    """DivergedError on all ranks when a table in training holds NaN or an infinity: nothing of it is ranked or kept."""
    for group, model in trained_models(job.method).items():
        if (broken := broken_row_of(model)) is not None:
            whose = "" if group == "student" else f"{group}'s "
            raise DivergedError(f"Stage {job.name}, step {progress.step}: {whose}{job.told(broken)}. {_remedy(job)}")


def check_model(job: Job, progress: Progress) -> None:
    """`check_rows`, and DivergedError when rows have become so large that scores of training triples overflow."""
    check_rows(job, progress)
    triples = job.input_builder.sampler.train
    few = min(SCORED, len(triples))
    triples = triples[torch.arange(few, device=triples.device) * len(triples) // few]
    if number := overflows(job.method.output_model, triples):
        raise DivergedError(
            f"Stage {job.name}, step {progress.step}: {number:,} of {few:,} training triples have scores that are NaN "
            f"or infinite, of numbers up to {_largest(job.method.output_model):.2g}. {_remedy(job)}"
        )


def _remedy(job: Job) -> str:
    """What to change after a divergence; ModelError where a teacher is broken. All ranks call it."""
    learning = trained_models(job.method, job.phase.frozen).values()
    fixed = [teacher for teacher in job.method.teachers if all(teacher is not model for model in learning)]
    for teacher in fixed:
        if (broken := broken_row_of(teacher)) is not None:
            raise ModelError(
                f"Stage {job.name}: its teacher's {job.told(broken)}; no learning rate of {job.name} would help. "
                "Give a teacher whose training has not diverged."
            )
    largest = max((_largest(teacher) for teacher in fixed), default=0.0)
    if largest > OVERFLOWS:
        return f"Its teacher's tables hold numbers up to {largest:.2g}, whose scores overflow; give another teacher."
    return (
        f"Lower {job.name}.optimizer.lr (now {job.config.optimizer.lr}), or set optimizer.clip; the last checkpoint is "
        "intact."
    )


def _largest(model: Model) -> float:
    # The largest magnitude in a model's tables, on all ranks.
    tables = [table for table in (model.entity.weight, model.relation.detach()) if table.numel()]
    mine = [float(x) for table in tables for x in torch.stack(table.aminmax()).abs()]
    found = [x for of_rank in model.entity.ranks.gather_objects(mine) for x in of_rank]
    return max((x for x in found if math.isfinite(x)), default=0.0)
