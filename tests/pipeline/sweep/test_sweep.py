"""Sweeps as users run them: launch/ablate.py in a process of its own, on Ray."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from distkgd.common.console import Display
from distkgd.common.locks import BusyError, held
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.pipeline.ray.session import ray_session
from distkgd.pipeline.sweep.config import load_sweep
from distkgd.pipeline.sweep.search import search_arms
from distkgd.pipeline.sweep.sweep import ENVIRONMENT, Slots, run_sweep
from tests.launches import ROOT, call, family, finish, output_of, small_data, wait_for
from tests.programs import Program, started

STAGE = {"scorer": "complex", "batch_size": 60, "validate_every": 1}
PLAN: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "teacher": {**STAGE, "dim": 16, "epochs": 2},
    "student": {**STAGE, "dim": 8, "method": "bkd", "epochs": 3},
    "baseline": True,
    "mlflow": {"enabled": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data") / "small")


@contextmanager
def ablate(cwd: Path, *arguments: str) -> Iterator[Program]:
    """launch/ablate.py, running; whatever it leaves behind is ended."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "160"}
    process = started([str(ROOT / "launch/ablate.py"), *arguments], cwd, env, cwd / "output.txt")
    members: dict[int, psutil.Process] = {}
    try:
        yield process
        members = {one.pid: one for one in family(process)}
    finally:
        members |= {one.pid: one for one in family(process)}
        for one in members.values():
            if one.is_running():
                one.kill()
        process.wait(10)


def sweep_file(folder: Path, data: Path, **sweep: Any) -> str:
    base = {**PLAN, "data": str(data)} | sweep.pop("base", {})
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"base": base, **sweep}, sort_keys=False), encoding="utf-8")
    return "sweep.yaml"


