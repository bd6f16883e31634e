"""The tables of benchmarks/tables: every trial of every arm is a plan that can be run, and the budget is the same."""

import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from distkgd.distributed.ranks import Ranks
from distkgd.errors import DivergedError
from distkgd.evaluation.model_metrics import evaluate_model
from distkgd.pipeline.config import parse_config
from tests.launches import ROOT, small_data

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
            tree = table.plan(arm, number, 0)
            if "round" in tree:
                assert set(what) <= {"round", "space", "beside"} and "teacher" in tree["round"]
                continue
            parsed = parse_config(tree, f"{arm} {number}")
            assert parsed.baseline is not False or parsed.assistant is None or len(parsed.assistant.dims) == 1


def test_a_result_is_known_again_wherever_the_runs_lie(tables: ModuleType) -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/tables/codex-s.yaml").read_text(encoding="utf-8"))
    one, other = (tables.Table(spec, "codex-s", list(spec["arms"]), Path(out), None) for out in ("runs/a", "/b"))
    names = ("direct 0 0", "ta 1 2", "m-dualde 3 1")
    plans = [(one.plans()[name], other.plans()[name]) for name in names]
    assert [mine == theirs for mine, theirs in plans] == [True, False, False]
    assert all(one.folder_of(mine).name == other.folder_of(theirs).name for mine, theirs in plans)


def test_a_benchmark_is_a_program_that_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/engine.py"), "--help"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_arms_draw_alike_what_they_share(tables: ModuleType) -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/tables/umls_16.yaml").read_text(encoding="utf-8"))
    table = tables.Table(spec, "umls", list(spec["arms"]), Path("runs"), None)
    for number in range(table.trials()):
        drawn = [table.overrides(arm, number) for arm in spec["arms"]]
        assert {tuple(x[name] for name in spec["space"]) for x in drawn} == {
            tuple(table.overrides(tables.DIRECT, number).values())
        }
    assert len({str(table.overrides(tables.DIRECT, n)) for n in range(table.trials())}) == table.trials()


