"""The benchmark harness: figures, files, comparison, every task at tiny sizes; no peer, no data set is needed."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks.side_by_side import __main__, ours, plain, run
from benchmarks.side_by_side.data import write_triples
from benchmarks.side_by_side.pool import ArmError, BenchError, Worker
from benchmarks.side_by_side.results import fallen, memory_of, merge, notes, ratios_of, read_rows, row_of, table
from benchmarks.side_by_side.roofline import (
    Ceilings,
    Work,
    distinct,
    full_pass,
    full_step,
    measure_ceilings,
    sampled_step,
)
from benchmarks.side_by_side.run_tasks import run_tasks
from benchmarks.side_by_side.tasks import FULL, QUICK, TINY, Arm, Task, all_tasks
from benchmarks.side_by_side.worker import FAMILIES, Server
from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.scorers import build_scorer
from tests.launches import call, small_data

# Issue "Fast": what it must show. A new task is entered here with its target, or with None.
TARGETS: dict[str, float | None] = {
    "train/transe/triple": 5,
    "train/transe/triple:torchkge": None,
    "train/transe/chunk": 20,
    "train/transe/batch": None,
    "train/complex/triple": 10,
    "train/complex/triple:torchkge": None,
    "train/complex/chunk": 20,
    "train/complex/batch": None,
    "train/rotate/triple": 10,
    "train/rotate/chunk": 20,
    "train/rotate/batch": None,
    "train/transe/all": None,
    "train/complex/all": None,
    "train/rotate/all": None,
    "evaluate/transe": 15,
    "evaluate/transe:torchkge": None,
    "evaluate/complex": 30,
    "evaluate/complex:torchkge": None,
    "evaluate/rotate": None,
    "distil/complex/all": 1 / 1.15,
    "distil/complex/chunk": 1 / 1.15,
    **{f"inference/{scorer}/{dim}": None for scorer in ("transe", "complex", "rotate") for dim in (64, 32)},
    "load": 10,
    "sample": None,
    "checkpoint": None,
    "serve": None,
}
CEILINGS = Ceilings(copy=20e9, gemm=90e9, elementwise=45e9)
TASK = Task("t", "things/s", "t", Arm("ours", "f", {}), Arm("plain", "f", {}), Work(10.0, gemm=9e10), target=2.0)
SILENT = Display(False)
KEYS = {"task", "ours", "peer", "peer_version", "ratio", "ratio_min", "ratio_max", "roofline_share"}


def said(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds": one} for one in seconds]


def row(name: str, ratio: float | None) -> dict[str, Any]:
    return row_of(TASK, said(1.0), said(ratio) if ratio else [], CEILINGS, peer_name="plain", peer_version="1") | {
        "task": name
    }


# -- figures --------------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians() -> None:
    found = ratios_of([1.0, 2.0, 4.0], [3.0, 2.0, 40.0])
    assert found == {"ratio": 3.0, "ratio_min": 1.0, "ratio_max": 10.0}


def test_a_row_has_units_per_second_and_the_share_of_the_roofline() -> None:
    found = row_of(TASK, said(4.0, 2.0, 8.0), said(8.0, 8.0, 8.0), CEILINGS, peer_name="x", peer_version="1.0")
    assert found.keys() >= KEYS
    assert (found["ours"], found["peer"], found["ratio"]) == (0.25, 0.125, 2.0)
    assert found["roofline_share"] == pytest.approx(1.0 / 4.0)  # 9e10 FLOPs at 90 GFLOP/s are a second
    assert (found["unit"], found["target"], found["rounds"]) == ("things/s", 2.0, 3)
    assert "gemm_share" not in found and "skipped" not in found


def test_a_peer_that_could_not_be_measured_leaves_a_row_that_says_why() -> None:
    found = row_of(TASK, said(1.0), [], CEILINGS, peer_name="x", peer_version=None, skipped="RuntimeError: no")
    assert found.keys() >= KEYS
    assert [found[key] for key in ("peer", "ratio", "ratio_min", "ratio_max")] == [None] * 4
    assert notes([found]) == ["t: no peer: RuntimeError: no"]
    assert table([found]).row_count == 1
    json.dumps(found, allow_nan=False)


def test_what_rounds_say_beside_seconds_is_kept_as_a_median() -> None:
    rounds = [{"seconds": 1.0, "blocked": b} for b in (0.1, 0.3, 0.2)]
    found = row_of(TASK, rounds, rounds, CEILINGS, peer_name="x", peer_version="1")
    assert (found["ours_blocked"], found["peer_blocked"]) == (0.2, 0.2)


def test_memory_is_counted_above_what_was_there_before_and_what_both_hold() -> None:
    ours_, peer = {"before": 100, "peak": 300}, {"before": 50, "peak": 950}
    assert memory_of(ours_, peer, 100) == {"memory_ours": 100, "memory_peer": 800, "memory_ratio": 1 / 8}
    assert memory_of(ours_, None, 100) == {"memory_ours": 100}


def test_the_table_and_the_notes_show_targets_ratios_matrix_rate_and_memory() -> None:
    one = row("a", 3.0) | {"gemm_share": 0.5, "memory_ours": 1e6, "memory_peer": 4e6, "memory_ratio": 0.25}
    one["more_targets"] = {"gemm_share_at_least": 0.7, "memory_ratio_at_most": 0.125}
    cells = [next(iter(column.cells)) for column in table([one]).columns]
    assert str(cells[5]) == "3.00 (3.00-3.00)" and str(cells[6]) == "2.00"
    (line,) = notes([one])
    assert "50% of the machine's matrix rate (target 70%)" in line and "0.250 of it, at most 0.125" in line


# -- files ----------------------------------------------------------------------------------------------------------


def test_merging_replaces_rows_of_the_same_task_keeps_the_others_and_orders_them() -> None:
    old, new = [row("b", 1.0), row("gone", 1.0), row("a", 1.0)], [row("a", 2.0), row("c", 2.0)]
    found = merge(old, new, ["a", "b", "c"])
    assert [(one["task"], one["ratio"]) for one in found] == [("a", 2.0), ("b", 1.0), ("c", 2.0), ("gone", 1.0)]


def test_the_list_is_a_list_and_the_merged_file_can_be_added_to(tmp_path: Path) -> None:
    run.save_list(tmp_path / "new" / "list.json", [row("load", 1.0)])
    assert isinstance(json.loads((tmp_path / "new" / "list.json").read_text()), list)
    for name in ("serve", "load"):
        run.save_merged(tmp_path / "bench.json", [row(name, 1.0)], TINY)
    assert [one["task"] for one in read_rows(tmp_path / "bench.json")] == ["load", "serve"]


@pytest.mark.parametrize("text", ["no json", "[1]", '{"x": 1}', '[{"task": "a"}]'])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(DataError, match="holds no results"):
        read_rows(tmp_path / "old.json")


def test_a_ratio_has_fallen_below_the_tolerance_whatever_the_seconds() -> None:
    old = [row("a", 10.0), row("b", 10.0), row("c", None), row("only old", 9.0)]
    new = [row("a", 6.9) | {"ours": 1e9}, row("b", 7.1) | {"ours": 1e-9}, row("c", 0.1), row("only new", 0.1)]
    assert fallen(old, new) == ["a: ratio 6.90, it was 10.00"]
    assert fallen(old, new, tolerance=0.5) == []


def bench(*arguments: str) -> Any:
    code, out, err = call("bench", arguments)
    return SimpleNamespace(exit_code=code, output=out + err)


def test_the_launcher_exits_1_and_names_the_tasks_whose_ratio_fell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "measure", lambda *_: [row("load", 5.0), row("serve", 5.0)])
    old, out = tmp_path / "old.json", tmp_path / "out.json"
    run.save_list(old, [row("load", 10.0), row("serve", 5.0)])
    found = bench("--quick", "--json", str(out), "--compare", str(old))
    assert found.exit_code == 1
    assert "load: ratio 5.00, it was 10.00" in found.output and "serve: ratio" not in found.output
    assert [one["task"] for one in json.loads(out.read_text())] == ["load", "serve"]
    assert bench("--quick", "--compare", str(old), "--tolerance", "0.4").exit_code == 0
    assert bench("--quick", "--compare", str(tmp_path / "none.json")).exit_code == 2


def test_the_launcher_lists_tasks_and_refuses_unknown_ones() -> None:
    assert bench("--list").output.split() == list(TARGETS)
    assert bench("--task", "trian").exit_code == 2


def test_a_full_run_goes_into_the_results_unless_it_is_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = []
    monkeypatch.setattr(__main__, "measure", lambda _names, scale, *_: scales.append(scale) or [row("load", 5.0)])
    monkeypatch.setattr(__main__, "RESULTS", tmp_path / "bench.json")
    bench("--quick")
    assert not (tmp_path / "bench.json").exists()
    bench("--task", "load")
    assert [one["task"] for one in read_rows(tmp_path / "bench.json")] == ["load"]
    assert scales == [QUICK, FULL]


# -- roofline -------------------------------------------------------------------------------------------------------


def test_the_least_time_is_that_of_memory_or_of_arithmetic() -> None:
    assert Work(20e9).seconds(CEILINGS) == 1.0
    assert Work(20e9, gemm=90e9, elementwise=45e9).seconds(CEILINGS) == 2.0


def test_expected_distinct_draws() -> None:
    assert distinct(100, 1) == pytest.approx(1.0)
    assert distinct(2, 2) == pytest.approx(1.5)
    assert distinct(40_943, 1e9) == pytest.approx(40_943)


def test_the_least_of_each_kind_of_step_on_paper() -> None:
    step = full_step("complex", entities=1000, dim=10, batch=5)
    assert step == Work(20 * 10 * 1000 / 5, gemm=6 * 2 * 1000 * 10)  # two queries a triple
    assert full_pass("transe", entities=1000, dim=10, queries=4) == Work(4 * 10 * 1000 / 4, 0.0, 3 * 1000 * 10)
    own, shared = (sampled_step("rotate", 1000, 10, batch=64, negatives=8, groups=g) for g in (64, 1))
    assert own.elementwise == shared.elementwise == 7 * 9 * 10
    assert own.bytes == pytest.approx(16 * 10 * distinct(1000, 128 + 512) / 64) and own.bytes > shared.bytes


def test_ceilings_are_measured_and_positive() -> None:
    assert all(math.isfinite(one) and one > 0 for one in vars(measure_ceilings(1 << 10)).values())


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_every_task_has_its_target_here() -> None:
    assert {name: task.target for name, task in all_tasks(FULL, "").items()} == TARGETS
    assert [name for name in TARGETS if not name.endswith(":torchkge")] == list(all_tasks(QUICK, ""))
    more = all_tasks(FULL, "")["train/complex/all"].more_targets
    assert more == {"gemm_share_at_least": 0.7, "memory_ratio_at_most": 1 / 8}


@pytest.mark.parametrize("scale", [FULL, QUICK, TINY], ids=lambda scale: scale.name)
@pytest.mark.parametrize("name", TARGETS)
def test_every_task_has_a_roofline_and_families_that_exist(name: str, scale: Any) -> None:
    task = all_tasks(scale, "").get(name)
    if task is None:
        assert scale is QUICK
        return
    assert 0 < task.work.seconds(CEILINGS) < math.inf and task.work.bytes > 0
    assert {task.ours.family, task.peer.family} <= set(FAMILIES)
    assert scale.rounds >= 5 or scale is TINY
    json.dumps([task.ours.options, task.peer.options])


@pytest.mark.parametrize("name", TARGETS)
def test_our_side_of_every_task_runs_and_so_does_the_plain_one(name: str, tmp_path: Path) -> None:
    task = all_tasks(TINY, str(tmp_path / "text"))[name]
    if name == "load":
        write_triples(tmp_path / "text", TINY.loaded, TINY.names)
    tables: Mapping[str, Any] = {"ours": ours.ARMS, "plain": plain.ARMS}
    for arm in (task.ours, task.peer):
        if arm.family in tables:
            found = tables[arm.family][arm.function](arm.options)()
            assert all(one > 0 for one in found.values()) and "seconds" in found


@pytest.mark.parametrize("name", ["transe", "complex", "rotate"])
def test_plain_scores_are_ours(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scorer = build_scorer(name, 8)
    anchor, entities = (torch.randn(n, 8, generator=generator) for n in (3, 50))
    relation = torch.randn(3, scorer.relation_size, generator=generator)
    pairs = name != "transe"  # theirs (re, …, im, …), ours (re, im, …)
    split = [torch.cat([x[:, 0::2], x[:, 1::2]], 1) if pairs and x.shape[1] == 8 else x for x in (anchor, relation)]
    apart = torch.cat([entities[:, 0::2], entities[:, 1::2]], 1) if pairs else entities
    expected = scorer.score(anchor.unsqueeze(1), relation.unsqueeze(1), entities)
    torch.testing.assert_close(plain.SCORES[name](*split, apart), expected)


def test_inference_is_measured_beside_the_teacher_on_every_device() -> None:
    found = all_tasks(replace(TINY, devices=("cpu", "cuda")), "")
    small, large = found["inference/complex/64"], found["inference/complex/64:cuda"]
    assert (small.ours.options["dim"], small.peer.options["dim"], small.peer_name) == (8, 16, "dim 16")
    assert large.ours.options == dict(small.ours.options) | {"device": "cuda"} and large.device == "cuda"
    assert run.key_of(small.peer) == run.key_of(found["inference/complex/32"].peer)  # the teacher runs once a round
    assert row_of(large, said(1.0), [], CEILINGS, peer_name="x", peer_version=None)["roofline_share"] is None
    assert table([row_of(large, said(1.0), [], CEILINGS, peer_name="x", peer_version=None)]).row_count == 1


def test_an_inference_row_tells_of_the_whole_test_split() -> None:
    rounds = [{"seconds": 0.5, "all": 1.5, "bytes": 4e6, "queries": 3.0}]
    slower = [{"seconds": 1.0, "all": 3.0, "bytes": 8e6, "queries": 3.0}]
    (line,) = notes([row_of(TASK, rounds, slower, CEILINGS, peer_name="dim 512", peer_version=None)])
    assert line == "t: 3 tail queries in 1.5 s from 4.0 MB, dim 512 in 3 s from 8.0 MB"


def test_a_finished_runs_models_are_measured_beside_their_teacher(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    stage = {"dim": 8, "batch_size": 100, "epochs": 1}
    tree = {"data": str(data), "teacher": {**stage, "dim": 16}, "student": {**stage, "method": "bkd"}}
    config = parse_config({**tree, "baseline": True, "mlflow": {"enabled": False}}, "test")
    run_plan(config, load_graph(str(data)), Ranks(), tmp_path / "run", resume=False, display=SILENT)
    found = run_tasks(tmp_path / "run", TINY)
    assert list(found) == ["inference/student", "inference/direct"]
    for task in found.values():
        assert task.peer_name == "teacher" and task.work.seconds(CEILINGS) > 0
        ours_, peer = (ours.ARMS["inference"](arm.options)() for arm in (task.ours, task.peer))
        assert ours_["bytes"] * 2 == peer["bytes"] and ours_["queries"] == TINY.asked
    with pytest.raises(ConfigError, match="no folder of a finished run"):
        run_tasks(tmp_path / "data", TINY)


def test_names_may_be_given_without_a_flag_and_a_run_stays_out_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(__main__, "measure", lambda *given: asked.append(given) or [row("load", 5.0)])
    monkeypatch.setattr(__main__, "RESULTS", tmp_path / "bench.json")
    bench("inference", "--task", "load", "--run", str(tmp_path))
    assert (asked[0][0], asked[0][4]) == (["inference", "load"], tmp_path)
    assert not (tmp_path / "bench.json").exists()


# -- running --------------------------------------------------------------------------------------------------------


class FakePool:
    """Answers at once and remembers in which order it was asked; family "broken" fails in its second round."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.family = ""

    def start(self, family: str) -> "FakePool":
        self.family = family
        return self

    def ask(self, **request: Any) -> dict[str, float]:
        self.asked.append((self.family, request["do"]))
        if self.family == "broken" and self.asked.count(("broken", "run")) == 2:
            raise ArmError("ValueError: no")
        return {"seconds": 1.0}

    def drop(self) -> None:
        self.asked.append(("all", "drop"))


