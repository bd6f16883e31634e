"""Odd argument lists, places, numbers, data sets, models and run folders, through all launchers in one process.

Each ends in one line that says what is wrong, exit code 2 and nothing written, or in what was asked for.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distkgd.commands.cli import run_main
from distkgd.errors import UnsupportedError
from tests.launches import SMALL, call, held, program, refusal, small_data
from tests.odd_refusals import REFUSALS

Arguments = tuple[str, ...]
Listed = tuple[str, Arguments, Arguments]  # launcher, arguments, words of the refusal
LONG = "x" * 300
STUDENT = "run/stages/student"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with data, configs, a finished run, and things that are no place for a file."""
    cwd = tmp_path_factory.mktemp("odd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.delenv("RAY_ADDRESS", raising=False)
        small_data(Path("data"), entities=12, relations=3, triples=80)
        student = {"scorer": "transe", "dim": 4, "epochs": 2, "batch_size": 20, "validate_every": 1}
        tree = SMALL | {"name": "small", "student": student, "report": {"html": False}}
        Path("small.yaml").write_text(yaml.safe_dump(tree))
        Path("sweep.yaml").write_text("base: small.yaml\ndata: ./data\nrows:\n  a: {}\n")
        Path("file").write_text("not a model\n")
        Path("folder").mkdir()
        os.mkfifo("pipe")
        Path("loop").symlink_to("loop")
        Path("g.tsv").write_text("".join(f"a{i % 7}\tr{i % 2}\tb{i % 9}\n" for i in range(63)))
        code, _, told = call("distill", ["small.yaml", "--data", "./data", "--out", "run"])
        assert code == 0, told
        assert call("export", (STUDENT, "plain", "--format", "numpy"))[0] == 0
        yield cwd
    torch.set_num_threads(1)


def too_late(*arguments: object, **options: object) -> None:
    raise AssertionError("it was not refused before the work began")


@pytest.fixture(autouse=True)
def inside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the module's; what takes long must not begin."""
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place"))
        monkeypatch.setattr("benchmarks.side_by_side.pool.Pool.start", too_late)
        monkeypatch.setattr("ray.init", too_late)


def refused(cases: list[Listed], place: Path) -> None:
    """Every case is refused in its words, and the working directory is as it was."""
    before = held(place)
    wrong = []
    for launcher, arguments, words in cases:
        if (fault := refusal(launcher, arguments, words)) is not None:
            wrong.append(f"{launcher} {' '.join(map(ascii, arguments))[:200]}: {fault}")
    after = held(place)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert not (wrong or changed), "\n".join([f"{len(wrong)} of {len(cases)}", *wrong, f"changed: {changed}"])


# Where a folder is to be made, a file is to be written, and something is to be read.
NO_FOLDER = (
    "file",
    "file/below",
    "/proc/none/here",
    "loop",
    "loop/below",
    "pipe",
    "pipe/below",
    LONG,
    f"new/{LONG}",
    "n\0l",
)
NO_FILE = (
    "folder",
    "file/below.json",
    "/proc/none.json",
    "pipe/x.json",
    f"{LONG}.json",
    "loop/x.json",
    "n\0l",
    "pipe",
    "",
)
NO_MODEL = (
    "missing",
    "file",
    "folder",
    "data",
    "",
    LONG,
    "loop",
    "pipe",
    "run/stages/nobody",
    "run/plan.yaml",
    "n\0l",
    "~nobody/x",
)
NO_DATA = (
    "missing", "./missing", "file", "./file", "folder", "./folder", "loop", "./loop", "pipe", "./pipe", LONG,
    f"./{LONG}",
    "./n\0l", "wn18", "pystdlib2", "powerlaw:", "powerlaw:entities=x",
        "powerlaw:entities=-1,triples=1,relations=1,skew=0,seed=0",
    "powerlaw:entities=2,triples=99,relations=1,skew=0,seed=0",
        "powerlaw:entities=9,triples=9,relations=1,skew=nan,seed=0",
    "http://127.0.0.1/x", "s3://bucket/x", "small.yaml", "./run", "~nobody/x", "", " ",
)  # fmt: skip


def places() -> Iterator[Listed]:
    """(launcher, arguments, words): paths that cannot be what is asked for."""

    def word(path: str) -> Arguments:
        if path.startswith("powerlaw:"):
            return ("powerlaw",)
        return ("x" * 20 if LONG in path else re.split(r"\0|[:/]+", path.removeprefix("./"))[-1][:20],)

    for path in NO_FOLDER:
        yield "distill", ("small.yaml", "--data", "./data", "--out", path), word(path)
        yield "distill", ("--data", "g.tsv", "--to", "4", "--out", path), word(path)
        yield "chain", ("small.yaml", "--data", "./data", "--out", path), word(path)
        yield "ablate", ("sweep.yaml", "--out", path), word(path)
        yield "export", (STUDENT, path), word(path)
        yield "import", ("plain:missing", path), ()
    for path in NO_FILE:
        yield "evaluate", (STUDENT, "--json", path), word(path)
        yield "bench", ("evaluate/transe", "--quick", "--json", path), word(path)
    for path in NO_MODEL:
        yield "evaluate", (path,), word(path)
        yield "predict", (path, "--head", "e01", "--relation", "r1"), word(path)
        yield "export", (path, "new"), word(path)
        yield "register", (path,), word(path)
        yield "distill", ("small.yaml", "--data", "./data", "student.method=bkd", f"teacher={json.dumps(path)}"), ()
    for path in ("missing", "file", "folder", "data", "", LONG, "loop", "pipe", STUDENT, "n\0l"):
        yield "report", (path,), word(path)
        yield "bench", ("inference", "--run", path), word(path)
    for path in NO_DATA:
        yield "distill", ("small.yaml", "--data", path, "--out", "new"), word(path)
        yield "distill", ("--data", path, "--to", "4", "--out", "new"), word(path)
        yield "evaluate", (STUDENT, "--data", path), word(path)
    for path in ("missing.yaml", "folder", "file", "", LONG, "loop", "data/train.tsv", "run/report.json", "n\0l"):
        yield "distill", (path, "--data", "./data", "--out", "new"), word(path)
        yield "chain", (path, "--data", "./data", "--out", "new"), word(path)
        yield "ablate", (path, "--out", "new"), word(path)
    for path in ("missing.json", "folder", "file", "", LONG, "loop", "n\0l", "run/report.json"):
        yield "bench", ("evaluate/transe", "--quick", "--compare", path), word(path)
    for source in (
        "",
        ":",
        "plain",
        "plain:",
        "nobody:x",
        "pykeen:missing",
        "rotate:folder",
        "dglke:file",
        "libkge:loop",
        "x" * 300,
    ):
        yield "import", (source, "new"), ()


PLACES = list(places())
WHOLE = ("", "abc", "nan", "inf", "1e3", "1.5", "1,5", "0x10", "--", "-1", "½", " ")
REAL = ("", "abc", "nan", "1,5", "0x10", "-1", "½", "1e", "1 2")
EVAL = (STUDENT,)
ASK = (STUDENT, "--head", "e01", "--relation", "r1")
OWN = ("--data", "g.tsv", "--out", "new")
RUN = ("small.yaml", "--data", "./data", "--out", "new")
NUMBERS: dict[tuple[str, str], tuple[Arguments, Arguments]] = {
    ("distill", "--to"): (OWN, (*WHOLE, "0", "9" * 30)),
    ("distill", "--max-mb"): (OWN, (*REAL, "0", "inf")),
    ("distill", "--max-ms-per-query"): (OWN, (*REAL, "0", "inf")),
    ("distill", "--min-retained"): (OWN, (*REAL, "0", "1.5", "inf")),
    ("distill", "--split-seed"): ((*OWN, "--to", "4"), WHOLE),
    ("evaluate", "--rare"): (EVAL, (*WHOLE, "0")),
    ("evaluate", "--split"): (EVAL, ("", "tests", "Test", "0")),
    ("evaluate", "--ties"): (EVAL, ("", "best", "0")),
    ("evaluate", "--filter"): (EVAL, ("", "none", "0")),
    ("predict", "--top"): (ASK, (*WHOLE, "0")),
    ("export", "--dim"): ((STUDENT, "new"), (*WHOLE, "0", "5", "9" * 30)),
    ("export", "--format"): ((STUDENT, "new"), ("", "zip", "SAFETENSORS", "../x")),
    ("export", "--labels"): ((STUDENT, "new"), (*WHOLE, "0")),
    ("export", "--temperature"): ((STUDENT, "new", "--labels=3"), (*REAL, "0", "inf")),
    ("export", "--weight"): ((STUDENT, "new", "--labels=3"), (*REAL, "0", "inf")),
    ("import", "--norm"): (("plain:plain", "new"), (*WHOLE, "0", "3")),
    ("import", "--margin"): (("plain:plain", "new"), ("", "abc", "nan", "inf", "1,5")),
    ("import", "--layout"): (("plain:plain", "new"), ("", "half", "0")),
    ("report", "--queries"): (("run",), WHOLE),
    ("register", "--champion-max-mb"): (("run",), REAL),
    ("chain", "--workers"): (RUN, WHOLE),
    ("chain", "--cpus-per-worker"): (RUN, (*WHOLE, "0")),
    ("chain", "--retries"): (RUN, WHOLE),
    ("chain", "--wait"): (RUN, REAL),
    ("ablate", "--cpus-per-trial"): (("sweep.yaml", "--out", "new"), (*WHOLE, "0")),
    ("ablate", "--gpus-per-trial"): (("sweep.yaml", "--out", "new"), REAL),
    ("ablate", "--seeds"): (
        ("sweep.yaml", "--out", "new"),
        ("", ",", "a", "1,a", "-1", "1.5", "0,0", "nan", "9" * 30, "1 2"),
    ),
    ("bench", "--tolerance"): (("evaluate/transe", "--quick"), REAL),
    ("bench", "--threads"): (("evaluate/transe", "--quick"), (*WHOLE, "0")),
}


def numbers() -> Iterator[Listed]:
    """(launcher, arguments, words): values that an option cannot have."""
    for (launcher, flag), (before, values) in NUMBERS.items():
        for value in values:
            yield (
                launcher,
                (*before, f"{flag}={value}"),
                (flag.strip("-"),) if launcher not in ("export", "ablate") else (),
            )


NO_VALUES = list(numbers())


def lists() -> Iterator[Listed]:
    """(launcher, arguments, words): lists in which something is missing, too much, or unknown."""
    whole: dict[str, Arguments] = {
        "distill": RUN, "chain": RUN, "ablate": ("sweep.yaml",), "evaluate": EVAL, "predict": ASK,
            "export": (STUDENT, "new"),
        "import": ("plain:plain", "new"), "report": ("run",), "register": ("run",), "bench": ("evaluate/transe",
            "--quick"),
    }  # fmt: skip
    for launcher, arguments in whole.items():
        for flag in ("--nonsense", "--nonsense=1", "-x", "--Out=new", "--=1"):
            yield launcher, (*arguments, flag), ()
        if launcher not in ("distill", "chain", "bench"):
            yield launcher, (), ("Missing",)
            yield launcher, (*arguments, "one", "more"), ("unexpected",)
    for launcher, flags in {
        "distill": ("--data", "--out", "--to", "--max-mb", "--split-seed"), "chain": ("--data", "--workers",
            "--address"),
        "ablate": ("--out", "--seeds"), "evaluate": ("--split", "--json", "--rare"), "predict": ("--head", "--top"),
        "export": ("--format", "--dim"), "import": ("--names", "--scorer"), "report": ("--data", "--queries"),
        "register": ("--name", "--uri"), "bench": ("--json", "--compare", "--run"),
    }.items():  # fmt: skip
        for flag in flags:
            yield launcher, (*whole[launcher], flag), (flag, "argument")
    for ask in (
        (), ("--head", "e01"), ("--relation", "r1"), ("--head", "e01", "--tail", "e02", "--relation", "r1"),
        ("--head", "nobody", "--relation", "r1"), ("--head", "e01", "--relation", "nothing"), ("--head", "",
        "--relation", "r1"),
        ("--head", "e01", "--relation", ""), ("--head", "3", "--relation", "r1"), ("--head", "e01", "--relation",
        "1"),
        ("--tail", "-1", "--relation", "r1"), ("--head", "e\0", "--relation", "r1"), ("--head", "y" * 9999,
        "--relation", "r1"),
        ("--head", "e01\n", "--relation", "\n"), ("--head", "🙂", "--relation", "r1"), ("--head", "[red]",
        "--relation", "r1"),
    ):  # fmt: skip
        yield "predict", (STUDENT, *ask), ()
    for override in (
        "=", "=5", "student", "student.=5", ".dim=5", "student..dim=5", "student.dim", "stu dent.dim=5", "a=b=c",
        "seed=[", "\n=1",
        "student.dim=4=5", "student=dim", "name=../../x", "name=..", "name=.", "name=/abs", "name=a/b", "name=",
        'name="n\\0l"',
        f"name={LONG}", 'name="a\\nb"', 'name="  "', "name=5", "data=5", "data=[./data]", "seed=-1", "seed=1.5",
        "seed=.nan",
        "student.optimizer.lr=.inf", "student.optimizer.lr=0", "student.epochs=0", "student.dim=9999999999",
        "teacher=.nan",
    ):  # fmt: skip
        data = () if override.startswith("data") else ("--data", "./data")
        yield "distill", ("small.yaml", override, *data), ()
    yield "distill", ("small.yaml", "small.yaml", *RUN), ("one config file",)
    yield "distill", ("small.yaml", "--data", "./data", "--out", "run"), ("already holds a run", "--resume")
    yield "distill", ("small.yaml", "--data", "./data", "--out", "run", "--resume", "seed=5"), ("another plan", "seed")
    yield "distill", ("--to", "4"), ("--data",)
    yield "distill", ("--data", "g.tsv"), ("--to",)
    yield "distill", ("small.yaml", "--data", "g.tsv", "--to", "4"), ("small.yaml",)
    yield "distill", ("small.yaml", "--data", "./data", "--split-seed", "1"), ("--split-seed",)
    yield "distill", ("small.yaml", "--data", "./data", "--allow-unseen"), ("--allow-unseen",)
    yield "export", (STUDENT, "run"), ("run",)
    yield "bench", ("no-such-task", "--quick"), ("no-such-task",)


LISTS = list(lists())


@pytest.mark.parametrize("launcher", sorted({case[0] for case in PLACES}))
def test_a_path_that_cannot_be_what_is_asked_for_is_named_and_nothing_is_written(launcher: str, place: Path) -> None:
    refused([case for case in PLACES if case[0] == launcher], place)


@pytest.mark.parametrize("launcher", sorted({case[0] for case in NO_VALUES}))
def test_a_value_that_an_option_cannot_have_is_named_and_nothing_is_written(launcher: str, place: Path) -> None:
    refused([case for case in NO_VALUES if case[0] == launcher], place)


@pytest.mark.parametrize("launcher", sorted({case[0] for case in LISTS}))
def test_an_argument_list_that_means_nothing_is_refused_and_nothing_is_written(launcher: str, place: Path) -> None:
    refused([case for case in LISTS if case[0] == launcher], place)


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_file_or_folder_that_is_no_data_set_is_named_and_nothing_is_written(
    kind: str, tmp_path: Path, place: Path
) -> None:
    wrong = []
    before = held(place)
    for number, case in enumerate(REFUSALS[kind]()):
        where, out = tmp_path / f"{number}", tmp_path / f"out{number}"
        path = case.write(where)
        asked = ("--to", "4") if case.name else ("small.yaml",)
        arguments = (*asked, "--data", str(path), "--out", str(out), *case.arguments)
        if (fault := refusal("distill", arguments, (case.blamed, *case.words))) is not None:
            wrong.append(f"{number}, {case.name or sorted(case.files)}: {fault.replace(str(tmp_path), '')}")
        if out.exists() or held(where) != {name: data for name, data in case.files.items()} | dict.fromkeys(
            case.folders, stat.S_IFDIR
        ):
            wrong.append(f"{number}: something was written")
    assert not wrong, "\n".join([f"{len(wrong)} of {number + 1}", *wrong])
    assert held(place) == before


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no config": lambda model: (model / "config.json").unlink(),
    "an empty config": lambda model: (model / "config.json").write_text(""),
    "a config cut off": lambda model: (model / "config.json").write_text((model / "config.json").read_text()[:50]),
    "a list as config": lambda model: (model / "config.json").write_text("[]"),
    "a config of bytes": lambda model: (model / "config.json").write_bytes(b"\xff\xfe"),
    "a config deep as a well": lambda model: (model / "config.json").write_text("[" * 100_000),
    "another format": lambda model: changed(model, format="distkgd-model/9"),
    "no scorer": lambda model: changed(model, scorer=None),
    "an unknown scorer": lambda model: changed(model, scorer={"name": "magic", "dim": 4}),
    "another dim": lambda model: changed(model, scorer={"name": "transe", "dim": 6, "margin": 9.0, "norm": 1}),
    "a margin that is no number": lambda model: changed(model, scorer={"name": "transe", "dim": 4,
        "margin": math.nan, "norm": 1}),
    "more entities": lambda model: changed(model, num_entities=13),
    "fewer entities": lambda model: changed(model, num_entities=11),
    "no entities": lambda model: changed(model, num_entities=0),
    "minus one entities": lambda model: changed(model, num_entities=-1),
    "text for a number": lambda model: changed(model, num_entities="many"),
    "more relations": lambda model: changed(model, num_relations=9),
    "the other way of relations": lambda model: changed(model, reciprocal="maybe"),
    "no files": lambda model: changed(model, files={}),
    "files elsewhere": lambda model: changed(model, files={"entity": ["../../x.safetensors"],
        "relation": ["y.safetensors"]}),
    "no table": lambda model: next(model.glob("entity-*")).unlink(),
    "an empty table": lambda model: next(model.glob("entity-*")).write_bytes(b""),
    "a table cut off": lambda model: cut(next(model.glob("entity-*")), -7),
    "a table of its head alone": lambda model: cut(next(model.glob("relation-*")), 12),
    "text as table": lambda model: next(model.glob("relation-*")).write_text("e01\tr1\te02\n" * 40),
    "tables changed": lambda model: next(model.glob("relation-*")).replace(next(model.glob("entity-*"))),
    "a table of NaN": lambda model: filled(model, "entity", math.nan),
    "a table of Inf": lambda model: filled(model, "relation", -math.inf),
    "no names": lambda model: (model / "entities.tsv").unlink(),
    "names cut off": lambda model: cut(model / "entities.tsv", -9),
    "no names of relations": lambda model: (model / "relations.tsv").write_text(""),
    "names twice": lambda model: (model / "entities.tsv").write_text("".join(f"{i}\te01\n" for i in range(12))),
    "names turned round": lambda model: (model / "entities.tsv").write_text("".join(f"e{i}\t{i}\n" for i in range(12))),
    "names from 1": lambda model: (model / "entities.tsv").write_text("".join(f"{i + 1}\te{i}\n" for i in range(12))),
    "names of bytes": lambda model: (model / "entities.tsv").write_bytes(b"0\t\xff\n" * 12),
    "a folder as names": lambda model: ((model / "relations.tsv").unlink(), (model / "relations.tsv").mkdir()),
}  # fmt: skip


