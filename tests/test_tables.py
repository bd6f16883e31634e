"""The tables of benchmarks/tables: every trial of every arm is a plan that can be run, and the budget is the same."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from distkgd.config import parse_config
from tests.launches import ROOT

PLANS = sorted((ROOT / "benchmarks/tables").glob("*.yaml"))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_trial_is_a_plan(path: Path, tables: ModuleType) -> None:
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    table = tables.Table(spec, path.stem, list(spec["arms"]), Path("runs"), None)
    for name, seed in table.teachers():
        parse_config(table.teacher(name, seed), name)
    for arm, what in spec["arms"].items():
        assert what.get("beside", tables.DIRECT) in spec["arms"]
        for number in range(table.trials()):
            parsed = parse_config(table.plan(arm, number, 0), f"{arm} {number}")
            assert parsed.baseline is not False or parsed.assistant is None or len(parsed.assistant.dims) == 1


def test_arms_draw_alike_what_they_share(tables: ModuleType) -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/tables/umls_16.yaml").read_text(encoding="utf-8"))
    table = tables.Table(spec, "umls", list(spec["arms"]), Path("runs"), None)
    for number in range(table.trials()):
        drawn = [table.overrides(arm, number) for arm in spec["arms"]]
        assert {tuple(x[name] for name in spec["space"]) for x in drawn} == {
            tuple(table.overrides(tables.DIRECT, number).values())
        }
    assert len({str(table.overrides(tables.DIRECT, n)) for n in range(table.trials())}) == table.trials()


def test_an_interval_is_that_of_students_t(tables: ModuleType) -> None:
    found = tables.interval([0.01, 0.02, 0.06])
    half = 4.303 * math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2) / math.sqrt(3)
    assert found["mean"] == pytest.approx(0.03)
    assert (found["low"], found["high"]) == pytest.approx((0.03 - half, 0.03 + half))


def test_a_croppable_model_is_chosen_by_the_mean_of_its_sub_models(tables: ModuleType) -> None:
    def run(largest: float, *sub_models: float) -> dict[str, Any]:
        student: dict[str, Any] = {"valid_mrr": largest}
        if sub_models:
            student["curve"] = {"valid": {str(dim): {"mrr": mrr} for dim, mrr in enumerate(sub_models)}}
        return {"stages": [student]}

    table = tables.Table({"trials": 2, "seeds": [5], "arms": {}, "teachers": {}}, "none", [], Path("runs"), None)
    table.runs = {"direct 0 5": run(0.3), "direct 1 5": run(0.4)}
    table.runs |= {"med 0 5": run(0.3, 0.3, 0.3), "med 1 5": run(0.4, 0.1, 0.4)}
    assert (table.chosen("direct"), table.chosen("med")) == (1, 0)


def test_gains_are_over_the_arm_of_the_file_or_the_one_that_is_asked_for(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    arms: dict[str, Any] = {"direct": {}, "a": {}, "b": {"beside": "a"}}
    spec = {"data": "toy", "trials": 1, "seeds": [0, 1], "arms": arms, "teachers": {}, "plan": {}}
    table = tables.Table(spec, "toy", list(arms), tmp_path, None)
    figures = dict.fromkeys(("test_hits_at_1", "test_hits_at_10", "sparse_bytes", "train_seconds", "dim"), 1)
    for name, seed in ((arm, seed) for arm in arms for seed in spec["seeds"]):
        mrr = {"direct": 0.1, "a": 0.2, "b": 0.4}[name] + 0.01 * seed
        stage = figures | {"valid_mrr": mrr, "test_mrr": mrr}
        run = f"{name} 0 {seed}"
        table.runs[run] = {"digest": table.folder_of(table.plans()[run]).name, "stages": [stage]}
    table.run()
    assert {arm: row["test_gain"]["mean"] for arm, row in table.summary().items()} == pytest.approx(
        {"direct": 0.0, "a": 0.1, "b": 0.2}
    )
    assert "| b | 1 | 0.4050 | 0.4050 | 0.0071 | +0.3000 (+0.3000 … +0.3000) |" in table.table("direct")
    written = (tmp_path / "table_toy.json").read_text(encoding="utf-8")
    assert json.loads(written)["arms"] == table.summary()
    monkeypatch.setattr(tables, "machine", lambda: {"commit": "a later one"})
    table.run()
    assert (tmp_path / "table_toy.json").read_text(encoding="utf-8") == written
