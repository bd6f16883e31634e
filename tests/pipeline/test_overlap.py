"""Links of a chain that overlap: what a student begins on, when it changes over, when it steps aside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.common.stop_signal import StopRequest
from distkgd.config.tree import merge
from distkgd.distributed.checkpoint.reader import latest, load_rows, read_meta
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, Stopped
from distkgd.models.model_folder import load_model
from distkgd.models.stage_result import StageResult
from distkgd.pipeline import overlap
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import finished_result, run_stage
from distkgd.pipeline.stage_job import Run
from distkgd.pipeline.stages import Stage, build_plan
from distkgd.reporting.report import markdown
from distkgd.training.job import Progress
from tests.pipeline.test_plan import ran, trained_stages
from tests.ranks import run_on_ranks
from tests.records import report_of
from tests.toys import toy_run

STAGE: dict[str, Any] = {"batch_size": 100, "epochs": 4, "validate_every": 1, "optimizer": {"lr": 0.3}}
TREE: dict[str, Any] = {
    "teacher": STAGE,
    "student": STAGE | {"method": "iterde", "epochs": 6},
    "chain": {"dims": [16, 8, 4], "overlap": 0.5},
}
TEACHER, STUDENT = (
    next(s for s in build_plan(parse_config(TREE, "test")) if s.name == n) for n in ("teacher", "student_8")
)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "WAIT_SECONDS", 0.0)


def at_epoch(run: Run, stage: Stage, epoch: int, then: Callable[[], Any] | None = None) -> StageResult:
    """Train a stage; `then` is called in the middle of it, None ends it there with a checkpoint."""

    def watch(name: str, at: int, best: float) -> bool:
        if at == epoch and then is not None:
            then()
        return at < epoch or then is not None

    return run_stage(replace(run, watch=watch), stage)


def begun(folder: Path, epoch: int = 2) -> Run:
    """A run whose teacher is in the middle of its training."""
    run = toy_run(TREE, Ranks(), folder)
    with pytest.raises(Stopped):
        at_epoch(run, TEACHER, epoch)
    return run


def rows_of(run: Run, stage: str) -> torch.Tensor:
    return load_model(run.stage_folder(stage), run.ranks).model.entity.weight


def newest(run: Run, stage: Stage) -> Path:
    path = latest(run.stage_folder(stage.name) / "checkpoint", run.ranks, pytest.fail)
    assert path is not None
    return path


def test_a_student_begins_on_the_best_rows_steps_aside_at_its_share_and_ends_on_the_finished_teacher(
    tmp_path: Path,
) -> None:
    run = begun(tmp_path)
    best = newest(run, TEACHER).with_name(f"step_{overlap.best_step(newest(run, TEACHER)):010d}")
    with trained_stages() as trained, pytest.raises(Stopped):
        run_stage(run, STUDENT)
    taught_by = trained.call_args.args[0].method.teachers[0].entity.weight
    assert torch.equal(taught_by, load_rows(best, "student.entity.weight", 0, len(taught_by)))
    progress = read_meta(newest(run, STUDENT))["meta"]["progress"]
    assert (progress["epoch"], progress["done"]) == (3, False)

    run_stage(run, TEACHER)
    assert not torch.equal(taught_by, rows_of(run, "teacher"))
    with trained_stages() as trained:
        row = run_stage(run, STUDENT)
    assert torch.equal(trained.call_args.args[0].method.teachers[0].entity.weight, rows_of(run, "teacher"))
    assert row.early_steps is not None and row.early_steps * 2 == row.steps == progress["step"] * 2
    assert finished_result(run, STUDENT) == row


def changed_over(ranks: Ranks, folder: str) -> tuple[StageResult, bool]:
    """A student's row, whose teacher is finished during its second epoch, and whether that is who taught it then."""
    run = toy_run(TREE, ranks, Path(folder))
    with pytest.raises(Stopped):
        at_epoch(run, TEACHER, 2)
    with trained_stages() as trained:
        row = at_epoch(run, STUDENT, 2, then=lambda: run_stage(run, TEACHER))
    job = next(call.args[0] for call in trained.call_args_list if call.args[0].name == "student_8")
    return row, torch.equal(job.method.teachers[0].entity.weight, rows_of(run, "teacher"))


def test_a_student_goes_on_with_its_teacher_as_soon_as_that_is_finished_on_any_number_of_ranks(tmp_path: Path) -> None:
    one, changed = changed_over(Ranks(), str(tmp_path / "1"))
    assert changed and one.early_steps is not None and one.early_steps * 3 == one.steps
    for two, changed in run_on_ranks(2, changed_over, folder=str(tmp_path / "2")):
        assert changed and two.early_steps == one.early_steps
        assert two.mrr("valid") == pytest.approx(one.mrr("valid"), abs=0.02)


def test_an_early_student_that_is_started_again_is_where_it_would_have_been(tmp_path: Path) -> None:
    for name, stops in (("whole", []), ("broken", [1, 2])):
        run = begun(tmp_path / name)
        for epoch in stops:
            with pytest.raises(Stopped):
                at_epoch(run, STUDENT, epoch)
        with pytest.raises(Stopped):
            run_stage(run, STUDENT)
    ends = [tmp_path / name / "stages/student_8/checkpoint" for name in ("whole", "broken")]
    paths = [latest(end, Ranks(), pytest.fail) for end in ends]
    assert paths[0] is not None and paths[1] is not None and paths[0].name == paths[1].name
    rows = [load_rows(path, "student.entity.weight", 0, 41) for path in paths if path is not None]
    assert torch.equal(*rows)


def test_patience_with_an_unfinished_teacher_is_no_end_and_who_is_asked_to_stop_does_not_wait(tmp_path: Path) -> None:
    run = begun(tmp_path)
    early = overlap.open_early(run, STUDENT)
    assert early is not None
    progress = Progress(step=4, epoch=1, done=True, stale=3)
    assert not early.follow(progress, StopRequest())
    assert (progress.done, progress.stale, progress.early_steps) == (False, 0, 4)
    assert early.follow(Progress(step=4, epoch=1), StopRequest())  # below its share
    assert not early.follow(Progress(step=12, epoch=3), StopRequest())
    assert early.follow(Progress(step=12, epoch=3), StopRequest(2))


def test_a_student_without_a_checkpoint_of_its_teacher_says_so(tmp_path: Path) -> None:
    run = toy_run(TREE, Ranks(), tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint that teacher's student could begin on"):
        overlap.open_early(run, STUDENT)


def test_one_after_the_other_nothing_overlaps_and_the_report_says_so(tmp_path: Path) -> None:
    report = ran(tmp_path, TREE)
    steps = report["stages"][1]["steps"]
    assert f"student_8: 0 of {steps} steps on its teacher's best rows so far." in markdown(report_of(report))
    plain = ran(tmp_path / "plain", merge(TREE, {"chain": {"overlap": 0.0}}))
    assert "best rows so far" not in markdown(report_of(plain))
    assert [s["valid"] for s in report["stages"]] == [s["valid"] for s in plain["stages"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"student": {"method": "dualde"}}, "dualde trains its teacher.*overlap: 0"),
        ({"student": {"start": "crop"}}, "start crop takes rows of a finished teacher"),
        ({"teacher": {"validate_every": 0}}, "the model of dim 16 has none before its end"),
        ({"teacher": {"method": "metasd"}}, "what metasd makes is known when it is finished"),
        ({"chain": {"overlap": 1.0}}, "overlap"),
    ],
)
def test_what_cannot_overlap_is_refused_when_the_config_is_read(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(merge(TREE, change), "test")