def changed(model: Path, **keys: object) -> None:
    config = json.loads((model / "config.json").read_text()) | keys
    (model / "config.json").write_text(json.dumps(config))


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def filled(model: Path, table: str, value: float) -> None:
    (file,) = model.glob(f"{table}-*")
    save_file({table: torch.full_like(load_file(file)[table], value)}, file)


@pytest.mark.parametrize("launcher", ["evaluate", "predict", "export"])
def test_a_damaged_model_is_refused_by_its_folder_and_nothing_is_written(
    launcher: str, place: Path, tmp_path: Path
) -> None:
    wrong = []
    for number, (name, damage) in enumerate(DAMAGES.items()):
        model = tmp_path / f"m{number}"
        shutil.copytree(place / STUDENT / "model", model)
        damage(model)
        rest = {"evaluate": (), "predict": ASK[1:], "export": (str(tmp_path / "new"),)}[launcher]
        if launcher == "export" and name == "names twice":
            continue  # it copies names line by line, however many they are
        if (fault := refusal(launcher, (str(model), *rest), (f"m{number}",))) is not None:
            wrong.append(f"{name}: {fault}")
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(DAMAGES)}", *wrong])


RESULT = "stages/student/result.json"
RECORDS = {
    "report": ("plan.yaml", "report.json", "stages/student/metrics.jsonl", "examples.json", "serving.json"),
    "register": ("plan.yaml", "report.json", RESULT, "serving.json"),
    "distill": ("plan.yaml", RESULT, "stages/student/model/config.json"),
}
CONTENTS: dict[str, bytes | None] = {
    "gone": None, "empty": b"", "null": b"null\n", "bytes": b"\xff\xfe", "other keys": b'{"a": {"b": 1}}\n',
    "deep": b"[" * 100_000,
}  # fmt: skip