@pytest.mark.parametrize("seeds", [3, 6, 17])
def test_an_interval_is_that_of_students_t_for_any_number_of_seeds(
    seeds: int, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy import stats  # seconds: not where tests are only collected

    figures = dict.fromkeys(("test_hits_at_1", "test_hits_at_10", "sparse_bytes", "train_seconds", "dim"), 1)
    table = toy_table(tables, monkeypatch, tmp_path, list(range(seeds)), {"direct": {}, "a": {}})
    gaps = [0.01 * (seed % 3) for seed in range(seeds)]
    for arm, seed in itertools.product(("direct", "a"), range(seeds)):
        mrr = 0.5 + (gaps[seed] if arm == "a" else 0.0)
        note(table, f"{arm} 0 {seed}", figures | {"valid_mrr": mrr, "test_mrr": mrr})
    table.run()
    found = table.summary()["a"]["test_gain"]
    middle, half = statistics.mean(gaps), stats.t.ppf(0.975, seeds - 1) * statistics.stdev(gaps) / math.sqrt(seeds)
    assert found["mean"] == pytest.approx(middle)
    assert (found["low"], found["high"]) == pytest.approx((middle - half, middle + half))


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


def test_a_trial_that_diverged_is_noted_and_never_chosen(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    spec = {"data": "toy", "trials": 2, "seeds": [5], "arms": {"direct": {}}, "teachers": {}, "plan": {}}
    table = tables.Table(spec, "toy", ["direct"], tmp_path, None)
    sound: Future[Any] = Future()
    figures = dict.fromkeys(("test_mrr", "test_hits_at_1", "test_hits_at_10", "sparse_bytes", "dim"), 1)
    sound.set_result({"stages": [figures | {"valid_mrr": 0.0, "train_seconds": 1.0}]})
    broken: Future[Any] = Future()
    broken.set_exception(DivergedError("step 3: loss term hard is nan"))
    for both, chosen in (((broken, sound), 1), ((sound, broken), 0)):
        table.runs, waiting = {}, iter(both)
        table.pool = SimpleNamespace(submit=lambda *_, left=waiting: next(left))
        table.finish({f"direct {n} 5": {"student": {"n": n}} for n in range(2)})
        assert table.chosen("direct") == chosen and "diverged" in table.runs[f"direct {1 - chosen} 5"]
    table.runs = {f"direct {n} 5": {"diverged": "."} for n in range(2)}
    with pytest.raises(DivergedError, match="All trials of arm direct have diverged"):
        table.chosen("direct")


def toy_table(
    tables: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    seeds: list[int],
    arms: dict[str, Any],
    **spec: Any,
) -> Any:
    monkeypatch.setattr(tables, "RESULTS", folder)
    spec = {"data": "toy", "trials": 1, "seeds": seeds, "arms": arms, "teachers": {}, "plan": {}} | spec
    return tables.Table(spec, "toy", list(arms), folder / "runs", InThisProcess())


def note(table: Any, run: str, stage: dict[str, Any]) -> None:
    table.runs[run] = {"digest": table.folder_of(table.plans()[run]).name, "stages": [stage]}


class InThisProcess:
    """What a table asks of its pool."""

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


def test_gains_are_over_the_arm_of_the_file_or_the_one_that_is_asked_for(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms: dict[str, Any] = {"direct": {}, "a": {}, "b": {"beside": "a"}}
    table = toy_table(tables, monkeypatch, tmp_path, [0, 1], arms)
    figures = dict.fromkeys(("test_hits_at_1", "test_hits_at_10", "sparse_bytes", "train_seconds", "dim"), 1)
    for name, seed in itertools.product(arms, (0, 1)):
        mrr = {"direct": 0.1, "a": 0.2, "b": 0.4}[name] + 0.01 * seed
        note(table, f"{name} 0 {seed}", figures | {"valid_mrr": mrr, "test_mrr": mrr, "num_entities": 2})
    table.run()
    assert {arm: row["test_gain"]["mean"] for arm, row in table.summary().items()} == pytest.approx(
        {"direct": 0.0, "a": 0.1, "b": 0.2}
    )
    assert "| b | 1 | 0.5 | 0.4050 | 0.4050 | 0.0071 | +0.3000 (+0.3000 … +0.3000) |" in table.table("direct")
    written = (tmp_path / "table_toy.json").read_text(encoding="utf-8")
    assert json.loads(written)["arms"] == table.summary()
    monkeypatch.setattr(tables, "machine", lambda: {"commit": "a later one"})
    table.run()
    assert (tmp_path / "table_toy.json").read_text(encoding="utf-8") == written


def test_trials_do_not_read_test_and_what_was_chosen_is_ranked_on_it_in_the_end(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"method": "scratch", "dim": 8, "epochs": 1, "batch_size": 200}
    table = toy_table(
        tables,
        monkeypatch,
        tmp_path,
        [0, 1],
        {
            "direct": {},
            "bkd": {"plan": {"teacher": "@big", "student": {"method": "bkd"}}},
            "med": {"plan": {"student": {"method": "med", "distill": {"dims": [4, 8]}}}},
        },
        data=str(small_data(tmp_path / "graph")),
        trials=2,
        plan={"student": small, "device": "cpu", "report": {"html": False}},
        space={"student.optimizer.lr": [0.05, 0.1]},
        teachers={"big": {"dim": 4, "epochs": 1, "batch_size": 200}},
        curve=[4, 8],
    )
    table.run()
    chosen = {f"{arm} {table.chosen(arm)} {seed}" for arm in ("direct", "bkd", "med") for seed in (0, 1)}
    chosen |= {"teacher big 0", "teacher big 1"}
    written = json.loads((tmp_path / "table_toy.json").read_text(encoding="utf-8"))
    for name, run in written["runs"].items():
        student = run["stages"][-1]
        assert ("test" in str(student)) == (name in chosen), name
        folder = tmp_path / "runs" / run["digest"]
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert all("test" not in stage and "test" not in stage.get("curve", {}) for stage in report["stages"])
        if name in chosen:
            found = evaluate_model(folder / "stages/student", Ranks(), split="test", source=None)["overall"]
            assert student["test_mrr"] == pytest.approx(found["mrr"])
        if name in chosen and name.startswith("med"):
            assert student["curve"]["test"]["8"]["mrr"] == pytest.approx(student["test_mrr"])
            assert set(student["curve"]["test"]) == set(student["curve"]["valid"])
        if name in chosen and name.startswith("direct"):
            assert set(student["curve"]["test"]) == {"4"}
    assert len(written["runs"]) == 11 and set(written["arms"]) == {"direct", "bkd", "med"}
    assert "test_gain" in written["arms"]["med"]


def test_a_table_has_no_test_figures_where_there_are_no_test_triples(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    spec = {"data": "toy", "trials": 1, "seeds": [0, 1], "arms": {"direct": {}, "a": {}}, "teachers": {}, "plan": {}}
    table = tables.Table(spec, "none", ["direct", "a"], Path("runs"), None)
    student = {"valid_mrr": 0.3, "sparse_bytes": 8, "train_seconds": 1.0, "dim": 4}
    student |= dict.fromkeys(("test_mrr", "test_hits_at_1", "test_hits_at_10"))
    table.runs = {f"{arm} 0 {seed}": {"digest": "", "stages": [student]} for arm in ("direct", "a") for seed in (0, 1)}
    assert table.table().splitlines()[2] == "| direct | 8 | – | 0.3000 | – |  |  | – | – | 1 |"
    assert "valid_gain" in table.summary()["a"] and "test_gain" not in table.summary()["a"]


def test_trials_can_be_shorter_and_of_another_seed_than_what_is_reported(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = toy_table(
        tables,
        monkeypatch,
        tmp_path,
        [1],
        {
            "direct": {},
            "bkd": {"plan": {"teacher": "@small", "student": {"method": "bkd"}}},
            "rounded": {"round": {"teacher": "@small", "bits": 2, "dim": 4}},
        },
        data=str(small_data(tmp_path / "graph")),
        trials=2,
        chosen_by=0,
        trial_share=0.5,
        plan={"student": {"dim": 4, "epochs": 4, "batch_size": 200}, "device": "cpu", "report": {"html": False}},
        space={"student.optimizer.lr": [0.05, 0.1]},
        teachers={
            "small": {"dim": 6, "method": "bkd", "teacher": "@big", "epochs": 2, "batch_size": 200},
            "big": {"dim": 8, "epochs": 2, "batch_size": 200},
        },
    )
    table.run()
    trials = {f"trial {arm} {n} 0" for arm in table.arms for n in (0, 1)}
    chosen = {f"{arm} {table.chosen(arm)} 1" for arm in table.arms}
    assert set(table.runs) == trials | chosen | {
        f"teacher {name} {seed}" for name in ("big", "small") for seed in (0, 1)
    }
    plans = table.plans()
    assert {plans[name]["student"]["epochs"] for name in trials if "rounded" not in name} == {2}
    assert {plans[name]["student"]["epochs"] for name in chosen if "rounded" not in name} == {4}
    assert table.runs["teacher small 1"]["stages"][-1]["method"] == "bkd"
    assert table.runs["rounded 0 1"]["stages"][-1]["dim"] == 4
    assert all(("test_mrr" in run["stages"][-1]) == (not name.startswith("trial")) for name, run in table.runs.items())
