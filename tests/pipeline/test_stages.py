"""Plans as data: which stages a config means, and what is refused when it is read or before it starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import yaml

from distkgd.errors import ConfigError
from distkgd.methods import METHODS
from distkgd.methods.bkd import Bkd
from distkgd.pipeline.config import RunConfig, StageConfig, load_config, parse_config, resolved
from distkgd.pipeline.stages import Stage, build_plan

TEACHER: dict[str, Any] = {"epochs": 9, "optimizer": {"lr": 0.3}}
STUDENT: dict[str, Any] = {"method": "bkd", "epochs": 5, "optimizer": {"lr": 0.2, "clip": 1.0}}
CHAIN = {"dims": [64, 32, 16]}
CHAINED: dict[str, Any] = {"teacher": TEACHER, "student": STUDENT, "chain": CHAIN}
ASSISTED: dict[str, Any] = {"teacher": {"dim": 64}, "student": {"dim": 8, "method": "bkd"}, "baseline": True}


class Several(Bkd):
    """A method of two to three teachers that imitates the last of them."""

    name = "several"
    num_teachers = range(2, 4)


@contextmanager
def several() -> Iterator[None]:
    """The method exists."""
    with mock.patch.dict(METHODS, {"several": Several}):  # type: ignore[arg-type]
        yield


def parsed(tree: dict[str, Any]) -> RunConfig:
    return parse_config(tree, "test")


def outline(tree: dict[str, Any]) -> list[Any]:
    return [(s.name, s.config.dim, s.config.method, s.teachers) for s in build_plan(parsed(tree))]


def stages(tree: dict[str, Any]) -> dict[str, Stage]:
    return {stage.name: stage for stage in build_plan(parsed(tree))}


# -- chains -------------------------------------------------------------------------------------------------------


def test_every_model_of_a_chain_is_taught_by_the_one_before() -> None:
    assert outline({**CHAINED, "baseline": True}) == [
        ("teacher", 64, "scratch", ()),
        ("student_32", 32, "bkd", ("teacher",)),
        ("student", 16, "bkd", ("student_32",)),
        ("direct", 16, "scratch", ()),
    ]


def test_one_jump_is_a_chain_of_two() -> None:
    jump = outline({**CHAINED, "chain": {"dims": [64, 16]}})
    assert jump == outline({"teacher": {**TEACHER, "dim": 64}, "student": {**STUDENT, "dim": 16}})


@pytest.mark.parametrize(
    ("chain", "dims"),
    [
        ({"from": 512, "to": 32}, [512, 256, 128, 64, 32]),
        ({"from": 512, "to": 32, "ratio": 4}, [512, 128, 32]),
        ({"from": 512, "to": 32, "ratio": 16}, [512, 32]),
        ({"from": 243, "to": 9, "ratio": 3}, [243, 81, 27, 9]),
    ],
)
def test_a_chain_may_be_given_by_its_ends_and_a_ratio(chain: dict[str, int], dims: list[int]) -> None:
    found = parsed({**CHAINED, "chain": chain})
    assert found.chain is not None and found.chain.dims == dims
    assert isinstance(found.teacher, StageConfig)
    assert (found.teacher.dim, found.student.dim) == (dims[0], dims[-1])


def test_keys_of_one_dim_go_over_the_model_of_that_dim_alone() -> None:
    per_dim = {64: {"batch_size": 50}, 32: {"epochs": 3, "optimizer": {"lr": 0.7}}, 16: {"distill": {"weight": 2.0}}}
    found = stages({**CHAINED, "chain": CHAIN | {"per_dim": per_dim}, "baseline": True})
    assert [found[name].config.batch_size for name in found] == [50, 1000, 1000, 1000]
    assert [found[name].config.epochs for name in found] == [9, 3, 5, 5]
    assert [found[name].config.optimizer.lr for name in found] == [0.3, 0.7, 0.2, 0.2]
    assert [found[name].config.optimizer.clip for name in found] == [0.0, 1.0, 1.0, 1.0]
    assert found["student"].config.distill.weight == 2.0 and found["student_32"].config.distill.weight == 1.0


def test_another_method_for_one_dim_leaves_the_options_of_the_first_behind() -> None:
    student = STUDENT | {"distill": {"divergence": "js"}}
    per_dim = {32: {"method": "dualde", "distill": {"soft": "kl"}}}
    found = stages({**CHAINED, "student": student, "chain": CHAIN | {"per_dim": per_dim}})
    assert found["student_32"].config.method == "dualde" and found["student_32"].config.distill.soft == "kl"
    assert found["student"].config.distill.divergence == "js"


@pytest.mark.parametrize("baseline", [True, {"epochs": 7}, {}])
def test_the_baseline_of_a_chain_is_its_last_student_without_teacher(baseline: Any) -> None:
    per_dim = {16: {"optimizer": {"lr": 0.9}}}
    tree = {**CHAINED, "student": STUDENT | {"start": "crop"}, "chain": CHAIN | {"per_dim": per_dim}}
    direct = stages({**tree, "baseline": baseline})["direct"].config
    assert (direct.dim, direct.optimizer.lr, direct.method, direct.start) == (16, 0.9, "scratch", "random")
    assert direct.epochs == (7 if baseline == {"epochs": 7} else 5)


@pytest.mark.parametrize("key", ["chain.per_dim.32.epochs=2", "chain.per_dim={32: {epochs: 2}}"])
@pytest.mark.parametrize("per_dim", [{}, {"per_dim": {32: {"epochs": 8, "batch_size": 70}}}])
def test_an_override_reaches_one_dim(key: str, per_dim: dict[str, Any], tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**CHAINED, "chain": CHAIN | per_dim}), encoding="utf-8")
    found = {stage.name: stage.config for stage in build_plan(load_config(path, [key]))}
    kept = bool(per_dim) and "={" not in key
    assert (found["student_32"].epochs, found["student_32"].batch_size) == (2, 70 if kept else 1000)


@pytest.mark.parametrize(
    "tree",
    [
        {**CHAINED, "chain": {"from": 64, "to": 8, "per_dim": {16: {"epochs": 2}}}, "baseline": True},
        {**CHAINED, "teacher": "a/b"},
        {**ASSISTED, "assistant": {"dims": [32, 16], "per_dim": {16: {"epochs": 2}}}},
        {**ASSISTED, "assistant": 32},
        {"teachers": {"a": {"dim": 16}, "b": "x/y"}, "student": {"method": "several"}},
    ],
    ids=str,
)
def test_a_resolved_plan_reads_back_as_the_same(tree: dict[str, Any]) -> None:
    with several():
        config = parsed(tree)
        again = parsed(yaml.safe_load(yaml.safe_dump(resolved(config))))
        assert again == config
        assert build_plan(again) == build_plan(config)


# -- assistants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [32, {"dims": [32]}])
def test_a_given_assistant_stands_between_teacher_and_student(given: Any) -> None:
    assert outline({**ASSISTED, "assistant": given}) == [
        ("teacher", 64, "scratch", ()),
        ("assistant", 32, "bkd", ("teacher",)),
        ("student", 8, "bkd", ("assistant",)),
        ("direct", 8, "scratch", ()),
    ]


def test_candidates_and_the_direct_student_come_before_the_assistant_that_they_decide_on() -> None:
    tree = {**ASSISTED, "assistant": {"dims": [32, 16], "per_dim": {16: {"epochs": 3}}}}
    assert [(s.name, s.config.method, s.teachers) for s in build_plan(parsed(tree))] == [
        ("teacher", "scratch", ()),
        ("direct", "scratch", ()),
        ("assistant_32", "scratch", ()),
        ("assistant_16", "scratch", ()),
        ("assistant", "bkd", ("teacher",)),
        ("student", "bkd", ("assistant",)),
    ]
    found = stages(tree)
    assert (found["assistant_16"].config.dim, found["assistant_16"].config.epochs) == (16, 3)
    choice = found["assistant"].choice
    assert choice is not None and choice.between == ("teacher", "direct")
    assert {name: (c.dim, c.method, c.epochs) for name, c in choice.configs.items()} == {
        "assistant_32": (32, "bkd", StageConfig().epochs),
        "assistant_16": (16, "bkd", 3),
    }


# -- several teachers ---------------------------------------------------------------------------------------------


def test_several_teachers_are_stages_and_paths_in_the_order_of_the_config() -> None:
    teachers = {"big": {"dim": 64}, "old": "runs/x/stages/student", "other": {"dim": 16, "scorer": "distmult"}}
    with several():
        assert outline({"teachers": teachers, "student": {"method": "several"}}) == [
            ("big", 64, "scratch", ()),
            ("other", 16, "scratch", ()),
            ("student", 32, "several", ("big", "runs/x/stages/student", "other")),
        ]


@pytest.mark.parametrize(("number", "good"), [(0, False), (1, False), (2, True), (3, True), (4, False)])
def test_a_method_has_as_many_teachers_as_it_says(number: int, good: bool) -> None:
    tree: dict[str, Any] = {"student": {"method": "several"}}
    if number:
        tree["teachers"] = {f"t{i}": f"path/{i}" for i in range(number)}
    with several():
        if good:
            assert len(build_plan(parsed(tree))[-1].teachers) == number
            return
        with pytest.raises(ConfigError, match=r"needs (2 to 3 teachers|a teacher)"):
            parsed(tree)


@pytest.mark.parametrize("teachers", [{"a": "x"}, {"a": {"dim": 8}}])
def test_one_of_several_teachers_may_be_the_only_one(teachers: Any) -> None:
    assert outline({"teachers": teachers, "student": {"method": "bkd"}})[-1][3] == (
        ("a",) if isinstance(teachers["a"], dict) else ("x",)
    )


# -- refused when the config is read ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rising dims": ({**CHAINED, "chain": {"dims": [16, 32]}}, "must fall .*16, 32"),
    "equal dims": ({**CHAINED, "chain": {"dims": [32, 32, 8]}}, "must fall"),
    "one dim": ({**CHAINED, "chain": {"dims": [32]}}, r"chain: dims: at least two are needed \(given: 32\)"),
    "no dims": ({**CHAINED, "chain": {}}, r"chain: dims: at least two are needed \(given: none\)"),
    "dims and ends": ({**CHAINED, "chain": {"dims": [4, 2], "to": 2}}, "one or the other"),
    "ends only": ({**CHAINED, "chain": {"from": 64}}, "to must be a whole number of at least 1 .*None"),
    "ratio of one": ({**CHAINED, "chain": {"from": 64, "to": 8, "ratio": 1}}, "ratio .*at least 2"),
    "text": ({**CHAINED, "chain": {"from": "64", "to": 8}}, "from must be a whole number"),
    "true": ({**CHAINED, "chain": {"from": 64, "to": True}}, "to must be a whole number"),
    "never reached": ({**CHAINED, "chain": {"from": 64, "to": 24}}, "reaches 64, 32, 16, not 24"),
    "upwards": ({**CHAINED, "chain": {"from": 8, "to": 64}}, "reaches 8, not 64"),
    "no divisor": ({**CHAINED, "chain": {"from": 100, "to": 10}}, "reaches 100, 50, 25, not 10"),
    "a number": ({**CHAINED, "chain": 5}, "chain"),
    "unknown key": ({**CHAINED, "chain": CHAIN | {"dim": 3}}, r"chain\.dim: no such option .*dims, bits, per_dim"),
    "teacher's dim": ({**CHAINED, "teacher": {"dim": 128}}, r"begins at 64 and teacher\.dim is 128"),
    "student's dim": ({**CHAINED, "student": STUDENT | {"dim": 8}}, r"ends at 16 and student\.dim is 8"),
    "no teacher": ({"student": {}, "chain": CHAIN}, "chain begins at one teacher"),
    "scratch": ({"teacher": TEACHER, "chain": CHAIN}, "scratch"),
    "foreign dim": ({**CHAINED, "chain": CHAIN | {"per_dim": {8: {}}}}, "per_dim has 8.*64, 32, 16"),
    "dim again": ({**CHAINED, "chain": CHAIN | {"per_dim": {32: {"dim": 3}}}}, "sets dim again"),
    "wrong value": (
        {**CHAINED, "chain": CHAIN | {"per_dim": {32: {"optimizer": {"lr": -1}}}}},
        r"chain\.per_dim\.32\.optimizer\.lr",
    ),
    "wrong value of the teacher": (
        {**CHAINED, "chain": CHAIN | {"per_dim": {64: {"epochs": 0}}}},
        r"chain\.per_dim\.64\.epochs",
    ),
    "unknown key of a dim": (
        {**CHAINED, "chain": CHAIN | {"per_dim": {16: {"epoch": 1}}}},
        r"chain\.per_dim\.16\.epoch: no such option .*allowed here: .*epochs",
    ),
    "unknown option of a method": (
        {**CHAINED, "chain": CHAIN | {"per_dim": {16: {"distill": {"wait": 1}}}}},
        r"chain\.per_dim\.16.*distill \(method bkd\)\.wait: no such option",
    ),
    "a dim without teacher": (
        {**CHAINED, "chain": CHAIN | {"per_dim": {32: {"method": "scratch"}}}},
        "method is scratch",
    ),
    "a teacher with a teacher": ({**CHAINED, "chain": CHAIN | {"per_dim": {64: {"method": "bkd"}}}}, "no teacher"),
    "chain and assistant": ({**CHAINED, "assistant": 32}, "chain and assistant are both given"),
    "assistant without teacher": ({"assistant": 64, "student": {}}, "assistant begins at one teacher"),
    "assistant above": ({**ASSISTED, "assistant": 64}, r"above student\.dim 8 and below teacher\.dim 64 .*64"),
    "assistant below": ({**ASSISTED, "teacher": "x", "assistant": 8}, r"above student\.dim 8 \("),
    "the same twice": ({**ASSISTED, "assistant": {"dims": [16, 16]}}, "must differ"),
    "no candidates": ({**ASSISTED, "assistant": {"dims": []}}, r"assistant\.dims"),
    "nothing to compare with": (
        {**ASSISTED, "assistant": {"dims": [32, 16]}, "baseline": False},
        "baseline: true, or give one dim",
    ),
    "another baseline": (
        {**ASSISTED, "assistant": {"dims": [32, 16]}, "baseline": {"dim": 4}},
        r"baseline\.dim 4 is not student\.dim 8",
    ),
    "both kinds of teachers": (
        {"teacher": "x", "teachers": {"a": "y"}, "student": {"method": "bkd"}},
        "teacher and teachers are both given",
    ),
    "too many": ({"teachers": {"a": "x", "b": "y"}, "student": {"method": "bkd"}}, "bkd needs one teacher, and got 2"),
    "none": ({"teachers": {}, "student": {"method": "bkd"}}, "teachers"),
    "chain of several": ({"teachers": {"a": "x"}, "student": STUDENT, "chain": CHAIN}, "begins at one teacher"),
    "a stage's name": ({"teachers": {"student_2": "x"}, "student": {"method": "bkd"}}, "student_2.*cannot name"),
    "a path as name": ({"teachers": {"../x": "x"}, "student": {"method": "bkd"}}, "cannot name a stage"),
    "a taught teacher": (
        {"teachers": {"a": {"method": "bkd"}}, "student": {"method": "bkd"}},
        r"a\.method must be scratch .*bkd",
    ),
    "unknown key of a teacher": (
        {"teachers": {"a": {"dims": 8}}, "student": {"method": "bkd"}},
        r"teachers\.a\.dims: no such option \(given: 8\); allowed here: scorer, dim",
    ),
    "a teacher that is a number": ({"teachers": {"a": 5}, "student": {"method": "bkd"}}, r"teachers\.a: .*5"),
    "a start without teacher": ({"student": {"start": "crop"}}, "start: crop .*use start: random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_cannot_be_is_refused_when_it_is_read(name: str) -> None:
    tree, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as info:
        parsed(tree)
    assert str(info.value).startswith("test: ")
    for word in ("pydantic", "validation error", "Value error"):
        assert word not in str(info.value)
