"""Plans on Ray: the same figures as in one process group, side by side where they can be, and through deaths."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.pipeline.ray.driver import ChainError
from distkgd.pipeline.ray.session import ray_session
from tests.launches import SMALL, small_data
from tests.pipeline.ray.clusters import CHAIN, Background, attempts, chained, kill
from tests.pipeline.test_plan import run_on_data
from tests.ranks import run_on_ranks

LONG = {"epochs": 80, "validate_every": 10, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def two_slots() -> Iterator[None]:
    with ray_session("local", num_cpus=2):
        yield


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return CHAIN | {"data": str(small_data(tmp_path / "data"))}


def overlap(report: dict[str, Any], one: str, other: str) -> bool:
    a, b = ([e for e in report["timeline"] if e["stage"] == name][-1] for name in (one, other))
    return bool(a["started"] < b["ended"] and b["started"] < a["ended"])


@pytest.mark.usefixtures("two_slots")
def test_a_chain_of_gangs_has_the_figures_of_one_process_group(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = merge(tree, {"chain": {"dims": [16, 8]}})
    config = parse_config(tree, "test")
    whole = run_plan(config, load_graph(config.data), Ranks(), tmp_path / "alone", resume=False, display=Display(False))
    alone = whole.to_json()
    report = chained(tree, tmp_path / "run")
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "student", "direct"]
    for mine, theirs in zip(report["stages"], alone["stages"], strict=True):
        assert (mine["valid"], mine["test"], mine["teachers"]) == (theirs["valid"], theirs["test"], theirs["teachers"])
    assert overlap(report, "teacher", "direct") and not overlap(report, "teacher", "student")
    stored = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert {key: stored[key] for key in ("world", "device", "timeline")} == {
        "world": 1,
        "device": "cpu",
        "timeline": report["timeline"],
    }
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert re.search(r"^Timeline: .*teacher \d+\.\d–\d+\.\d s on 1 worker; .*student \d+", text, re.MULTILINE)
    assert chained(tree, tmp_path / "run", resume=True)["timeline"] == report["timeline"]


@pytest.mark.usefixtures("two_slots")
def test_a_teacher_that_was_brought_is_ranked_on_ray_as_in_one_process_group(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    first = parse_config({"data": tree["data"], "student": tree["teacher"], "mlflow": {"enabled": False}}, "test")
    run_plan(first, load_graph(tree["data"]), Ranks(), tmp_path / "first", resume=False, display=Display(False))
    path = str(tmp_path / "first/stages/student")
    brought = {**{key: one for key, one in tree.items() if key != "chain"}, "teacher": path, "baseline": False}
    config = parse_config(brought, "test")
    whole = run_plan(config, load_graph(config.data), Ranks(), tmp_path / "alone", resume=False, display=Display(False))
    alone = whole.to_json()
    report = chained(brought, tmp_path / "run")
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "student"]
    assert report["stages"][0] == alone["stages"][0] and report["stages"][0]["source"] == path


@pytest.mark.usefixtures("two_slots")
def test_a_stage_whose_worker_is_killed_goes_on_from_its_checkpoint(tree: dict[str, Any], tmp_path: Path) -> None:
    one = {**SMALL, "data": tree["data"], "student": {**SMALL["student"], **LONG, "epochs": 40}}
    chain = Background(one, tmp_path / "run", workers=2)
    kill(chain.at_work("student")["pids"][1])
    report = chain.report()
    assert attempts(report) == {"student": ["died", "done"]}
    assert [event["world"] for event in report["timeline"]] == [2, 2]
    run_on_ranks(2, run_on_data, tree=one, data=tree["data"], folder=str(tmp_path / "whole"))
    (whole,) = json.loads((tmp_path / "whole/report.json").read_text(encoding="utf-8"))["stages"]
    for split in ("valid", "test"):
        assert report["stages"][0][split] == pytest.approx(whole[split], abs=1e-6)


EARLY = {"chain": {"dims": [16, 8], "overlap": 0.5}, "baseline": False}


@pytest.mark.usefixtures("two_slots")
def test_links_overlap_where_there_is_room_and_the_report_says_for_how_long(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    long = {"epochs": 500, "validate_every": 20}
    report = chained(merge(tree, EARLY | {"teacher": long, "student": {"epochs": 60}}), tmp_path / "run")
    teacher, student = (next(e for e in report["timeline"] if e["stage"] == name) for name in ("teacher", "student"))
    assert teacher["started"] < student["started"] < teacher["ended"]
    early = report["stages"][1]["early_steps"]
    assert 0 < early <= report["stages"][1]["steps"] / 2
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert f"student: {early} of {report['stages'][1]['steps']} steps on its teacher's best rows so far." in text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("two_slots")
def test_a_student_that_is_killed_beside_its_unfinished_teacher_goes_on_and_so_does_the_teacher(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    long = {"epochs": 800, "validate_every": 20, "checkpoint_every": 20}
    student = {"epochs": 400, "validate_every": 5, "checkpoint_every": 5}
    chain = Background(merge(tree, EARLY | {"teacher": long, "student": student}), tmp_path / "run")
    kill(chain.at_work("student")["pids"][0])
    assert not (tmp_path / "run/stages/teacher/result.json").exists()
    kill(chain.at_work("teacher")["pids"][0])
    report = chain.report()
    found = attempts(report)
    assert found["teacher"] == ["died", "done"] and found["student"][0] == "died" and found["student"][-1] == "done"
    assert 0 < report["stages"][1]["early_steps"] <= report["stages"][1]["steps"] / 2


@pytest.mark.slow
@pytest.mark.usefixtures("two_slots")
def test_a_folder_of_another_run_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    one = {**SMALL, "data": tree["data"]}
    chained(one, tmp_path / "run")
    with pytest.raises(ChainError, match=r"already holds a run; add --resume"):
        chained(one, tmp_path / "run")
    with pytest.raises(ChainError, match=r"made by another plan \(differs in: seed\)"):
        chained(one | {"seed": 1}, tmp_path / "run", resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("two_slots")
def test_a_stage_that_cannot_be_finished_is_named_with_its_cause_and_the_others_keep_theirs(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = merge(tree, {"teacher": {"optimizer": {"name": "sgd", "lr": 1e30}}, "baseline": LONG})
    with pytest.raises(ChainError, match=r"stage teacher: DivergedError: Stage teacher, step \d+: loss term"):
        chained(tree, tmp_path / "run")
    report = chained(merge(tree, {"teacher": {"optimizer": {"lr": 0.1}}}), tmp_path / "other")
    assert attempts(report)["teacher"] == ["done"]
    events = json.loads((tmp_path / "run/timeline.json").read_text(encoding="utf-8"))
    outcomes = {event["stage"]: event["outcome"].partition(":")[0] for event in events}
    assert outcomes["teacher"] == "refused"  # once: it would end so again
    assert outcomes.get("direct", "stopped") in ("stopped", "done")


@pytest.mark.slow
@pytest.mark.usefixtures("two_slots")
def test_retries_are_bounded(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = merge(tree, {"teacher": LONG | {"epochs": 100_000}})
    chain = Background(tree, tmp_path / "run", workers=2, retries=1)
    for attempt in (1, 2):
        kill(chain.at_work("teacher", attempt)["pids"][0])
    with pytest.raises(ChainError, match=r"stage teacher ended 2 times, at last so: rank 0 \(process \d+ on [\d.]+\)"):
        chain.report()
