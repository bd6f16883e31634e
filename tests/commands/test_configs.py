"""Configs that come with the package: found by name, listed, copied, and their JSON schema."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distkgd.commands.app import build_app
from distkgd.commands.cli import run_app
from distkgd.commands.configs import json_schema
from distkgd.config.shipped import find_config, shipped
from distkgd.errors import ConfigError
from distkgd.pipeline.config import RunConfig, load_config
from distkgd.pipeline.sweep.config import SweepConfig, load_sweep
from tests.launches import ROOT, held

CONFIGS = ROOT / "configs"
SWEEPS = ("ablations", "tables", "search")


def distkgd(*arguments: str) -> int:
    return run_app(build_app(), arguments, "distkgd")


def test_all_configs_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(shipped().values()) == set(CONFIGS.rglob("*.yaml"))
    for name in ("umls/bkd_complex", "umls/bkd_complex.yaml", "configs/umls/bkd_complex.yaml", "./umls/bkd_complex"):
        assert load_config(name) == load_config(CONFIGS / "umls/bkd_complex.yaml"), name
    assert load_sweep(Path("tables/iterde-ablation")) == load_sweep(CONFIGS / "tables/iterde-ablation.yaml")
    for name in ("../configs/default", "/umls/bkd_complex", "umls", "x" * 300, "n\0l"):
        assert find_config(name) == Path(name)
    with pytest.raises(ConfigError, match=r"no config file umls/bkd\..*umls/bkd_complex"):
        load_config("umls/bkd")
    (tmp_path / "umls").mkdir()
    (tmp_path / "umls/bkd_complex").write_text("student: {dim: 7}")
    assert load_config("umls/bkd_complex").student.dim == 7  # a file that is there comes first
    monkeypatch.setenv("DISTKGD_CONFIGS", str(tmp_path / "team"))
    assert find_config("umls/ta_complex") != Path("umls/ta_complex")  # there is no such folder
    (tmp_path / "team").mkdir()
    (tmp_path / "team/ours.yaml").write_text("student: {dim: 9}")
    assert list(shipped()) == ["ours"] and load_config("ours").student.dim == 9


def test_configs_are_listed_with_what_they_say_of_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert distkgd("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert all(len(line.split()) > 3 for line in lines), "a config begins with a comment"
    assert distkgd("configs", "umls", "default.yaml") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*(one for one in shipped() if one.startswith("umls/")), "default"]
    assert distkgd("configs", "uml") == 2 and "'uml'" in capsys.readouterr().err


def test_copied_configs_are_the_same_plans_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert distkgd("configs", "--out", str(out)) == 0
    copied = {name: path for name, path in held(out).items() if isinstance(path, bytes)}
    assert copied == {str(path.relative_to(CONFIGS)): path.read_bytes() for path in CONFIGS.rglob("*.yaml")}
    assert load_sweep(out / "ablations/codex-s/med.yaml")[1] == load_sweep(CONFIGS / "ablations/codex-s/med.yaml")[1]
    (out / "default.yaml").write_text("mine")
    assert distkgd("configs", "umls/ta_complex", "default", "--out", str(out)) == 2
    assert "exists" in capsys.readouterr().err and (out / "default.yaml").read_text() == "mine"
    (tmp_path / "file").touch()
    assert distkgd("configs", "--out", str(tmp_path / "file")) == 2


# -- schema -----------------------------------------------------------------------------------------------------------


def faults(schema: dict[str, Any], tree: Any) -> list[str]:
    """Keys of a tree that the schema refuses."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    plain = json.loads(json.dumps(tree))  # keys are texts there
    return [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(plain)]


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("ray/")])
def test_the_schema_takes_every_shipped_config(name: str) -> None:
    root = SweepConfig if name.startswith(SWEEPS) else RunConfig
    assert faults(json_schema(root), yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))) == []


def test_the_schema_refuses_what_loading_refuses_and_says_what_keys_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert distkgd("configs", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    for tree, where in (
        ({"sutdent": {}}, ""),
        ({"student": {"dim": 0}}, "student.dim"),
        ({"student": {"dropout": 1}}, "student.dropout"),
        ({"student": {"method": "bdk"}}, "student.method"),
        ({"student": {"method": "bkd", "distill": {"wieght": 1}}}, "student.distill"),
        ({"student": {"method": "metasd", "distill": {"prune": {"ratios": 1}}}}, "student.distill"),
    ):
        assert where in faults(schema, tree), tree
        with pytest.raises(ConfigError):
            load_config(None, [f"{key}={json.dumps(value)}" for key, value in tree.items()])
    assert (
        faults(schema, {"student": {"method": "dualde", "distill": {"soft": "kl", "stage_two": {"epochs": 3}}}}) == []
    )
    stage = schema["$defs"]["StageConfig"]["properties"]
    assert stage["dim"]["description"].startswith("real coordinates per entity") and stage["dim"]["minimum"] == 1
    assert distkgd("configs", "--sweep-schema") == 0
    assert "seeds" in json.loads(capsys.readouterr().out)["$defs"]["SweepConfig"]["properties"]
