"""The training loop: when it stops, what it keeps, which learning rate it uses, and what it refuses."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.checkpoint.reader import list_steps, load_rows, read_meta
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError, DivergedError, ModelError, Stopped
from distkgd.methods.base import Update
from distkgd.methods.scratch import Scratch
from distkgd.training import loop
from distkgd.training.job import Job, Progress, schedule_scale, step_name
from distkgd.training.loop import train_stage, train_step
from tests.launches import family, finish, rank_process, small_config, small_data, start, steps_saved, wait_for
from tests.ranks import run_on_threads
from tests.toys import toy_job

BASE: dict[str, Any] = {"dim": 8, "batch_size": 100, "epochs": 6, "validate_every": 1}
FALLING = [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]


def job_in(folder: Path, curve: list[float] | None = None, keep: int = 1, **student: Any) -> Job:
    """A toy job; `curve`: the MRR its validation gives after each epoch, from epoch 1."""
    job = toy_job({"keep": keep, "student": BASE | student}, Ranks(), folder)
    if curve is not None:
        done = list_steps(job.checkpoints)
        left = iter(curve[done[-1] // job.input_builder.sampler.steps_per_epoch if done else 0 :])
        job.validate = lambda: {"mrr": next(left)}
    return job


def rows_of(job: Job) -> torch.Tensor:
    return job.method.student.entity.weight.clone()


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "stages/student/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# -- a loss that is no number -------------------------------------------------------------------------------------


@contextmanager
def poison_in_the_last_step(group: str) -> Iterator[None]:
    """The last row of a table turns into NaN in the last step of the first epoch, on the last rank."""

    def poison(job: Job, progress: Progress, signal_number: int) -> Any:
        found = train_step(job, progress, signal_number)
        ranks = job.ranks
        if progress.step == job.input_builder.sampler.steps_per_epoch - 1 and ranks.rank == ranks.world - 1:
            model = job.method.student
            (model.entity.weight if group == "entity" else model.relation.data)[-1, 3] = math.nan
        return found

    with mock.patch("distkgd.training.loop.train_step", poison):
        yield


def not_kept(ranks: Ranks, folder: str, teacher: bool) -> tuple[str, bool]:
    """(message, whether anything was kept) of a toy job that a poisoned table must stop; teacher: from the start."""
    job = toy_job({"student": BASE | {"epochs": 1, "method": "bkd" if teacher else "scratch"}}, ranks, Path(folder))
    validated = []
    job.validate = lambda: validated.append(1) or {"mrr": 1.0}  # type: ignore[func-returns-value]
    if teacher and ranks.rank == ranks.world - 1:
        job.method.teachers[0].entity.weight[-1, 3] = math.nan
    with pytest.raises(ModelError if teacher else DivergedError) as info:
        train_stage(job)
    return str(info.value), bool(validated or list_steps(job.checkpoints))


LAST = {"entity": "entity 'e040'", "relation": "inverse of relation 'r004'"}


@pytest.mark.parametrize(("world", "group"), [(1, "entity"), (2, "entity"), (3, "entity"), (1, "relation")])
def test_rows_that_the_last_step_made_nan_are_neither_validated_nor_kept(
    world: int, group: str, tmp_path: Path
) -> None:
    name = LAST[group]
    row = 40 if group == "entity" else 9
    said = f"Stage student, step 3: tensor '{group}', row {row} ({name}), holds nan. Lower student.optimizer.lr"
    with poison_in_the_last_step(group):
        found = run_on_threads(world, not_kept, folder=str(tmp_path), teacher=False)
    for message, kept in found:
        assert message.startswith(said) and not kept


@pytest.mark.parametrize("world", [1, 2])
def test_a_teacher_of_nan_is_to_blame_and_not_the_students_learning_rate(world: int, tmp_path: Path) -> None:
    for message, kept in run_on_threads(world, not_kept, folder=str(tmp_path), teacher=True):
        assert "its teacher's tensor 'entity', row 40 (entity 'e040'), holds nan" in message
        assert "optimizer.lr" not in message and not kept


def test_a_teacher_whose_scores_overflow_is_to_blame(tmp_path: Path) -> None:
    job = toy_job({"student": BASE | {"method": "bkd"}}, Ranks(), tmp_path)
    job.method.teachers[0].entity.weight.fill_(1e25)
    with pytest.raises(DivergedError, match=r"Its teacher's tables hold numbers up to 1e[+]25") as info:
        train_stage(job)
    assert "optimizer.lr" not in str(info.value)


def test_a_student_whose_scores_overflow_has_diverged_though_its_rows_are_finite(tmp_path: Path) -> None:
    job = job_in(tmp_path, epochs=1)

    def huge(*arguments: Any) -> Any:
        found = train_step(*arguments)
        if arguments[1].step + 1 == job.input_builder.sampler.steps_per_epoch:
            job.method.student.entity.weight.fill_(1e25)
        return found

    said = r"triples have scores that are NaN or infinite, of numbers up to 1e[+]25"
    with mock.patch("distkgd.training.loop.train_step", huge), pytest.raises(DivergedError, match=said):
        train_stage(job)
    assert not list_steps(job.checkpoints)


class BrokenTerm(Scratch):
    """Plain training whose second term turns into `value` at a step, on one rank only."""

    value = math.nan
    breaks_at = 2
    breaks_on = 0

    def updates(self, inputs: StepInputs) -> Any:
        for update in super().updates(inputs):
            term = update.terms["hard"] * 0.0
            if inputs.batch.step == self.breaks_at and self.student.entity.ranks.rank == self.breaks_on:
                term = term + self.value
            yield Update(update.groups, update.terms | {"fragile": term})


def diverge(ranks: Ranks, folder: str, student: dict[str, Any], broken: dict[str, Any] | None) -> tuple[str, float]:
    """(message, sum of all rows) of a toy job that must diverge."""
    job = toy_job({"student": BASE | student}, ranks, Path(folder))
    if broken is not None:
        job.method.__class__ = type("Broken", (BrokenTerm,), broken)
    with pytest.raises(DivergedError) as info:
        train_stage(job)
    return str(info.value), float(rows_of(job).abs().sum())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_stops_when_a_term_of_one_rank_is_no_finite_number(world: int, value: float, tmp_path: Path) -> None:
    broken = {"value": value, "breaks_on": world - 1}
    answers = run_on_threads(world, diverge, folder=str(tmp_path), student={}, broken=broken)
    for message, rows in answers:
        assert "Stage student, step 2: loss term fragile is" in message
        assert str(value) in message
        assert "hard" not in message
        assert "student.optimizer.lr" in message
        assert math.isfinite(rows), "the rows moved by a step that had no number"


@pytest.mark.parametrize("world", [1, 2])
def test_a_learning_rate_that_is_far_too_high_ends_in_a_message(world: int, tmp_path: Path) -> None:
    student = {"optimizer": {"name": "sgd", "lr": 1e30}, "regulariser": {"name": "n3", "weight": 0.1}}
    for message, _ in run_on_threads(world, diverge, folder=str(tmp_path), student=student, broken=None):
        assert "n3" in message
        assert "1e+30" in message


# -- validation, patience and the best rows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "curve", "epochs", "best"),
    [
        (0, FALLING, 6, 1),
        (1, FALLING, 2, 1),
        (2, FALLING, 3, 1),
        (2, [0.1, 0.05, 0.2, 0.15, 0.2, 0.9], 5, 3),
        (3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 6),
    ],
)
def test_training_ends_when_validation_stopped_rising_and_the_model_has_the_best_rows(
    patience: int, curve: list[float], epochs: int, best: int, tmp_path: Path
) -> None:
    job = job_in(tmp_path, curve, patience=patience)
    per_epoch = job.input_builder.sampler.steps_per_epoch
    at_epoch = {}
    real = job.validate
    assert real is not None

    def validate() -> dict[str, float]:
        at_epoch[len(at_epoch) + 1] = rows_of(job), job.method.student.relation.detach().clone()
        return real()

    job.validate = validate
    progress = train_stage(job)
    assert progress.done
    assert (progress.epoch, progress.step, progress.best_step) == (epochs, epochs * per_epoch, best * per_epoch)
    assert progress.best_mrr == curve[best - 1]
    assert torch.equal(rows_of(job), at_epoch[best][0])
    assert torch.equal(job.method.student.relation.detach(), at_epoch[best][1])
    if best != epochs:
        assert not torch.equal(at_epoch[best][0], at_epoch[epochs][0])


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6]), (0, [])]
)
def test_validation_comes_every_so_many_epochs_and_after_the_last(
    every: int, expected: list[int], tmp_path: Path
) -> None:
    job = job_in(tmp_path, validate_every=every)
    train_stage(job)
    assert [row["epoch"] for row in log_of(tmp_path) if "valid/mrr" in row] == expected


def test_without_validation_the_last_rows_are_the_model(tmp_path: Path) -> None:
    job = job_in(tmp_path, validate_every=0)
    progress = train_stage(job)
    stored = load_rows(job.checkpoints / step_name(progress.step), "student.entity.weight", 0, 41)
    assert torch.equal(rows_of(job), stored)
    assert progress.best_step == -1


# -- learning rates -----------------------------------------------------------------------------------------------


def scale_at(folder: Path, step: int, **schedule: Any) -> float:
    return schedule_scale(job_in(folder, schedule=schedule, epochs=20), Progress(step=step))


def test_schedules_follow_their_formulas(tmp_path: Path) -> None:
    per_epoch = job_in(tmp_path).input_builder.sampler.steps_per_epoch
    last = 20 * per_epoch
    half, quarter = last // 2, last / 4
    assert scale_at(tmp_path, half, name="constant") == 1.0
    assert scale_at(tmp_path, 0, name="linear", final=0.2) == 1.0
    assert scale_at(tmp_path, half, name="linear", final=0.2) == pytest.approx(0.6)
    assert scale_at(tmp_path, last, name="linear", final=0.2) == pytest.approx(0.2)
    assert scale_at(tmp_path, 2 * last, name="linear", final=0.2) == pytest.approx(0.2)
    assert scale_at(tmp_path, 0, name="cosine", final=0.2) == 1.0
    assert scale_at(tmp_path, half, name="cosine", final=0.2) == pytest.approx(0.6)
    assert scale_at(tmp_path, last, name="cosine", final=0.2) == pytest.approx(0.2)
    assert quarter == int(quarter)
    expected = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    assert scale_at(tmp_path, int(quarter), name="cosine", final=0.2) == pytest.approx(expected)


def test_a_plateau_multiplies_the_learning_rate_each_time_patience_runs_out(tmp_path: Path) -> None:
    # Better, worse, worse: down; worse, better, worse: stays.
    curve = [0.3, 0.2, 0.2, 0.2, 0.4, 0.1]
    job = job_in(tmp_path, curve, schedule={"name": "plateau", "factor": 0.25, "patience": 2})
    progress = train_stage(job)
    per_epoch = {row["epoch"]: row["lr_scale"] for row in log_of(tmp_path) if "lr_scale" in row}
    # "epoch" counts finished ones: line k is of the epoch after.
    assert [per_epoch[epoch] for epoch in range(6)] == [1.0, 1.0, 1.0, 0.25, 0.25, 0.25]
    assert (progress.plateau_scale, progress.plateau_stale) == (0.25, 1)


def test_the_schedule_reaches_the_optimiser_of_rows_and_relations(tmp_path: Path) -> None:
    def moved(folder: str, scale: float) -> tuple[float, float]:
        student = {"optimizer": {"name": "sgd", "lr": 0.1}}
        job = toy_job({"dtype": "float64", "student": BASE | student}, Ranks(), tmp_path / folder)
        rows, relation = rows_of(job), job.method.student.relation.detach().clone()
        with mock.patch.object(loop, "schedule_scale", lambda job, progress: scale):
            loop.train_step(job, Progress(), 0)
        after = job.method.student.relation.detach()
        return float((rows_of(job) - rows).norm()), float((after - relation).norm())

    whole, part = moved("whole", 1.0), moved("part", 0.25)
    assert part == pytest.approx([0.25 * x for x in whole], rel=1e-6)


# -- checkpoints --------------------------------------------------------------------------------------------------


def saved_epochs(job: Job) -> list[int]:
    per_epoch = job.input_builder.sampler.steps_per_epoch
    return [step // per_epoch for step in list_steps(job.checkpoints)]


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (50, [6])]
)
def test_a_checkpoint_is_written_every_so_many_epochs_and_at_the_end(
    every: int, expected: list[int], tmp_path: Path
) -> None:
    job = job_in(tmp_path, keep=99, checkpoint_every=every, validate_every=0)
    train_stage(job)
    assert saved_epochs(job) == expected


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, [2, 6]), (2, [2, 5, 6]), (3, [2, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])]
)
def test_the_newest_checkpoints_and_the_best_one_are_kept(keep: int, expected: list[int], tmp_path: Path) -> None:
    curve = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1]
    job = job_in(tmp_path, curve, keep=keep, checkpoint_every=1)
    train_stage(job)
    assert saved_epochs(job) == expected


def test_every_better_validation_is_saved_without_being_asked(tmp_path: Path) -> None:
    job = job_in(tmp_path, [0.1, 0.2, 0.1, 0.3, 0.1, 0.1], keep=99)
    train_stage(job)
    assert saved_epochs(job) == [1, 2, 4, 6]


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    train_stage(job_in(tmp_path))
    job = job_in(tmp_path)
    before = rows_of(job)
    job.digest = "another"
    with pytest.raises(CheckpointError, match=r"step_\d+ belongs to another config.*student.*--out"):
        train_stage(job)
    assert torch.equal(rows_of(job), before)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = job_in(tmp_path, FALLING)
    train_stage(first)
    again = job_in(tmp_path)
    with mock.patch.object(loop, "train_step", side_effect=AssertionError("a step was made")):
        progress = train_stage(again)
    assert progress.done
    assert torch.equal(rows_of(again), rows_of(first))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, Path.unlink])
@pytest.mark.parametrize("file", ["rows-*", "replicated*", "manifest*"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    file: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    curve = [0.1, 0.2, 0.3, 0.2, 0.4, 0.3]
    whole = job_in(tmp_path / "whole", curve)
    train_stage(whole)

    short = job_in(tmp_path / "run", curve, keep=3, checkpoint_every=1)
    real = loop.end_epoch

    def end_epoch(job: Job, progress: Progress, *rest: Any) -> None:
        real(job, progress, *rest)
        if progress.epoch == 4:
            raise KeyboardInterrupt

    with mock.patch.object(loop, "end_epoch", end_epoch), pytest.raises(KeyboardInterrupt):
        train_stage(short)
    assert saved_epochs(short) == [2, 3, 4]
    newest, previous = (short.checkpoints / step_name(step) for step in list_steps(short.checkpoints)[:-3:-1])
    (path,) = newest.glob(file)
    before = read_meta(previous)["step"]
    damage(path)

    again = job_in(tmp_path / "run", keep=3, checkpoint_every=1)
    left = iter(curve[3:])
    again.validate = lambda: {"mrr": next(left)}
    said: list[str] = []
    again.display.warn = said.append  # type: ignore[method-assign]
    again.display.line = said.append  # type: ignore[method-assign]
    progress = train_stage(again)
    warning = said[0]
    assert path.name in warning and newest.name in warning and previous.name in warning
    assert f"resumed at step {before}" in said[1]
    assert torch.equal(rows_of(again), rows_of(whole))
    assert progress.step == 6 * again.input_builder.sampler.steps_per_epoch


def test_a_stage_all_of_whose_checkpoints_are_damaged_starts_again(tmp_path: Path) -> None:
    first = job_in(tmp_path, FALLING)
    train_stage(first)
    for step in list_steps(first.checkpoints):
        (first.checkpoints / step_name(step) / "manifest.json").write_text("{", encoding="utf-8")
    again = job_in(tmp_path)
    left = iter(FALLING)
    again.validate = lambda: {"mrr": next(left)}
    assert train_stage(again).step == 6 * again.input_builder.sampler.steps_per_epoch
    assert torch.equal(rows_of(again), rows_of(first))


def test_metrics_logged_after_the_checkpoint_are_not_logged_twice(tmp_path: Path) -> None:
    job = job_in(tmp_path, validate_every=2)
    train_stage(job)
    lines = log_of(tmp_path)
    last = list_steps(job.checkpoints)[-1]
    shutil.rmtree(job.checkpoints / step_name(last))
    remaining = list_steps(job.checkpoints)
    # As after a kill in the middle of a line.
    with (tmp_path / "stages/student/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 99, "lo')
    train_stage(job_in(tmp_path, validate_every=2))
    again = log_of(tmp_path)
    assert [(r["step"], r.get("loss")) for r in again] == [(r["step"], r.get("loss")) for r in lines]
    assert remaining != [last]


# -- a rank that dies ---------------------------------------------------------------------------------------------


def test_one_dying_rank_ends_the_whole_launch_within_a_minute(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    config = small_config(tmp_path / "config.yaml", data, student={"epochs": 5000, "checkpoint_every": 20})
    process = start([config, "--out", tmp_path / "run"], tmp_path, world=2)
    wait_for(process, tmp_path, lambda: steps_saved(tmp_path / "run/stages/student"))
    members = family(process)
    assert len(members) == 3, "torchrun and two ranks"
    begun = time.monotonic()
    rank_process(process, 1).kill()
    code, said = finish(process, tmp_path, seconds=60)
    _, alive = psutil.wait_procs(members, timeout=max(0.0, begun + 60 - time.monotonic()))
    assert code != 0
    assert "error: rank 0 has lost another rank" in said
    assert not alive, "a rank outlived the launch"
    assert not (tmp_path / "run/report.json").exists()


# -- a watcher that has seen enough ----------------------------------------------------------------------------------


def test_a_stage_stopped_by_its_watcher_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    whole = job_in(tmp_path / "whole", checkpoint_every=1)
    told: list[tuple[str, int]] = []
    whole.watch = lambda stage, epoch, _mrr: told.append((stage, epoch)) or True
    train_stage(whole)
    assert told == [("student", epoch) for epoch in range(1, 7)]
    half = job_in(tmp_path / "half")
    half.watch = lambda _stage, epoch, _mrr: epoch < 3
    with pytest.raises(Stopped, match="--resume"):
        train_stage(half)
    again = job_in(tmp_path / "half")
    assert train_stage(again).step == 6 * again.input_builder.sampler.steps_per_epoch
    assert torch.equal(rows_of(again), rows_of(whole))


def test_a_watcher_cannot_stop_what_is_finished(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    job.watch = lambda _stage, epoch, _mrr: epoch < 6
    assert train_stage(job).done
