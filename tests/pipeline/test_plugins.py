"""Methods and scorers of another package: named by a config, trained, written, resumed, ranked, reported like ours."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import distkgd
from distkgd.commands.configs import json_schema
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError
from distkgd.models.model_folder import load_model
from distkgd.pipeline.config import RunConfig, load_config, parse_config
from tests.docs.pages import blocks, section
from tests.launches import call, small_data

(MATCH,) = blocks(section("docs/models.md", "A method of your own"), "python")
SCORERS = """
from pathlib import Path
from distkgd.scorers.bilinear import Bilinear

Path(__file__).with_name("imported").touch()


class Halved(Bilinear):
    name = "halved"

    def tail_query(self, h, r):
        return h * r / 2

    def head_query(self, t, r):
        return t * r / 2


class Usurper(Halved):
    name = "complex"
"""
ENTRY_POINTS = """[distkgd.methods]
own_match = own_pkg.methods:Match
[distkgd.scorers]
own_halved = own_pkg.scorers:Halved
"""
STAGE = {"dim": 4, "batch_size": 20, "epochs": 2, "validate_every": 1, "scorer": "own_pkg.scorers:Halved"}
PLAN: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "mlflow": {"enabled": False},
    "report": {"queries": 5},
    "teacher": STAGE | {"dim": 8},
    "student": STAGE | {"method": "own_pkg.methods:Match", "distill": {"weight": 0.1}},
}


def forget() -> None:
    """What a new process has not imported yet."""
    for name in [one for one in sys.modules if one.partition(".")[0] == "own_pkg"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that Python looks into, with a package that is not installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "own_pkg").mkdir()
    for name, code in (("__init__", ""), ("methods", MATCH), ("scorers", SCORERS)):
        (folder / f"own_pkg/{name}.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    forget()


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with both."""
    place = tmp_path_factory.mktemp("run")
    small_data(place / "data", entities=12, relations=3, triples=80)
    (place / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"data": str(place / "data")}), encoding="utf-8")
    code, _, told = call("distill", [place / "plan.yaml", "--out", place / "run"])
    assert code == 0, told
    return place / "run"


@pytest.fixture
def installed(site: Path) -> Iterator[None]:
    """The package says what it has for distkgd."""
    about = site / "own_pkg-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own_pkg\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    importlib.invalidate_caches()
    yield
    for file in about.iterdir():
        file.unlink()
    about.rmdir()
    importlib.invalidate_caches()


def test_a_run_with_both_has_curve_checkpoint_model_and_report(run: Path) -> None:
    student = run / "stages/student"
    curve = [json.loads(line) for line in (student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("match" in key for line in curve for key in line)
    assert list((student / "checkpoint").iterdir())
    assert json.loads((student / "model/config.json").read_text(encoding="utf-8"))["scorer"] == {
        "name": "own_pkg.scorers:Halved",
        "dim": 4,
    }
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert [stage["method"] for stage in report["stages"]] == ["scratch", "own_pkg.methods:Match"]
    assert "own_pkg.methods:Match" in (run / "report.html").read_text(encoding="utf-8")


def test_it_is_resumed_ranked_asked_and_exported(run: Path, tmp_path: Path) -> None:
    code, _, told = call("distill", [run.parent / "plan.yaml", "--out", run, "--resume"])
    assert code == 0 and told.count("finished before") == 2
    assert call("evaluate", [run / "stages/student", "--json", tmp_path / "test.json"])[0] == 0
    mine = json.loads((run / "report.json").read_text(encoding="utf-8"))["stages"][1]["test"]["mrr"]
    found = json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))["overall"]["mrr"]
    assert found == pytest.approx(mine, abs=1e-6)
    assert call("export", [run / "stages/student", tmp_path / "arrays", "--format", "numpy"])[0] == 0
    answers = distkgd.load(run / "stages/student").predict(head=["e01"], relation="r1", k=3)
    assert len(answers.names[0]) == 3
    assert call("report", [run])[0] == 0


def test_a_model_folder_imports_no_code_that_nobody_asked_for(
    run: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    student, mark = run / "stages/student", site / "own_pkg/imported"

    def fresh() -> None:
        forget()
        mark.unlink(missing_ok=True)

    fresh()
    for command in (["evaluate", student], ["export", student, tmp_path / "out"], ["report", run]):
        code, _, told = call(str(command[0]), command[1:])
        assert code == (2 if command[0] != "report" else code), told
        assert command[0] == "report" or (
            "own_pkg.scorers:Halved" in told and "DISTKGD_PLUGINS=own_pkg.scorers" in told
        )
        assert not mark.exists() and "own_pkg" not in sys.modules
    monkeypatch.setenv("DISTKGD_PLUGINS", "another, own_pkg.scorers")
    assert load_model(student, Ranks()).model.scorer.name == "halved" and mark.exists()
    monkeypatch.delenv("DISTKGD_PLUGINS")
    assert load_model(student, Ranks()).model.scorer.name == "halved"  # imported by now
    fresh()
    with pytest.raises((ModelError, ConfigError), match="nobody has asked for"):
        load_model(student, Ranks())
    request.getfixturevalue("installed")
    assert load_model(student, Ranks()).model.scorer.name == "halved"


def test_entry_points_are_named_like_ours(installed: None) -> None:
    tree = {"teacher": {"dim": 8}, "student": {"scorer": "own_halved", "method": "own_match", "distill": {"weight": 2}}}
    assert parse_config(tree, "here").student.distill.weight == 2
    with pytest.raises(ConfigError, match="wieght"):
        parse_config({**tree, "student": {"method": "own_match", "distill": {"wieght": 2}}}, "here")
    with pytest.raises(ConfigError, match=r"there is no method 'own'; there are scratch, .*own_match"):
        load_config(None, ["student.method=own"])
    properties = json_schema(RunConfig)["$defs"]["StageConfig"]["properties"]
    assert "own_match" in str(properties["method"]) and "own_halved" in str(properties["scorer"])


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("method", "nowhere.at_all:Match", "No module named 'nowhere'"),
        ("method", "own_pkg.methods:Nobody", "Nobody"),
        ("method", "own_pkg.methods:MatchConfig", "is no Method of distkgd.methods.base"),
        ("method", "own_pkg.scorers:Halved", "is no Method"),
        ("method", "own pkg:Match", "not of the form package.module:Class"),
        ("method", "own_match", "there is no method 'own_match'"),
        ("scorer", "own_pkg.methods:Match", "is no Scorer"),
        ("scorer", "own_pkg.scorers:Usurper", "name is 'complex'"),
        ("scorer", ":", "not of the form"),
    ],
)
def test_what_is_no_method_or_scorer_is_refused_by_its_key(key: str, name: str, words: str, site: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [f"student.{key}={json.dumps(name)}"])
    assert f"student.{key}" in str(refused.value) and words in str(refused.value)