def tasks_of(*peers: str) -> list[Task]:
    arm = Arm("ours", "f", {"x": 1})
    return [Task(f"a/{peer}", "", "a", arm, Arm(peer, "f", {}), Work(1.0)) for peer in peers]


def test_rounds_take_turns_and_a_shared_arm_runs_once_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pool: Any = FakePool()
    run.run_group(tasks_of("plain", "other"), 2, pool)
    assert [family for family, do in pool.asked if do == "run"] == ["ours", "plain", "other"] * 2


def test_a_peer_that_fails_half_way_is_left_out_with_its_reason_and_the_others_go_on() -> None:
    pool: Any = FakePool()
    broken, fine = tasks_of("broken", "plain")
    rounds = run.run_group([broken, fine], 3, pool)
    found = run.figures(broken, rounds, CEILINGS)
    assert found["ratio"] is None and found["skipped"] == "ValueError: no"
    assert run.figures(fine, rounds, CEILINGS)["rounds"] == 3


def test_our_own_failure_is_an_error() -> None:
    task = tasks_of("plain")[0]
    with pytest.raises(ArmError, match="our side failed: boom"):
        run.figures(task, run.Rounds(failed={run.key_of(task.ours): "boom"}), CEILINGS)


def test_names_choose_tasks_or_the_beginnings_of_several() -> None:
    known = all_tasks(FULL, "")
    assert [task.name for task in run.chosen(known, ["serve", "evaluate/transe"])] == [
        "evaluate/transe",
        "evaluate/transe:torchkge",
        "serve",
    ]
    assert len(run.chosen(known, [])) == len(known)
    with pytest.raises(ConfigError, match="no such task"):
        run.chosen(known, ["train/trans"])


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker("ours", 2, str(tmp_path_factory.mktemp("worker")))
    yield made
    made.close()


