"""Which stages may run, on how many workers, and the record of what happened."""

import json
from pathlib import Path
from typing import Any

import pytest

from distkgd.errors import ConfigError
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.ray.chain import pick
from distkgd.pipeline.ray.schedule import Timeline, allot, early, heights, ready, waits_for
from distkgd.pipeline.ray.worker import Outcome, Place
from distkgd.pipeline.ray.worker_group import Slot, judged
from distkgd.pipeline.stages import Stage, build_plan

STAGE: dict[str, Any] = {"dim": 8, "batch_size": 60}
ASSISTED = {"teacher": {"dim": 16}, "assistant": {"dims": [12, 8]}, "student": {"dim": 4, "method": "bkd"}}


def plan(tree: dict[str, Any]) -> list[Stage]:
    return build_plan(parse_config(tree, "test"))


def names(stages: list[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_stages_without_a_path_between_them_are_ready_together_and_those_with_most_to_come_first() -> None:
    chain = plan({"chain": {"dims": [16, 8, 4]}, "teacher": {}, "student": {"method": "bkd"}, "baseline": True})
    assert heights(chain) == {"teacher": 3, "student_8": 2, "student": 1, "direct": 1}
    assert names(ready(chain, [], [])) == ["teacher", "direct"]
    assert names(ready(chain, [], ["teacher"])) == ["direct"]
    assert names(ready(chain, ["teacher"], ["teacher", "direct"])) == ["student_8"]
    assert names(ready(chain, ["teacher", "student_8"], ["teacher", "student_8"])) == ["student", "direct"]


def test_a_stage_waits_for_all_that_its_choice_is_made_of() -> None:
    stages = plan(ASSISTED | {"baseline": True})
    assistant = next(stage for stage in stages if stage.name == "assistant")
    assert waits_for(assistant, stages) == {"teacher", "direct", "assistant_12", "assistant_8"}
    assert "assistant" not in names(ready(stages, ["teacher", "direct", "assistant_12"], []))


def test_a_teacher_elsewhere_is_not_waited_for() -> None:
    teachers = {"a": STAGE, "b": "runs/other/stages/teacher"}
    stages = plan({"teachers": teachers, "student": STAGE | {"method": "mulde"}})
    assert [sorted(waits_for(stage, stages)) for stage in stages] == [[], ["a"]]


@pytest.mark.parametrize(
    ("num_ready", "free", "wanted", "idle", "sizes"),
    [
        (4, 2, 1, True, [1, 1]),
        (1, 2, 2, True, [2]),
        (2, 3, 2, False, [2]),
        (2, 1, 2, False, []),  # waits for the others
        (2, 1, 2, True, [2]),  # nothing else runs: a cluster may grow, or be short of nodes
        (2, 8, 0, True, [4, 4]),
        (3, 8, 0, False, [3, 3, 2]),
        (3, 2, 0, True, [1, 1]),
        (2, 0, 0, False, []),
        (2, 0, 0, True, [1]),
        (0, 8, 0, True, []),
    ],
)
def test_workers_are_shared_among_the_stages_that_can_run(
    num_ready: int, free: int, wanted: int, idle: bool, sizes: list[int]
) -> None:
    assert allot(num_ready, free, wanted, idle) == sizes


def test_slots_are_counted_node_by_node_and_only_on_living_ones() -> None:
    def node(alive: bool, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    nodes = [node(True, CPU=3.0, GPU=1.0), node(True, CPU=3.0), node(False, CPU=64.0, GPU=8.0)]
    assert Slot(2, 0).count(nodes) == 2  # two halves of a slot on two nodes are none
    assert Slot(1, 1).count(nodes) == 1
    assert Slot(1, 0).bundle == {"CPU": 1}
    assert (Slot(1, 0).largest(nodes), Slot(1, 1).largest(nodes), Slot(1, 0).largest([])) == (3, 1, 0)


def test_a_plan_takes_gpus_that_are_there_or_may_come() -> None:
    assert [pick("auto", {"GPU": 2.0}), pick("auto", {}), pick("auto", {}, grows=True)] == ["cuda", "cpu", "cpu"]
    assert [pick("cpu", {"GPU": 2.0}), pick("cuda", {"GPU": 1.0}), pick("cuda", {}, grows=True)] == [
        "cpu",
        "cuda",
        "cuda",
    ]
    with pytest.raises(ConfigError, match="device=cuda was asked for"):
        pick("cuda", {})


PLACES = [Place("10.0.0.1", 1, 11), Place("10.0.0.2", 2, 22)]


@pytest.mark.parametrize(
    ("ended", "kind", "says"),
    [
        ({0: Outcome("failed", "connection closed"), 1: Outcome("died", "killed")}, "died", "rank 1 (process 22 on"),
        ({0: Outcome("failed", "timed out"), 1: Outcome("refused", "lr")}, "refused", "lr"),
        ({0: Outcome("done"), 1: Outcome("failed", "x")}, "failed", "rank 1"),
        ({0: Outcome("done")}, "failed", "ranks [1] were given up"),
    ],
)
def test_a_gang_is_judged_by_the_cause_and_not_by_what_follows_from_it(
    ended: dict[int, Outcome], kind: str, says: str
) -> None:
    outcome = judged(ended, PLACES)
    assert outcome.kind == kind and says in outcome.text


def test_the_timeline_outlives_its_coordinator(tmp_path: Path) -> None:
    first = Timeline(tmp_path)
    first.end(first.begin("teacher", ["a", "a"], [1, 2], 5.0), "done")
    first.begin("student", ["a"], [3], 6.0)
    second = Timeline(tmp_path)
    second.end(second.begin("student", ["b"], [4], 7.0), "done")
    stored = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))
    assert [(event["stage"], event["attempt"], event["outcome"]) for event in stored] == [
        ("teacher", 1, "done"),
        ("student", 1, "lost with its coordinator"),
        ("student", 2, "done"),
    ]
    assert second.worlds() == "1–2"
    assert (
        "Timeline: teacher 0.0–" in second.sentence()
        and "on 2 workers; student 1.0–" in second.sentence()
        and "broken off" in second.sentence()
    )


def test_a_student_may_begin_early_when_its_teacher_is_at_work_has_rows_and_needs_nothing_more() -> None:
    chain = {"dims": [16, 8, 4], "overlap": 0.5}
    stages = plan({"chain": chain, "teacher": {}, "student": {"method": "bkd"}, "baseline": True})

    def found(finished: list[str], running: list[str], rows: bool = True) -> list[str]:
        return names(early(stages, finished, running, lambda _: rows))

    assert found([], ["teacher"]) == ["student_8"]
    assert found([], ["teacher"], rows=False) == []
    assert found([], []) == []
    assert found([], ["teacher", "student_8"]) == []  # student_8's own teacher is not finished
    assert found(["teacher"], ["student_8"]) == ["student"]
    without = plan({"chain": {"dims": [16, 8]}, "teacher": {}, "student": {"method": "bkd"}})
    assert early(without, [], ["teacher"], lambda _: True) == []
