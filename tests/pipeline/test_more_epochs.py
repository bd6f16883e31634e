"""A finished run that has come to have more epochs goes on as if it had had them from the start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import distkgd
from distkgd.config.tree import merge, read_yaml
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.models.model_folder import load_model
from tests.launches import SMALL, call, small_config, small_data

TREE: dict[str, Any] = {**SMALL, "report": {"html": False}, "baseline": False}


def rows_of(run: distkgd.Run, stage: str = "student") -> list[torch.Tensor]:
    model = load_model(run.folder / "stages" / stage, Ranks()).model
    return [model.entity.weight, model.relation]


def logged(run: distkgd.Run, key: str) -> list[Any]:
    lines = (run.folder / "stages/student/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_more_epochs_are_those_of_a_run_that_had_them_from_the_start(tmp_path: Path) -> None:
    tree = merge(TREE, {"data": str(small_data(tmp_path / "data"))})
    longer = merge(tree, {"student": {"epochs": 5}})
    whole = distkgd.train(longer, out=tmp_path / "whole")
    short = distkgd.train(tree, out=tmp_path / "run")
    first = rows_of(short)
    assert (
        distkgd.train(tree, out=tmp_path / "run", resume=True).stages["student"].steps == short.stages["student"].steps
    )
    more = distkgd.train(longer, out=tmp_path / "run", resume=True)
    assert more.stages["student"].steps == whole.stages["student"].steps
    for one, other, before in zip(rows_of(more), rows_of(whole), first, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, before)
    for key in ("step", "valid/mrr"):
        assert logged(more, key) == logged(whole, key) and len(logged(more, key)) >= 5
    assert more.stages["student"].valid == whole.stages["student"].valid
    assert read_yaml(more.folder / "plan.yaml")["config"]["student"]["epochs"] == 5
    for fewer in (tree, merge(longer, {"student": {"epochs": 4}}), merge(longer, {"student": {"epochs": 6, "dim": 4}})):
        with pytest.raises(ConfigError, match=r"another plan \(differs in: student\)"):
            distkgd.train(fewer, out=tmp_path / "run", resume=True)


def test_a_taught_student_may_have_more_epochs_and_its_teacher_not(tmp_path: Path) -> None:
    taught = {"teacher": {"dim": 12, "epochs": 2, "batch_size": 60}, "baseline": False, "student": {"method": "bkd"}}
    config = small_config(tmp_path / "small.yaml", small_data(tmp_path / "data"), **taught)
    out = ["--out", tmp_path / "run"]
    code, _, errors = call("distill", [config, *out])
    assert code == 0, errors
    code, _, said = call("distill", [config, *out, "--resume", "student.epochs=4"])
    assert code == 0 and "teacher: finished before" in said and "student: resumed at step" in said, said
    code, _, errors = call("distill", [config, *out, "--resume", "student.epochs=4", "teacher.epochs=3"])
    assert code == 2 and "another plan (differs in: teacher)" in " ".join(errors.split())