def test_a_measuring_process_sleeps_before_the_next_side_has_its_round(worker: Worker) -> None:
    worker.ask(do="prepare", arm="products", function="products", options={"numbers": 1 << 20})
    worker.ask(do="run", arm="products")
    time.sleep(run.PAUSE)
    process = psutil.Process(worker._process.pid)
    before = process.cpu_times()
    time.sleep(0.3)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1


def test_a_run_in_real_processes_with_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "missing", lambda family: family == "pykeen")
    rows = {one["task"]: one for one in run.measure(["checkpoint", "sample"], TINY, SILENT, 1)}
    assert list(rows) == ["sample", "checkpoint"]
    assert all(one.keys() >= KEYS | {"machine", "ceilings", "scale"} for one in rows.values())
    assert rows["sample"]["skipped"] == "not installed" and rows["sample"]["ours"] > 0
    assert rows["checkpoint"]["ratio_min"] <= rows["checkpoint"]["ratio"] <= rows["checkpoint"]["ratio_max"]


def test_memory_above_the_tables_is_measured_and_a_larger_batch_needs_more() -> None:
    server, task = Server("plain"), all_tasks(TINY, "")["train/complex/all"]
    peaks = []
    for batch in (16, 800):
        options = {**task.peer.options, "batch": batch, "dim": 512}
        request = {"do": "memory", "function": "one_vs_all", "options": options, "tiny": task.peer.options}
        found = server.answer(request)
        peaks.append(found["peak"] - found["before"])
    assert peaks[1] - peaks[0] > 1e6  # 1600 x 200 scores more, and what backward keeps of them


def test_a_worker_names_what_went_wrong_and_lives_on_and_a_dead_one_says_so(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArmError, match="KeyError: 'nothing'"):
        worker.ask(do="prepare", arm="a", function="nothing", options={})
    assert worker.ask(do="drop") == {}
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(BenchError, match="'plain' ended with code 1"):
        Worker("plain", 1, str(tmp_path)).ask(do="drop")
