"""A folder in which the documentation's commands run as they stand: small data, short configs, an environment."""

import io
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from distkgd.pipeline.autoconfig import rules
from tests.docs.commands import Run, how, keys_of
from tests.docs.pages import EVERYTHING, ROOT, Command, commands
from tests.own_graphs import own_triples, write_tsv
from tests.programs import started

SECONDS = 200.0
RELATIONS = ("imports", "inherits", "calls", "has_method")  # of the demo's graph
# What makes a config small; dims stay as they are, but for those between the first and the last of a chain.
SMALL = {"epochs": 2, "batch_size": 50, "num": 32, "validate_every": 1, "start": 1, "quiz_batch": 4, "data": "./toy"}
SMALL |= {"ratio": 8}
FREE = {"start": int}  # `start: crop` and `start: plateau` are words


@dataclass(frozen=True)
class Outcome:
    """How a command has ended, and after how many seconds."""

    code: int
    said: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Site:
    """The folder, and command -> how it ended there."""

    folder: Path
    outcomes: dict[str, Outcome]


def of_kind(kind: type[Run]) -> list[Command]:
    """The commands that are run in the folder, every time (Run) or by the slow tests (Slow), in their order."""
    return [one for one in commands() if len(keys_of(one.text)) == 1 and type(how(one.text)) is kind]


def build(folder: Path, small: bool = True) -> Path:
    """Fill a folder with what the commands find in a checkout; small: shrunk, and with files that readers have."""
    for name in ("launch", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "tuning"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    environment(folder)
    if not small:
        shutil.copytree(ROOT / "configs", folder / "configs")
        return folder
    for path in (ROOT / "configs").rglob("*.yaml"):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        tree = tree if path.parent.name == "ray" else shrunk(tree)
        if path.stem != "default" and "base" not in tree:  # the demo alone is tracked
            tree["mlflow"] = {"enabled": False}
        place.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    toy_data(folder / "toy")
    made = own_triples(1500, 150, 6)
    words = {made[0][0]: "alice", made[0][1]: "knows"}  # those of your_own_graph.md
    people = [(words.get(h, h), words.get(r, r), words.get(t, t)) for h, r, t in made]
    write_tsv(folder / "my_triples.tsv", people)
    (folder / "my_graph").mkdir()
    for split, part in (("train", people[200:]), ("valid", people[:100]), ("test", people[100:200])):
        write_tsv(folder / "my_graph" / f"{split}.tsv", part)
    return folder


def shrunk(tree: Any) -> Any:
    """A config or a sweep with every number of `SMALL` in place of its own."""
    if isinstance(tree, list):
        return [shrunk(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    small = {}
    for key, value in tree.items():
        name = str(key).rpartition(".")[2]
        plain = not isinstance(value, dict | list) and isinstance(value, FREE.get(name, object))
        small[key] = SMALL[name] if name in SMALL and plain else shrunk(value)
    return small


def toy_data(folder: Path) -> None:
    """A data set of random triples that has every word of the standard library which the pages use."""
    drawn = random.Random(0)
    words = sorted(set(re.findall(r"\b(?:module|class|function|exception|method):[\w.]*\w", EVERYTHING)))
    names = words + [f"module:m{i}" for i in range(40)]
    triples = sorted({(drawn.choice(names), drawn.choice(RELATIONS), drawn.choice(names)) for _ in range(500)})
    drawn.shuffle(triples)
    folder.mkdir()
    for split, part in (("valid", triples[:50]), ("test", triples[50:100]), ("train", triples[100:])):
        write_tsv(folder / f"{split}.tsv", part)
    known = {name for head, _, tail in triples[100:] for name in (head, tail)}
    assert set(words) <= known


def environment(folder: Path) -> None:
    """`.venv` as `make` leaves it, with this interpreter in it."""
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (programs / "python").chmod(0o755)
    (folder / ".venv/.installed").touch()


def pykeen_results(folder: Path) -> None:
    """A ComplEx that PyKEEN has trained on `my_graph`, saved as its pipeline does."""
    from pykeen.pipeline import pipeline
    from pykeen.triples import TriplesFactory

    training = TriplesFactory.from_path(folder / "my_graph/train.tsv", create_inverse_triples=True)
    testing = TriplesFactory.from_path(
        folder / "my_graph/test.tsv",
        entity_to_id=training.entity_to_id,
        relation_to_id=training.relation_to_id,
    )
    epochs = {"num_epochs": 1, "batch_size": 256, "use_tqdm": False}
    told = {"random_seed": 0, "device": "cpu", "use_tqdm": False, "training_kwargs": epochs}
    told |= {"evaluation_kwargs": {"use_tqdm": False}, "model_kwargs": {"embedding_dim": 32}}
    found = pipeline(training=training, testing=testing, model="ComplEx", **told)
    found.save_to_directory(folder / "results")


@contextmanager
def small_rules() -> Iterator[None]:
    """Two epochs where the rules of distkgd/pipeline/autoconfig choose."""
    with pytest.MonkeyPatch.context() as mend:
        for name in ("TEACHER_EPOCHS", "STUDENT_EPOCHS"):
            mend.setattr(rules, name, (2, 2))
        yield


def run(command: str, folder: Path, seconds: float = SECONDS) -> Outcome:
    """A command line as it stands, in `folder`; Python's in this process, torchrun forked, all else in a shell."""
    words = shlex.split(command)
    if words[0] == "python":
        return _here(words[1:], folder)
    if words[0] == "distkgd":
        return _here(["-m", *words], folder)
    if words[0] == "torchrun":
        return _forked(["-m", "torch.distributed.run", *words[1:]], folder, seconds)
    home = {"HOME": str(folder)} if words[0] == "ray" else {}  # where it keeps its token
    told: dict[str, Any] = {"cwd": folder, "env": surroundings() | home, "capture_output": True, "text": True}
    done = subprocess.run(command, shell=True, timeout=seconds, check=False, **told)
    return Outcome(done.returncode, done.stdout + done.stderr)


def surroundings() -> dict[str, str]:
    """What commands find in the environment: our package, the programs beside this Python, one thread."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    told = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "DISTKGD_CONFIGS": "configs",
    }
    return os.environ | told | {"MLFLOW_DISABLE_TELEMETRY": "true"}


def _forked(arguments: list[str], folder: Path, seconds: float) -> Outcome:
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as said:
        process = started(arguments, folder, surroundings(), Path(said.name))
        try:
            code = process.wait(seconds)
        finally:
            process.send_signal(signal.SIGTERM)
        return Outcome(code, said.read())


def _here(words: list[str], folder: Path) -> Outcome:
    said, code = io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as mend,
        patch.object(sys, "argv", words[words[0] == "-m" :]),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        mend.chdir(folder)
        mend.setenv("DISTKGD_CONFIGS", "configs")  # the small ones
        mend.syspath_prepend(folder / Path(words[0]).parent)  # as Python does; undone with all that programs add
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # of this command alone: the others are run nevertheless
            said.write(traceback.format_exc())
            code = 1
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    return Outcome(code, said.getvalue())
