"""Malformed config files and overrides: each ends in a ConfigError that names the file or the key."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from distkgd.errors import ConfigError
from distkgd.methods import METHODS
from distkgd.methods.dualde import StageTwoConfig
from distkgd.pipeline.config import RunConfig, StageConfig, load_config
from tests.launches import distil

GOOD: dict[str, dict[str, Any]] = {
    "scratch": {"student": {"method": "scratch"}},
    "bkd": {"teacher": {"dim": 16}, "student": {"method": "bkd"}, "baseline": {"dim": 8}},
    "dualde": {"teacher": {"dim": 16}, "student": {"method": "dualde"}, "baseline": True},
    "mulde": {"teacher": {"dim": 16}, "student": {"method": "mulde"}},
    "dml": {"student": {"method": "dml"}},
    "rkd": {"teacher": {"dim": 16}, "student": {"method": "rkd"}},
    "iterde": {"teacher": {"dim": 16}, "student": {"method": "iterde"}},
    "med": {"student": {"method": "med"}},
    "metasd": {"student": {"method": "metasd"}},
}
METHOD_NODES = {name: method.Settings for name, method in METHODS.items()}
HUGE = 10**40
WRONG: dict[str, list[Any]] = {
    # By what a field wants; each value is wrong for all fields of that kind.
    "count": [
        -1,
        -HUGE,
        0.5,
        float("nan"),
        float("inf"),
        float("-inf"),
        "many",
        "",
        None,
        [],
        [1],
        {},
        {"a": 1},
    ],
    "number": ["fast", "", "1e", [], [0.5], {}, {"a": 0.5}, float("nan"), float("inf"), float("-inf"), "nan", "inf"],
    "choice": ["", "nothing", 5, -1, 0.5, None, [], ["all"], {}, {"a": 1}, "Softmax", HUGE],
    "flag": ["maybe", "", 2, -1, 0.5, None, [], [True], {}, {"a": True}, float("nan"), HUGE],
    "text": [5, 0, -1.5, True, None, [], ["a"], {}, {"a": 1}, float("nan"), HUGE],
    "node": [5, 0, -1, True, "text", [], [1], [{}], float("nan"), HUGE],
}


def fields(node: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, kind of WRONG) of every field below `node` that has one."""
    for name, field in node.model_fields.items():
        kind, here = field.annotation, (*path, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield here, "node"
            yield from fields(kind, here)
        elif kind is int:
            yield here, "count"
        elif kind is float:
            yield here, "number"
        elif kind is bool:
            yield here, "flag"
        elif kind is str:
            yield here, "text"
        elif "Literal" in str(kind) and type(None) not in get_args(kind) and "int" not in str(kind):
            yield here, "choice"


ALL_FIELDS = [*fields(RunConfig), *((("teacher", *path), kind) for path, kind in fields(StageConfig))]
METHOD_FIELDS = [
    (method, ("student", "distill", *path), kind)
    for method, node in METHOD_NODES.items()
    for path, kind in fields(node)
] + [("dualde", ("student", "distill", "stage_two", *path), kind) for path, kind in fields(StageTwoConfig)]
NODES = sorted({path[:-1] for path, _ in ALL_FIELDS} | {path[:-1] for _, path, _ in METHOD_FIELDS})


def placed(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of `tree` with one value put in."""
    out = dict(tree)
    below = out.get(path[0])
    out[path[0]] = value if len(path) == 1 else placed(below if isinstance(below, dict) else {}, path[1:], value)
    return out


def method_of(path: tuple[str, ...]) -> str:
    """A method in whose config a path may stand."""
    if "stage_two" in path:
        return "dualde"
    if "prune" in path:
        return "metasd"
    return "bkd" if "distill" in path or path[:1] in (("teacher",), ("baseline",)) else "scratch"


def wrong_values(generator: random.Random) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    """(id, method, path, value): one or two wrong values for each field of every kind."""
    every = [(method_of(path), path, kind) for path, kind in ALL_FIELDS] + METHOD_FIELDS
    for method, path, kind in every:
        for value in generator.sample(WRONG[kind], 2):
            yield f"{'.'.join(path)}={value!r}", method, path, value


def unknown_keys(generator: random.Random) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    """(id, method, path, value): a key that does not exist, in each node of the tree."""
    for node in NODES:
        key = generator.choice(["dims", "stage", "path", "flag", "näme", "with space", "__class__", "x" * 300, "-"])
        value = generator.choice([None, 5, "text", [1, 2], {"a": {"b": 1}}, True])
        yield f"{'.'.join((*node, key[:20]))}", method_of(node), (*node, key), value


GENERATOR = random.Random(20250101)
TREES = [*wrong_values(GENERATOR), *unknown_keys(GENERATOR)]
IDS = [f"{i}-{case[0]}"[:60].encode("ascii", "replace").decode() for i, case in enumerate(TREES)]


def refused(path: Path | None, overrides: list[str] | None = None) -> str:
    """The message of the ConfigError that must come, and nothing else."""
    with pytest.raises(ConfigError) as info:
        load_config(path, overrides or [])
    message = str(info.value)
    assert len(message) < 5000
    for word in ("pydantic", "validation error", "Traceback", "<class"):
        assert word not in message
    return message


@pytest.mark.parametrize(("method", "path", "value"), [case[1:] for case in TREES], ids=IDS)
def test_a_wrong_value_or_key_in_a_file_is_named(
    method: str, path: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(placed(GOOD[method], path, value), allow_unicode=True), encoding="utf-8")
    message = refused(file)
    assert str(file) in message
    assert path[-1] in message


@pytest.mark.parametrize(("method", "path", "value"), [case[1:] for case in TREES[::4]], ids=IDS[::4])
def test_a_wrong_value_or_key_in_an_override_is_named(
    method: str, path: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "right.yaml"
    file.write_text(yaml.safe_dump(GOOD[method]), encoding="utf-8")
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
    message = refused(file, [f"{'.'.join(path)}={text}"])
    assert path[-1] in message


@pytest.mark.parametrize(
    "key",
    ["student.dim", "teacher.dim", "student.negatives.num", "student.negatives.chunk", "student.batch_size", "threads"],
)
def test_a_number_that_no_machine_can_count_to_is_named(key: str, tmp_path: Path) -> None:
    file = tmp_path / "right.yaml"
    file.write_text(yaml.safe_dump(GOOD["bkd"]), encoding="utf-8")
    assert key in refused(file, [f"{key}={HUGE}"])


NOT_YAML: dict[str, bytes] = {
    "open bracket": b"student: {dim: 3",
    "open quote": b'data: "pystdlib',
    "tab as indent": b"student:\n\tdim: 3\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "list at the root": b"- seed\n- data\n",
    "text at the root": b"seed = 5",
    "number at the root": b"17\n",
    "false at the root": b"false\n",
    "zero at the root": b"0\n",
    "empty list at the root": b"[]\n",
    "date at the root": b"2024-01-01\n",
    "number as a key": b"1: 2\nseed: 3\n",
    "null as a key": b"~: 2\n",
    "list as a key": b"? [a, b]\n: 5\n",
    "mapping as a key": b"? {a: b}\n: 5\n",
    "number as a key below": b"student: {1: 2}\n",
    "true as a key below": b"student: {optimizer: {on: 2}}\n",
    "list as a key below": b"student:\n  ? [a]\n  : 5\n",
    "unknown alias": b"student: *nobody\n",
    "alias and text": b"student: &a {dim: 5}\nteacher: *a b\n",
    "recursive alias at the root": b"&a {student: *a}\n",
    "recursive alias below": b"student: &a {dim: 8, optimizer: *a}\n",
    "recursive alias in student and baseline": b"&a {student: *a, baseline: *a}\n",
    "recursive list": b"student: &a [*a]\n",
    "recursive baseline": b"student: &a {dim: 8, loss: *a}\nbaseline: &b {loss: *b}\n",
    "recursive distill": b"teacher: x\nstudent: {method: bkd, distill: &a {weight: *a}}\n",
    "python object": b"seed: !!python/object/apply:os.getcwd []\n",
    "python name": b"seed: !!python/name:os.system\n",
    "unknown tag": b"seed: !mine 5\n",
    "wrong int tag": b"seed: !!int five\n",
    "wrong timestamp": b"seed: 2024-99-99\n",
    "binary value": b"data: !!binary //4=\n",
    "set value": b"student: !!set {a, b}\n",
    "date value": b"data: 2024-01-01\n",
    "nul bytes": b"seed: \x00\x00\n",
    "not utf-8": b"data: \xff\xfe\xfa\n",
    "utf-16": "seed: 1\n".encode("utf-16"),
    "latin-1": "data: caf\xe9\n".encode("latin-1"),
    "a zip": b"PK\x03\x04\x14\x00\x00\x00\x08\x00\x9c\x8f",
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "control characters": b"seed: \x07\x1b[31m\n",
    "deep lists": b"seed: " + b"[" * 5000 + b"]" * 5000,
    "deep open lists": b"seed: " + b"[" * 5000,
    "deep mappings": b"student: " + b"{a: " * 3000 + b"1" + b"}" * 3000,
    "moderately deep": b"student: " + b"{optimizer: " * 150 + b"1" + b"}" * 150,
    "a number with 6000 digits": b"seed: " + b"9" * 6000,
    "a merge of a number": b"student:\n  <<: 5\n",
    "a duplicate anchor": b"student: &a {dim: 8}\nteacher: &a {dmi: 8}\nbaseline: *a\n",
    "a million laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(5)),
}


@pytest.mark.parametrize("content", NOT_YAML.values(), ids=NOT_YAML.keys())
def test_a_file_that_is_no_config_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    assert str(file) in refused(file)


@pytest.mark.parametrize("seed", range(25))
def test_a_file_of_random_bytes_is_named(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "junk.yaml"
    file.write_bytes(random.Random(seed).randbytes(random.Random(seed).randrange(8, 400)))
    assert str(file) in refused(file)


@pytest.mark.parametrize("seed", range(25))
def test_a_good_file_with_damaged_lines_is_a_config_or_named(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    text = yaml.safe_dump(RunConfig().model_dump(mode="json"))
    for _ in range(generator.randrange(1, 6)):
        at = generator.randrange(len(text))
        text = text[:at] + generator.choice("{}[]:&*!|>'\"%@`,?-#\t\n0ä ") + text[at + generator.randrange(3) :]
    file = tmp_path / "damaged.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        load_config(file)
    except ConfigError as error:
        assert str(file) in str(error)


OVERRIDES = {
    "open bracket": "seed=[1",
    "open quote": "data='x",
    "unknown alias": "seed=*x",
    "python object": "seed=!!python/object/apply:os.getcwd []",
    "impossible date": "seed=2024-99-99",
    "6000 digits": "seed=" + "9" * 6000,
    "deep lists": "seed=" + "[" * 5000 + "]" * 5000,
    "deep path": ".".join(["student"] * 1500) + "=1",
    "recursive alias": "student=&a {loss: *a}",
    "recursive baseline": "baseline=&a {loss: *a}",
    "nul": "seed=\x00",
    "number in the path": "student.1.x=5",
    "path through a leaf": "seed.x=5",
    "path through a number": "student.dim.x=5",
    "list index": "student.loss[0]=5",
    "empty value": "student.dim=",
    "tab": "seed=\t5x",
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_an_override_that_is_none_is_named(override: str) -> None:
    key = override.partition("=")[0].split(".")[-1]
    assert key in refused(None, [override])


def test_things_that_are_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "plain").write_text("seed: 1", encoding="utf-8")
    names = ["folder.yaml", "loop.yaml", "gone.yaml", "plain/below.yaml", "nul\x00byte.yaml", "long" * 100]
    for name in names:
        assert name.partition("\x00")[0] in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["student.dims=5"], ["dims", "no such option"]),
        (["one.yaml", "two.yaml"], ["one config file", "one.yaml, two.yaml"]),
    ],
)
def test_a_launch_prints_one_line_and_no_traceback(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    code, output = distil(arguments, tmp_path)
    assert code == 2
    assert all(word in output for word in words)
    assert "Traceback" not in output
    assert output.startswith("error: ")
    assert not (tmp_path / "runs").exists()
