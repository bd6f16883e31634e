"""Whose commit a figure carries, where a model finds its data again, and whether the data is still the same."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distkgd.common.console import Display
from distkgd.common.provenance import PACKAGE, version_of
from distkgd.common.version import __version__
from distkgd.data import anchored, load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.evaluation.model_metrics import evaluate_model
from distkgd.evaluation.prediction import data_of
from distkgd.models.model_folder import load_model
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.reporting.html.page import remake
from tests.launches import ROOT, small_data

INSTALLED = f"version {__version__}"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def package_in(folder: Path) -> Path:
    (folder / "distkgd/common").mkdir(parents=True)
    shutil.copy(PACKAGE / "common/provenance.py", folder / "distkgd/common")
    return folder / "distkgd"


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all", "--allow-empty")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The top of a repository as distkgd's own, with something that it ignores."""
    package_in(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".gitignore").write_text("*.so\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("words\n", encoding="utf-8")
    committed(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("place", [".venv/lib/python3.11/site-packages", "vendored", "."])
def test_an_installed_package_says_its_version_and_never_the_commit_around_it(
    place: str, tracked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracked:
        package = package_in(tmp_path / place)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n', encoding="utf-8")
    committed(tmp_path)
    package = package if tracked else package_in(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    assert version_of(package) == INSTALLED


def test_the_package_whose_commit_is_told_is_this_one() -> None:
    assert PACKAGE == ROOT / "distkgd"


def test_a_package_that_its_own_repository_does_not_know_says_its_version(checkout: Path) -> None:
    assert version_of(package_in(checkout / "build/lib")) == INSTALLED
    git(checkout, "rm", "-q", "-r", "--cached", "distkgd")
    git(checkout, "commit", "-q", "-m", "gone")
    assert version_of(checkout / "distkgd") == INSTALLED


def test_a_checkout_says_its_commit_wherever_it_is_run_from(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    committed(other)
    monkeypatch.chdir(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as a hook of git would
    found = version_of(checkout / "distkgd")
    monkeypatch.delenv("GIT_DIR")
    assert found == git(checkout, "rev-parse", "HEAD").strip()


def test_an_edited_checkout_says_modified_with_a_hash_of_the_difference(checkout: Path) -> None:
    commit, package = git(checkout, "rev-parse", "HEAD").strip(), checkout / "distkgd"
    (checkout / "README.md").write_text("other words\n", encoding="utf-8")  # no figure comes from it
    (package / "made.so").write_bytes(b"ignored by git")
    assert version_of(package) == commit
    code = package / "common/provenance.py"
    kept = code.read_text(encoding="utf-8")
    said = []
    for change in ("# one\n", "# two\n"):
        code.write_text(kept + change, encoding="utf-8")
        said.append(version_of(package))
        git(checkout, "add", "-A")
        assert version_of(package) == said[-1], "staged or not"
    code.write_text(kept, encoding="utf-8")
    (package / "new.py").write_text("", encoding="utf-8")
    said.append(version_of(package))
    (package / "new.py").unlink()
    assert version_of(package) == commit
    assert len(set(said)) == 3
    for text in said:
        first, word, digest = text.split()
        assert (first, word, len(digest)) == (commit, "modified", 12)


STAGE = {"dim": 8, "epochs": 1, "batch_size": 200}


def distilled(data: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """The student's folder and the report of a small plan."""
    tree = {
        "data": data,
        "teacher": STAGE,
        "student": {**STAGE, "method": "bkd"},
        "baseline": False,
        "mlflow": {"enabled": False},
        "device": "cpu",
        "report": {"queries": 4},
    }
    report = run_plan(parse_config(tree, "t"), load_graph(data), Ranks(), out, resume=False, display=Display(False))
    return out / "stages/student", report.to_json()


@pytest.mark.parametrize("data", ["own", "./own", "deep/../own", "kinship"])
def test_a_model_finds_its_data_from_any_working_directory(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A public set by its name too: $DISTKGD_DATA may be said from here.
    home = small_data(tmp_path / "home/own").parent
    (home / "deep").mkdir()
    if data == "kinship":
        monkeypatch.setattr("distkgd.data.datasets.public.SHA256", {})
        monkeypatch.setattr("distkgd.data.datasets.public.PUBLIC", {"kinship": "https://nowhere"})
        monkeypatch.setenv("DISTKGD_DATA", "sets")
        small_data(home / "sets/kinship")
    monkeypatch.chdir(home)
    student, report = distilled(data, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    found = evaluate_model(student, Ranks(), split="test", source=None)
    assert found["overall"]["mrr"] == report["stages"][-1]["test"]["mrr"] and "warnings" not in found
    assert data_of(load_model(student, Ranks()), "model", None)[1] == ""
    (tmp_path / "run/examples.json").unlink()
    assert remake(tmp_path / "run")[1] == []
    assert json.loads((student / "model/config.json").read_text())["commit"] == report["machine"]["commit"]


def test_names_of_data_sets_stay_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pystdlib", "umls", "powerlaw:entities=10"):
        assert anchored(name) == name


def test_evaluate_and_predict_say_when_the_data_has_changed_since_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path / "own")
    student, report = distilled(str(data), tmp_path / "run")
    test = data / "test.tsv"
    test.write_text("".join(test.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    then, now = report["data"]["sha256"][:12], load_graph(str(data)).sha256[:12]
    found = evaluate_model(student, Ranks(), split="test", source=None)
    (said,) = found["warnings"]
    assert "own has changed since training" in said and then in said and now in said
    with pytest.raises(SystemExit) as left:
        importlib.import_module("launch.evaluate").main(student, "test", json_=None)
    assert left.value.code == 0 and f"warning: {said}\n" in capsys.readouterr().err
    graph, note = data_of(load_model(student, Ranks()), str(student), None)
    assert graph is not None and then in note and now in note
    (tmp_path / "run/examples.json").unlink()
    (missing,) = remake(tmp_path / "run")[1]
    assert then in missing and now in missing


def test_data_of_other_entities_than_in_training_is_refused_with_the_reason(tmp_path: Path) -> None:
    data = small_data(tmp_path / "own")
    student, report = distilled(str(data), tmp_path / "run")
    with (data / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("e00\tr0\tsomebody new\n")
    with pytest.raises(
        ModelError, match=f"other entities .*has changed since training.*{report['data']['sha256'][:12]}"
    ):
        evaluate_model(student, Ranks(), split="test", source=None)


def test_the_plan_on_disk_says_where_its_data_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_data(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    distilled("own", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run/plan.yaml").read_text())["source"] == str(data.resolve())
