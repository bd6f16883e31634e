"""A run that an earlier version has left: its models are of use, it is ranked and reported, and not resumed.

`earlier/` holds its data set, its run folder (ComplEx: a teacher, a student and a model trained directly), exports of
the student, and the scores that its models gave the test triples.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import distkgd
from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError
from distkgd.evaluation.model_metrics import evaluate_model
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.reporting.html import remake

EARLIER = Path(__file__).resolve().parent / "earlier"
SCORES = json.loads((EARLIER / "scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", SCORES)
def test_a_model_of_an_earlier_version_scores_as_it_did(model: str) -> None:
    found = distkgd.load(EARLIER / model, data=EARLIER / "data").score(load_graph(EARLIER / "data").test, ids=True)
    torch.testing.assert_close(found, torch.tensor(SCORES[model]))


def test_rows_of_eight_bits_that_are_of_another_type_are_refused_by_name(tmp_path: Path) -> None:
    folder = shutil.copytree(EARLIER / "exported_int8", tmp_path / "model")
    distkgd.load(folder)
    tensors = load_file(folder / "entity.safetensors")
    save_file(tensors | {"rows": tensors["rows"].float()}, folder / "entity.safetensors")
    with pytest.raises(ModelError, match=r"entity\.safetensors: 'rows' is .* of torch\.float32, not"):
        distkgd.load(folder)


def test_a_stage_of_an_earlier_version_is_ranked() -> None:
    found = evaluate_model(EARLIER / "run/stages/student", Ranks(), split="test", source=str(EARLIER / "data"))
    assert found["overall"]["num_triples"] == 8
    assert 0 < found["overall"]["mrr"] < 1


def test_the_page_of_a_run_of_an_earlier_version_is_made(tmp_path: Path) -> None:
    run = shutil.copytree(EARLIER / "run", tmp_path / "run")
    path, notes = remake(run, str(EARLIER / "data"), 4)
    page = path.read_text(encoding="utf-8")
    assert notes == []
    assert all(name in page for name in ("teacher", "student", "direct", "complex", "bkd"))


def test_a_run_of_an_earlier_version_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(EARLIER / "run", tmp_path / "run")
    shutil.copytree(EARLIER / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    config = parse_config(yaml.safe_load((run / "plan.yaml").read_text(encoding="utf-8"))["config"], "plan.yaml")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"earlier version of distkgd.*cannot be resumed; choose another --out\.$"
    ) as caught:
        run_plan(config, load_graph("./data"), Ranks(), Path("run"), resume=True, display=Display(False))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