def only_asked(entries: Sequence[Any], *arguments: object, **options: object) -> None:
    """In place of MLflow's registry, whose store takes seconds."""
    assert all(entry.tags() for entry in entries)
    raise UnsupportedError("error: this is where they would be registered")


@pytest.mark.parametrize("launcher", RECORDS)
def test_a_run_folder_with_a_damaged_record_is_refused_by_name_or_does_without_it(
    launcher: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distkgd.tracking.mlflow_runs.register_finished", only_asked)
    wrong = []
    for number, (record, content) in enumerate(itertools.product(RECORDS[launcher], CONTENTS)):
        run = tmp_path / f"run{number}"
        shutil.copytree(place / "run", run)
        (run / record).unlink(missing_ok=True)
        if (data := CONTENTS[content]) is not None:
            (run / record).write_bytes(data)
        rest = {"distill": ("small.yaml", "--data", "./data", "--resume", "--out")}.get(launcher, ())
        try:
            code, _, err = call(launcher, (*rest, str(run)))
        except Exception as error:
            wrong.append(f"{record} {content}: traceback: {type(error).__name__}: {str(error)[:300]}")
            continue
        told = err.replace(str(tmp_path), "")
        if code not in (0, 2) or (code == 2 and f"run{number}" not in told and "would be registered" not in told):
            wrong.append(f"{record} {content}: exit code {code}: {told[-300:]}")
    assert not wrong, "\n".join([f"{len(wrong)} of {number + 1}", *wrong])


ENVIRONMENTS: list[dict[str, str]] = [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "0",
    "MASTER_ADDR": "127.0.0.1"},
    {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1.5"},
    {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"},
    {"WORLD_SIZE": "2", "RANK": "zero", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
    {"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"},
]  # fmt: skip


@pytest.mark.parametrize("launcher", ["distill", "evaluate", "export"])
def test_a_world_that_is_not_whole_is_refused_by_the_variable(
    launcher: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"distill": RUN, "evaluate": EVAL, "export": (STUDENT, "new")}[launcher]
    for environment in ENVIRONMENTS:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            refused([(launcher, arguments, ())], place)


def test_places_with_odd_names_hold_what_was_asked_for(place: Path, tmp_path: Path) -> None:
    for number, name in enumerate(
        ("a b", "g[1]", "ünï", "%20", "a#b", "it's", "*", "{x}", "-x", "$HOME", "x" * 150, "a.b.")
    ):
        json_, out = tmp_path / f"{number}" / f"{name}.json", tmp_path / f"{name}-{number}"
        assert call("evaluate", (STUDENT, "--json", str(json_)))[0] == 0
        assert json.loads(json_.read_text())["split"] == "test"
        assert call("export", (STUDENT, str(out), "--format", "numpy"))[0] == 0
        assert {path.name for path in out.iterdir()} >= {"config.json", "entity.npy"}


def test_more_than_there_is_gives_all_there_is(place: Path) -> None:
    for top in ("12", "13", "9" * 9, "9" * 30):
        code, out, _ = call("predict", (*ASK, "--top", top))
        assert code == 0
        assert len([line for line in out.splitlines() if line.split()[:1] and line.split()[0].isdigit()]) == 12


def test_a_terminal_without_unicode_gets_what_was_asked_for(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / STUDENT / "model", model)
    labels = ["größe" if i == 1 else "北京" for i in range(12)]
    (model / "entity_labels.tsv").write_text(
        "".join(f"{i}\t{label}\n" for i, label in enumerate(labels)), encoding="utf-8"
    )
    command = [str(model), "--relation", "r1", "--data", str(place / "data"), "--head"]
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as with PYTHONIOENCODING=ascii
    with contextlib.redirect_stdout(shown):
        assert run_main(program("predict"), [*command, "größe"]) == 0
    shown.flush()
    assert rb"\u5317\u4eac" in shown.buffer.getvalue()  # type: ignore[attr-defined]
    code, _, told = call("predict", [*command, os.fsdecode(b"gr\xf6\xdfe")])
    assert code == 2 and told.count("\n") == 1 and "UTF-8" in told


def test_there_are_at_least_six_hundred_distinct_cases() -> None:
    files = {
        (case.name, case.arguments, case.folders, *sorted(case.files.items()))
        for kind in REFUSALS.values()
        for case in kind()
    }
    lists = {(launcher, *arguments) for launcher, arguments, _ in (*PLACES, *NO_VALUES, *LISTS)}
    assert len(files) + len(lists) + len({*DAMAGES}) >= 600
