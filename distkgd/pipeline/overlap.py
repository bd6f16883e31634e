"""Links of a chain that overlap: a student begins on its teacher's best rows so far, while that is still trained.

At the end of every epoch it looks for the finished teacher and goes on with that. Of its own epochs at most the share
`chain.overlap` may pass before: then it waits for WAIT_SECONDS, and after that it steps aside, with a checkpoint, until
the teacher is finished. A student that is started again takes what is there then: the finished teacher, or the best
rows so far. Stages that run one after the other never meet an unfinished teacher.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from distkgd.common.stop_signal import StopRequest
from distkgd.distributed.checkpoint.reader import latest, list_steps, load_rows, load_tensors
from distkgd.distributed.checkpoint.tables import on_every_rank
from distkgd.errors import CheckpointError
from distkgd.models.model import Model
from distkgd.models.run_paths import RESULT, stage_folder
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.stage_job import Run, load_teacher, stage_seed, student_model
from distkgd.pipeline.stages import Stage
from distkgd.training.job import Progress, best_step, step_name

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2
TRIES = 5  # a teacher that goes on may retire a checkpoint while it is read


def is_finished(run_folder: Path, stage: str) -> bool:
    """Whether a stage has its result, and so its model."""
    return (stage_folder(run_folder, stage) / RESULT).exists()


def has_rows(run_folder: Path, stage: str) -> bool:
    """Whether a stage has a checkpoint from which a student could begin."""
    return bool(list_steps(stage_folder(run_folder, stage) / "checkpoint"))


def open_early(run: Run, stage: Stage) -> "EarlyTeacher | None":
    """The unfinished teacher of a stage that may begin on it; None where the teacher is finished. All ranks call it."""
    if not stage.overlap:
        return None
    teacher = run.stage(stage.teachers[0])
    if teacher is None or run.ranks.gather_objects(is_finished(run.folder, teacher.name))[0]:
        return None
    return EarlyTeacher(run, stage, teacher)


class EarlyTeacher:
    """A teacher whose own training is not over. model: its best rows so far, and the finished ones once they are there;
    the student's own copy."""

    def __init__(self, run: Run, stage: Stage, teacher: Stage) -> None:
        self._run = run
        self._stage = stage
        self._teacher = teacher
        self._is_early = True
        self.model = best_so_far(run, teacher)
        run.display.line(f"{stage.name}: begins on the best rows so far of {teacher.name}, which is not finished")

    def follow(self, progress: Progress, stop: StopRequest) -> bool:
        """Before the first epoch and after each: go on as is, or with the finished teacher; False: step aside."""
        if not self._is_early:
            return True
        progress.early_steps = progress.step
        # Patience that has run out on an unfinished teacher is no end.
        waits = progress.done or progress.epoch + 1 > self._stage.overlap * self._stage.config.epochs
        if progress.done:
            progress.done, progress.stale = False, 0
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            mine = (is_finished(self._run.folder, self._teacher.name), time.monotonic() > deadline, stop.signal_number)
            states = self._run.ranks.gather_objects(mine)
            is_there, is_late, _ = states[0]
            if is_there:
                self._take_over(progress)
                return True
            if not waits or any(number for _, _, number in states):
                return True  # who was asked to stop does so in the next step
            if is_late:
                return False
            time.sleep(POLL_SECONDS)

    @torch.no_grad()
    def _take_over(self, progress: Progress) -> None:
        finished = load_teacher(self._run, self._teacher.name)
        self.model.entity.weight.copy_(finished.entity.weight)
        self.model.relation.copy_(finished.relation)
        self._is_early = False
        name = self._stage.name
        self._run.display.line(f"{name}: {self._teacher.name} is finished and teaches on from epoch {progress.epoch}")


@torch.no_grad()
def best_so_far(run: Run, stage: Stage) -> Model:
    """A stage's model as its checkpoints have it: at the best validation so far, or else the newest. All ranks call it.

    Raises CheckpointError when there is none.
    """
    config, folder, ranks = stage.config, stage_folder(run.folder, stage.name) / "checkpoint", run.ranks
    model = student_model(run, config, stage_seed(run.config.seed, stage.name))
    table = model.entity

    def read(path: Path) -> None:
        table.weight.copy_(load_rows(path, "student.entity.weight", table.lo, table.hi))
        model.relation.copy_(load_tensors(path)["student.relation"])

    for attempt in range(TRIES):
        newest = latest(folder, ranks, lambda _: None)  # damage is for whoever resumes that stage to tell
        if newest is None:
            break
        try:
            step = on_every_rank(ranks, partial(best_step, newest), CheckpointError)[0]
            on_every_rank(ranks, partial(read, folder / step_name(step)), CheckpointError)
            return model.rounded()
        except CheckpointError:
            if attempt + 1 == TRIES:
                raise
            time.sleep(POLL_SECONDS)
    raise CheckpointError(f"{folder} holds no checkpoint that {stage.name}'s student could begin on.")


def early_starts(stages: Sequence[StageResult]) -> list[str]:
    """What the report says of students that could have begun early."""
    return [
        f"{stage.name}: {stage.early_steps} of {stage.steps} steps on its teacher's best rows so far."
        for stage in stages
        if stage.early_steps is not None
    ]
