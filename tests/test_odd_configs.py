"""Config files as odd as people write them mean what they say, or are refused by name; nothing is written then."""

from pathlib import Path
from typing import Any

import pytest

from distkgd.pipeline.config import load_config
from tests.launches import held, refusal, small_data

LONG = "x" * 300
CONFIGS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "empty": (b"", {}),
    "comments alone": (b"# nothing\n\n", {}),
    "byte-order mark": (b"\xef\xbb\xbfseed: 5\n", {"seed": 5}),
    "CRLF": (b"seed: 5\r\ntest: false\r\n", {"seed": 5, "test": False}),
    "begin and end": (b"---\nseed: 5\n...\n", {"seed": 5}),
    "quoted keys": (b"'seed': 5\n\"test\": false\n", {"seed": 5, "test": False}),
    "flow": (b"{seed: 5, student: {dim: 8}}", {"seed": 5, "student.dim": 8}),
    "anchor": (b"student: &a {dim: 8, epochs: 3}\nbaseline: *a\n", {"baseline.dim": 8, "baseline.epochs": 3}),
    "merge": (
        b"baseline: &a {dim: 8, epochs: 3}\nstudent: {<<: *a, dim: 4}\n",
        {"student.dim": 4, "student.epochs": 3},
    ),
    "merge of two": (
        b"teacher: &a {dim: 8}\nbaseline: &b {dim: 9, epochs: 3}\nstudent: {<<: [*a, *b], method: bkd}\n",
        {"student.dim": 8, "student.epochs": 3},
    ),
    "underscores": (b"seed: 1_000\n", {"seed": 1000}),
    "hexadecimal": (b"seed: 0x10\n", {"seed": 16}),
    "plus": (b"seed: +8\n", {"seed": 8}),
    "whole number as text": (b"seed: '8'\n", {"seed": 8}),
    "whole number as real": (b"student: {dim: 8.0}\n", {"student.dim": 8}),
    "power of ten": (b"student: {optimizer: {lr: 1e-2}}\n", {"student.optimizer.lr": 0.01}),
    "point first": (b"student: {optimizer: {lr: .5}}\n", {"student.optimizer.lr": 0.5}),
    "name in Unicode": ("name: größe_数\n".encode(), {"name": "größe_数"}),
    "name of several words": (b"name: my first run\n", {"name": "my first run"}),
    "name with dots": (b"name: v1.2\n", {"name": "v1.2"}),
    "null": (b"teacher: ~\n", {"teacher": None}),
    "trailing blanks": (b"seed: 5   \n   \n", {"seed": 5}),
    "folded": (b"data: >-\n  ./my\n  data\n", {"data": "./my data"}),
    "off": (b"test: off\n", {"test": False}),
}
WRONG_CONFIGS: dict[str, bytes] = {
    "twice": b"seed: 1\nseed: 2\n",
    "twice below": b"student: {dim: 8, epochs: 3, dim: 16}\n",
    "a stage twice": b"student: {dim: 8}\nbaseline: true\nstudent: {epochs: 3}\n",
    "twice in a merge": b"teacher: &a {dim: 8}\nstudent: {method: bkd, <<: *a, epochs: 3, epochs: 4}\n",
    "octal": b"student: {dim: 064}\n",
    "octal seed": b"seed: 010\n",
    "minutes": b"seed: 1:30\n",
    "minutes in a rate": b"student: {optimizer: {lr: 0:1.5}}\n",
    "a nulled stage": b"student:\n",
    "tabs": b"student:\n\tdim: 8\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "NUL in data": b'data: "./a\\0b"\n',
    "NUL in a name": b'name: "a\\0b"\n',
    "name above": b"name: ../../x\n",
    "name of a root": b"name: /x\n",
    "name of dots": b"name: ..\n",
    "name of one dot": b"name: .\n",
    "name of nothing": b"name: ''\n",
    "name of blanks": b"name: '   '\n",
    "name of lines": b'name: "a\\nb"\n',
    "name of a folder": b"name: a/b\n",
    "name of a tab": b'name: "a\\tb"\n',
    "long name": b"name: " + LONG.encode() + b"\n",
    "long data": b"data: ./" + LONG.encode() * 20 + b"\n",
    "empty data": b"data: ''\n",
    "NaN": b"student: {optimizer: {lr: .nan}}\n",
    "infinite": b"student: {optimizer: {lr: .inf}}\n",
    "not a number as text": b"student: {optimizer: {lr: nan}}\n",
    "no rate": b"student: {optimizer: {lr: 0}}\n",
    "negative": b"student: {epochs: -1}\n",
    "too many": b"student: {epochs: 99999999999999999999}\n",
    "half": b"student: {dim: 7.5}\n",
    "yes for a number": b"seed: yes\n",
    "no for a method": b"student: {method: no}\n",
    "date": b"seed: 2024-01-01\n",
    "unknown key": b"sead: 5\n",
    "key in capitals": b"Seed: 5\n",
    "key with a blank": b"'seed ': 5\n",
    "dotted key": b"student.dim: 8\n",
    "list": b"- seed: 5\n",
    "a laugh": b"a: &a [x,x]\nb: &b [*a,*a]\nseed: *b\n",
    "a teacher nowhere": b"teacher: ./nowhere\nstudent: {method: bkd, batch_size: 9}\n",
    "a teacher of NUL": b'teacher: "./a\\0b"\nstudent: {method: bkd, batch_size: 9}\n',
    "storage of nothing": b"storage: 'nobody://x'\nstudent: {batch_size: 9}\n",
}


BLAMED = {  # where not the file, but what it names
    "NUL in data": ("b",), "long data": (LONG[:20],), "empty data": ("no data set is called ''",),
        "storage of nothing": ("nobody",),
    "a teacher nowhere": ("nowhere",), "a teacher of NUL": ("b",),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_an_odd_config_means_what_it_says(name: str, tmp_path: Path) -> None:
    text, expected = CONFIGS[name]
    (tmp_path / "odd.yaml").write_bytes(text)
    config: Any = load_config(tmp_path / "odd.yaml")
    for key, value in expected.items():
        node = config
        for step in key.split("."):
            node = getattr(node, step)
        assert node == value and type(node) is type(value), key


def test_a_config_that_would_be_read_as_another_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_data(Path("data"), entities=12, relations=3, triples=80)
    wrong = []
    for name, text in WRONG_CONFIGS.items():
        Path("odd.yaml").write_bytes(text)
        before = held(tmp_path)
        data = () if b"data" in text else ("--data", "./data")
        words = BLAMED.get(name, ("odd.yaml",))
        if (fault := refusal("distill", ("odd.yaml", *data), words)) is not None:
            wrong.append(f"{name}: {fault}")
        if held(tmp_path) != before:
            wrong.append(f"{name}: something was written: {sorted(held(tmp_path).keys() - before.keys())}")
            break
    Path("odd.yaml").unlink()
    assert not wrong, "\n".join([f"{len(wrong)}", *wrong])
