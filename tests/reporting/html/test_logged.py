"""What methods add to the curves: soft-label weights, schedules, phases, masks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.distributed.pruning import Mask, changed
from distkgd.distributed.ranks import Ranks
from distkgd.models.view import View
from distkgd.training.loop import train_stage
from distkgd.training.metrics_log import MetricsLog
from tests.toys import toy_job

STAGE: dict[str, Any] = {"dim": 8, "batch_size": 100, "epochs": 4, "validate_every": 2}


def log_of(config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a whole stage."""
    job = toy_job({"student": STAGE | config}, Ranks(), folder)
    train_stage(job)
    lines = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("soft", ["huber", "kl"])
def test_dualde_logs_the_mean_weight_of_its_soft_labels(soft: str, tmp_path: Path) -> None:
    how = {"alpha": 0.7, "beta": 0.2, "soft": soft, "stage_one": False}
    job = toy_job({"student": STAGE | {"method": "dualde", "distill": how, "init_scale": 0.5}}, Ranks(), tmp_path)
    inputs = job.prefetcher.inputs(0, 0)
    (update,) = job.method.updates(inputs)
    student, teacher = (View(m, inputs, grad=False).positive for m in (job.method.student, job.method.teachers[0]))
    found = {name: float(value) for name, value in update.watched.items()}
    assert found == pytest.approx(
        {
            "soft_weight/student_positive": float(torch.sigmoid(0.7 * (teacher + 0.2)).mean()),
            "soft_weight/teacher_positive": float(torch.sigmoid(0.7 * (student + 0.2)).mean()),
        }
    )
    assert not any(value.requires_grad for value in update.watched.values())


def test_dualdes_phases_are_logged_and_watched_numbers_are_no_loss(tmp_path: Path) -> None:
    log = log_of({"method": "dualde", "distill": {"stage_two": {"start": 2, "epochs": 2}}}, tmp_path)
    rows = [row for row in log if "loss" in row]
    phases = [row["phase"] for row in rows]
    assert phases == sorted(phases) and set(phases) == {1.0, 2.0}
    for row in rows:
        assert row["loss"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("loss/")))
        assert 0 < row["soft_weight/student_positive"] < 1
        assert ("soft_weight/teacher_positive" in row) == (row["phase"] == 2)
        assert not any(key.startswith("loss/soft_weight") for key in row)


def test_without_evaluation_no_soft_label_is_weighed(tmp_path: Path) -> None:
    log = log_of({"method": "dualde", "distill": {"evaluation": False, "stage_two": None}}, tmp_path)
    assert not any(key.startswith("soft_weight") for row in log for key in row)


@pytest.mark.parametrize("schedule", ["polynomial", "constant", "two_phase"])
def test_iterdes_lambda_is_that_of_the_steps_epoch(schedule: str, tmp_path: Path) -> None:
    log = log_of({"method": "iterde", "distill": {"k": 0.5, "p": 2.0, "schedule": schedule}}, tmp_path)
    rows = [row for row in log if "loss" in row]
    for row in rows:
        epoch = row["epoch"]  # the one that the step belongs to
        if schedule == "polynomial":
            assert row["lambda"] == pytest.approx(0.5 * (epoch / 4) ** 2)
        elif schedule == "constant" or epoch >= 2:
            assert row["lambda"] == 0.5
        else:
            assert "lambda" not in row  # it cancels out there


def test_metasd_logs_what_its_mask_hides_and_how_much_of_it_changed(tmp_path: Path) -> None:
    log = log_of({"method": "metasd", "distill": {"prune": {"rate": 0.5, "ramp": 2}, "meta": False}}, tmp_path)
    hidden = [row["mask/hidden"] for row in log if "loss" in row]
    churn = [row["mask/churn"] for row in log if "loss" in row]
    assert hidden[0] == 0.0 and hidden[-1] == pytest.approx(0.5, abs=0.01) and hidden == sorted(hidden)
    assert all(0 <= one < 1 for one in churn) and max(churn) > 0


def test_a_masks_change_counts_numbers_that_went_and_numbers_that_came_back() -> None:
    old = Mask(torch.tensor([[True, True], [False, True]]), torch.tensor([[True, False]]))
    new = Mask(torch.tensor([[True, False], [True, True]]), torch.tensor([[True, False]]))
    assert changed(old, new, Ranks()) == (2 / 6, 2 / 6)


def test_energy_goes_on_after_a_restart_and_is_unknown_where_a_part_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted:
        def joules(self) -> float:
            return 5.0

    monkeypatch.setattr("distkgd.training.metrics_log.Meter", Counted)
    job = toy_job({"student": STAGE}, Ranks(), tmp_path)
    progress = train_stage(job)
    assert progress.joules == 5.0
    with MetricsLog(job, progress) as log:
        log.validation({"mrr": 0.1}, False)
    assert progress.joules == 10.0
    progress.joules = None
    with MetricsLog(job, progress) as log:
        log.validation({"mrr": 0.1}, False)
    assert progress.joules is None