def ended(cwd: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output so far and report of a whole launch with --out out."""
    with ablate(cwd, *arguments, "--out", "out") as process:
        code, said = finish(process, cwd, 500)
    path = cwd / "out" / "report.json"
    return code, said, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / kind).glob("*/trial.json"))]


@pytest.fixture(scope="module")
def two_slots() -> Iterator[None]:
    """Ray as a sweep would start it, for all sweeps that this process runs itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ray_session("local", num_cpus=2, quiet=True):
            yield


def swept(cwd: Path, file: str, *, resume: bool = False) -> dict[str, Any]:
    """The report of a sweep that this process runs, in the folder out."""
    sweep, base = load_sweep(cwd / file)
    return run_sweep(sweep, base, cwd / "out", resume=resume, slots=Slots(), display=Display(False))


@pytest.mark.usefixtures("two_slots")
@pytest.mark.timeout(600)  # seconds of work each, minutes on a busy machine
def test_a_table_trains_its_teacher_once_as_distill_would_and_a_resumed_one_only_what_is_new(
    tmp_path: Path, data: Path
) -> None:
    rows: dict[str, Any] = {"plain": {"paper": 0.3}}
    track = {"mlflow": {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    file = sweep_file(tmp_path, data, rows=rows, base=track)
    report = swept(tmp_path, file)
    assert [(row["row"], row["num_finished"]) for row in report["rows"]] == [("plain", 1), ("direct", 1)]
    assert len(records(tmp_path / "out", "teachers")) == 1
    assert {len(one["starts"]) for kind in ("teachers", "trials") for one in records(tmp_path / "out", kind)} == {1}
    assert [epoch for epoch, _ in records(tmp_path / "out", "trials")[0]["curve"]] == [1, 2, 3]
    assert all((tmp_path / "out" / name).exists() for name in ("report.md", "chart.svg", "chart.png"))

    config = parse_config({**PLAN, "data": str(data)}, "test")
    alone = run_plan(config, load_graph(str(data)), Ranks(), tmp_path / "alone", resume=False, display=Display(False))
    expected = {stage.name: stage.mrr("test") for stage in alone.stages}
    assert report["rows"][0]["test"]["mrr"]["mean"] == expected["student"]
    assert report["rows"][1]["test"]["mrr"]["mean"] == expected["direct"]

    with pytest.raises(ConfigError, match="already holds a sweep; add --resume"):
        swept(tmp_path, file)
    rows["hot"] = {"student.distill.temperature": 3.0}
    report = swept(tmp_path, sweep_file(tmp_path, data, rows=rows, base=track), resume=True)
    assert [(row["row"], row["num_finished"]) for row in report["rows"]] == [("plain", 1), ("hot", 1), ("direct", 1)]
    assert "mean" in report["rows"][1]["difference"]["test"]
    starts = [len(one["starts"]) for kind in ("teachers", "trials") for one in records(tmp_path / "out", kind)]
    assert starts == [1] * 4
    check_tracking(tmp_path)


@pytest.mark.usefixtures("two_slots")
@pytest.mark.timeout(600)
def test_a_table_of_a_paper_is_foreseen_trained_and_shown_beside_its_figures(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs/tables").mkdir(parents=True)
    stages = {"teacher": {**STAGE, "dim": 32, "epochs": 300}, "student": {**STAGE, "dim": 16, "method": "bkd"}}
    toy = {"base": {**PLAN, **stages, "data": "nowhere"}, "rows": {"BKD": {"paper": 0.25}}, "reference": "direct"}
    toy |= {"paper": "MRR of a table", "paper_direct": 0.125, "paper_teacher": 0.75}
    small = {"data": str(data), "set": {"teacher": {"dim": 8, "epochs": 1}, "student": {"dim": 4, "epochs": 1}}}
    text = "# A toy. It has a row.\n" + yaml.safe_dump(toy | {"cpu": small})
    (tmp_path / "configs/tables/toy.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("DISTKGD_CONFIGS", str(tmp_path / "configs"))
    monkeypatch.chdir(tmp_path)
    assert call("reproduce", [])[:2] == (0, "toy  A toy\n")
    assert call("reproduce", ["toi"])[2] == "error: No table is called 'toi'; there are: toy.\n"
    assert call("reproduce", ["toy", "--size", "paper", "--dry-run"])[0] == 2  # its data are nowhere
    code, _, told = call("reproduce", ["toy", "--dry-run", "--seeds", "0,1"])
    assert code == 0 and "BKD: teacher, student; about" in told and "(2 seeds, 4 trials, one after another" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs"]
    code, out, told = call("reproduce", ["toy"])
    assert code == 0, told
    report = json.loads(Path("runs/toy-cpu/report.json").read_text(encoding="utf-8"))
    found = {row["row"]: (row["dim"], row["paper"]) for row in report["rows"]}
    assert found == {"BKD": (4, 0.25), "direct": (4, 0.125), "teacher": (8, 0.75)}
    assert "difference" in report["rows"][0] and report["rows"][0]["ranking_seconds"] > 0
    assert "Paper: MRR of a table." in out and "One seed, 0." in out and "0.125" in out
    assert call("reproduce", ["toy"])[0] == 2 and call("reproduce", ["toy", "--resume"])[0] == 0


def check_tracking(folder: Path) -> None:
    """One parent, a child for each of three trials and their teacher, each with its curve."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("distkgd")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert (len(parents), len(children)) == (1, 4)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {one.path for one in client.list_artifacts(parents[0].info.run_id)} >= {"report.json", "chart.svg"}
    for run in children:
        epochs = [point.step for point in client.get_metric_history(run.info.run_id, "valid_mrr")]
        assert epochs in ([1, 2, 3], [1, 2])
        assert "final/test/mrr" in run.data.metrics


HALVING = {"search": "optuna", "scheduler": {"name": "asha", "grace": 1, "reduction": 2}}
SPACE = {"student.optimizer.lr": {"loguniform": [0.001, 1.0]}, "student.distill.temperature": {"uniform": [1, 3]}}
LONGER = {"student": {**PLAN["student"], "epochs": 4}}


@pytest.mark.usefixtures("two_slots")
@pytest.mark.timeout(600)
def test_a_search_halves_the_trials_of_both_arms_and_reads_test_for_the_best_alone(tmp_path: Path, data: Path) -> None:
    file = sweep_file(tmp_path, data, space=SPACE, trials=3, base=LONGER, **HALVING)
    report = swept(tmp_path, file)
    assert Counter(one["kind"] for one in report["tried"]) == {"student": 3, "direct": 3}
    assert {one["status"] for one in report["tried"]} == {"finished", "stopped"}
    stopped = [one for one in report["tried"] if one["status"] == "stopped"]
    assert all(0 < one["epoch"] < 4 for one in stopped)
    assert [(row["row"], row["num_finished"]) for row in report["rows"]] == [("student", 1), ("direct", 1)]
    assert "mean" in report["rows"][0]["difference"]["test"]
    out = tmp_path / "out"
    assert len(list(out.glob("trials/*/test.json"))) == 2
    whole = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("trials/*/report.json")]
    assert whole and not any("test" in stage for one in whole for stage in one["stages"])


def test_optuna_is_asked_for_the_trials_of_an_earlier_call_first(tmp_path: Path, data: Path) -> None:
    from distkgd.pipeline.sweep.tune import _optuna, to_tune

    sweep, base = load_sweep(tmp_path / sweep_file(tmp_path, data, space=SPACE, trials=3, **HALVING))
    arm = search_arms(sweep, base, lambda _: "sha")[0]
    space = {key: to_tune(domain) for key, domain in arm.drawn.items()}
    earlier = _optuna(space, 0, [])
    before = [arm.trial(earlier.suggest(str(i))) for i in range(2)]
    search = _optuna(space, 0, before)
    drawn = [arm.trial(search.suggest(str(i))) for i in range(3)]
    assert [trial.digest for trial in drawn[:2]] == [trial.digest for trial in before]
    assert 0.001 <= drawn[2].scored.optimizer.lr < 1.0 and drawn[2].digest not in {t.digest for t in before}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_that_draws_what_it_has_drawn_trains_it_once(tmp_path: Path, data: Path, search: str) -> None:
    how = {**HALVING, "search": search, "space": {"student.optimizer.lr": {"choice": [0.1]}}}
    code, said, report = ended(tmp_path, sweep_file(tmp_path, data, trials=3, **how))
    assert code == 0, said
    assert Counter(one["kind"] for one in report["tried"]) == {"student": 1, "direct": 1}
    assert max(len(one["starts"]) for one in records(tmp_path / "out", "trials")) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_asked_for_more_trials_keeps_those_it_has(tmp_path: Path, data: Path, search: str) -> None:
    how = {**HALVING, "search": search, "space": SPACE, "base": LONGER, "seeds": [0, 1]}
    code, said, first = ended(tmp_path, sweep_file(tmp_path, data, trials=3, **how))
    assert code == 0, said
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.glob("trials/*/report.json")}
    code, said, again = ended(tmp_path, sweep_file(tmp_path, data, trials=5, **how), "--resume")
    assert code == 0, said
    assert {path: path.read_bytes() for path in before} == before
    assert Counter(one["kind"] for one in again["tried"]) == {"student": 5, "direct": 5}
    names = {one["name"]: one["status"] for one in again["tried"]}
    assert all(names[one["name"]] == one["status"] for one in first["tried"])
    assert max(len(one["starts"]) for one in records(out, "trials")) == 1
    assert [(row["row"], row["num_finished"]) for row in again["rows"]] == [("student", 2), ("direct", 2)]
    assert "low" in again["rows"][0]["difference"]["test"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_killed_at_half_has_eight_results_after_resuming_none_made_twice(tmp_path: Path, data: Path) -> None:
    grid = {"student.distill.temperature": [1.0, 2.0, 3.0, 4.0], "student.optimizer.lr": [0.1, 0.2]}
    student = {**PLAN["student"], "epochs": 40, "checkpoint_every": 5}
    base = {"student": student, "baseline": False}
    file, out = sweep_file(tmp_path, data, grid=grid, base=base), tmp_path / "out"

    def done() -> int:
        return sum(one["status"] == "finished" for one in records(out, "trials"))

    def under_way() -> list[dict[str, Any]]:
        return [one for one in records(out, "trials") if one["status"] == "running" and len(one["curve"]) > 10]

    with ablate(tmp_path, file, "--out", "out") as process:
        deadline = time.monotonic() + 500
        while (done() < 4 or not under_way()) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert 4 <= done() < 8 and under_way(), output_of(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        before = {path: path.read_bytes() for path in out.glob("trials/*/report.json")}
        with ablate(tmp_path, file, "--out", "out", "--resume") as again:
            code, said = finish(again, tmp_path, 400)
    assert code == 0, said
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [one["status"] for one in report["trials"]] == ["finished"] * 8
    assert all(path.read_bytes() == content for path, content in before.items())
    for one in report["trials"]:
        assert len(one["ends"]) == 1 and len(one["starts"]) <= 2, one
    assert 1 <= sum(len(one["starts"]) for one in report["trials"]) - 8 <= 2
    teachers = records(out, "teachers")
    assert [(len(one["starts"]), len(one["ends"])) for one in teachers] == [(1, 1)]
    for path in out.glob("trials/*/stages/student/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["epoch"] for row in rows if "valid/mrr" in row] == list(range(1, 41)), path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_whose_process_dies_is_begun_again_where_it_was(tmp_path: Path, data: Path) -> None:
    student = {**PLAN["student"], "epochs": 60, "checkpoint_every": 1}
    base = {"student": student, "baseline": False}
    file, out = sweep_file(tmp_path, data, rows={"a": {}}, base=base), tmp_path / "out"
    with ablate(tmp_path, file, "--out", "out") as process:
        wait_for(process, tmp_path, lambda: any(len(one["curve"]) > 4 for one in records(out, "trials")))
        os.kill(records(out, "trials")[0]["pid"], signal.SIGKILL)
        code, said = finish(process, tmp_path, 400)
    assert code == 0, said
    record = records(out, "trials")[0]
    assert (record["status"], len(record["starts"]), len(record["ends"])) == ("finished", 2, 1)
    assert [epoch for epoch, _ in record["curve"]] == list(range(1, 61))


def test_ctrl_c_ends_a_sweep_in_order(tmp_path: Path, data: Path) -> None:
    base = {"student": {**PLAN["student"], "epochs": 100000}, "baseline": False}
    file = sweep_file(tmp_path, data, rows={"a": {}}, base=base)
    with ablate(tmp_path, file, "--out", "out") as process:
        wait_for(process, tmp_path, lambda: any(one["curve"] for one in records(tmp_path / "out", "trials")))
        process.send_signal(signal.SIGINT)
        code, said = finish(process, tmp_path, 60)
    assert code == 130, said
    assert "--resume" in said
    assert records(tmp_path / "out", "trials")[0]["status"] == "running"


def test_a_sweep_that_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, data: Path) -> None:
    sweep, base = load_sweep(tmp_path / sweep_file(tmp_path, data, rows={"a": {"student.batch_size": 100000}}))
    with pytest.raises(ConfigError, match="batch_size 100000 does not fit"):
        run_sweep(sweep, base, tmp_path / "out", resume=False, slots=Slots(), display=Display(False))
    assert not (tmp_path / "out").exists()


def test_a_search_without_valid_triples_to_choose_by_is_refused_before_anything_is_written(
    tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data").glob("valid*"):
        path.unlink()
    sweep, base = load_sweep(tmp_path / sweep_file(tmp_path, tmp_path / "data", space=SPACE, trials=3))
    with pytest.raises(ConfigError, match="data has no valid triples to choose the best trials by"):
        run_sweep(sweep, base, tmp_path / "out", resume=False, slots=Slots(), display=Display(False))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("two_slots")
def test_a_sweep_does_not_wait_without_end_for_a_node_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    from distkgd.pipeline.sweep import tune

    monkeypatch.setattr(tune, "ROOM_SECONDS", 0.2)
    monkeypatch.setattr(tune, "ASK_SECONDS", 0.0)
    fits, never = tune.Room({"cpu": 2}), tune.Room({"cpu": 1, "gpu": 1000})
    time.sleep(0.3)
    fits.check()
    with pytest.raises(DistkgdError, match=r"no node has had {'CPU': 1, 'GPU': 1000} for a trial.*--resume"):
        never.check()


def test_a_claim_keeps_others_out_until_it_is_given_up(tmp_path: Path) -> None:
    with held(tmp_path / "claim"), pytest.raises(BusyError, match="in use"), held(tmp_path / "claim", 0.3):
        pass
    with held(tmp_path / "claim", 0.0):
        pass
