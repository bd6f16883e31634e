"""What a plan is said to take, beside what it took."""

from pathlib import Path

import pytest

from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.autoconfig.forecast import duration, forecast, format_forecast, free_memory, held_memory
from distkgd.pipeline.plan import run_plan
from distkgd.pipeline.stage_job import build_job
from distkgd.pipeline.stages import build_plan
from distkgd.training.communication import expected_memory
from tests.toys import toy_graph, toy_run, toy_teacher

PLAN = {
    "device": "cpu",
    "teacher": {"dim": 64, "epochs": 3, "batch_size": 100, "validate_every": 3},
    "student": {"dim": 16, "method": "bkd", "epochs": 3, "batch_size": 100, "validate_every": 3},
    "baseline": True,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "under 1 s"), (3.4, "3 s"), (60, "1 min"), (95, "1 min 35 s"), (3725, "1 h 2 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_is_about_what_training_takes_and_nothing_is_written(tmp_path: Path) -> None:
    run = toy_run(PLAN, Ranks(), tmp_path / "run", toy_graph(2000, 20, 8000))
    stages = build_plan(run.config)
    found = forecast(run, stages)
    assert not (tmp_path / "run").exists()
    assert [one.stage.name for one in found] == ["teacher", "student", "direct"]
    report = run_plan(run.config, run.graph, Ranks(), tmp_path / "run", resume=False, display=run.display)
    for one, row in zip(found, report.stages, strict=True):
        assert one.steps == row.steps
        assert row.seconds is not None and row.seconds / 4 < one.seconds < 4 * row.seconds + 1


def test_memory_is_that_of_the_cost_model(tmp_path: Path) -> None:
    run = toy_run(PLAN, Ranks(), tmp_path, toy_graph(500, 5, 2000))
    stages = build_plan(run.config)
    found = forecast(run, stages)
    teacher = toy_teacher(run, 64)
    for one, stage in zip(found, stages, strict=True):
        job = build_job(run, stage, "", run.tracking.stage("", {}, {}), [teacher] if stage.teachers else [])
        assert one.bytes == sum(expected_memory(job.input_builder, job.method, stage.config).values())


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    run = toy_run(PLAN, Ranks(), tmp_path, toy_graph(500, 5, 2000))
    found = forecast(run, build_plan(run.config)[:1])
    assert "are free: choose a smaller --to" in format_forecast(found, held_memory(), 1000)[-1]
    assert "are free" not in " ".join(format_forecast(found, held_memory(), free_memory()))
