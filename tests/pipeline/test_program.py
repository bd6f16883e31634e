"""`distkgd.distill`, `distkgd.train` and the `Run` that they return."""

import os
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

import distkgd
from distkgd.errors import ConfigError, ModelError
from distkgd.pipeline.config import load_config
from distkgd.training import loop
from tests.docs.sites import small_rules
from tests.launches import small_config, small_data
from tests.own_graphs import own_triples, write_tsv

QUIET = ["mlflow.enabled=false", "device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> distkgd.Run:
    """Of one file of triples."""
    folder = tmp_path_factory.mktemp("program")
    file = write_tsv(folder / "mine.tsv", own_triples(900, 80, 4))
    with small_rules():
        return distkgd.distill(file, to=8, overrides=QUIET, out=folder / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A config file, and what it says."""
    folder = tmp_path_factory.mktemp("plain")
    path = small_config(folder / "small.yaml", small_data(folder / "data"), report={"queries": 5})
    return path, yaml.safe_load(path.read_text())


def test_a_file_of_triples_becomes_a_run_in_silence_that_leaves_the_process_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_tsv(tmp_path / "mine.tsv", own_triples(900, 80, 4))
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)], torch.get_num_threads()
    with small_rules():
        run = distkgd.distill(file, to=8, overrides=[*QUIET, "threads=1"], out=tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    assert before == ([signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)], torch.get_num_threads())
    assert list(run.stages) == ["teacher", "student", "direct"] and (run.folder / "report.html").exists()


def test_a_run_has_stages_tables_charts_and_models(run: distkgd.Run, tmp_path: Path) -> None:
    table = run.table()
    assert table["stage"].to_list() == list(run.stages) == list(run.models)
    assert table["role"].to_list() == ["teacher", "student", "direct"] and table["dim"].to_list() == [64, 8, 8]
    assert table["test_mrr"].to_list() == [stage.mrr("test") for stage in run.stages.values()]
    curves = run.curves()
    assert curves.filter(name="valid/mrr", stage="student")["value"].max() == pytest.approx(
        max(found for found in [run.stages["student"].mrr("valid")] if found), abs=1e-9
    )
    assert "step" not in curves["name"].to_list() and curves.schema["step"] == pl.Int64
    assert {"What the bytes buy", "Learning curves", "By relation"} <= set(run.figures)
    drawn = run.figures["What the bytes buy"]
    drawn.save(tmp_path / "bytes.html")
    assert (tmp_path / "bytes.html").read_text() == (run.folder / "frontier.html").read_text()
    assert drawn.table()["model"].to_list()[:3] == list(run.stages) and drawn._repr_html_().startswith(
        "<iframe srcdoc="
    )
    assert run.student is run.models["student"] and run.student.scorer.dim == 8
    assert run.models["teacher"].scorer.dim == 64
    assert run.remarks and str(run) == (run.folder / "report.md").read_text()
    assert "<th>retained</th>" in run._repr_html_() and "stages: teacher, student, direct" in repr(run)


def test_a_finished_run_is_opened_by_its_folder(run: distkgd.Run, tmp_path: Path) -> None:
    assert distkgd.Run(run.folder).report.to_json() == run.report.to_json()
    with pytest.raises(ModelError, match=r"report\.json is missing"):
        distkgd.Run(tmp_path)


def test_a_config_is_a_file_a_mapping_or_a_checked_one(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, tree = plain
    file = distkgd.train(path, ["seed=3"], out=tmp_path / "file")
    mapping = distkgd.train(tree, ["seed=3"], out=tmp_path / "mapping")
    checked = distkgd.train(load_config(path, ["seed=3"]), out=tmp_path / "checked")
    found = {run.stages["student"].mrr("test") for run in (file, mapping, checked)}
    other = distkgd.train(path, out=tmp_path / "other").stages["student"].mrr("test")
    assert len(found) == 1 and None not in found and other not in found
    assert tree == yaml.safe_load(path.read_text())
    with pytest.raises(ConfigError, match="RunConfig has been checked"):
        distkgd.train(load_config(path), ["seed=3"])
    with pytest.raises(ConfigError, match=r"student\.dims"):
        distkgd.train({**tree, "student": {"dims": 3}}, out=tmp_path / "wrong")


def test_progress_is_shown_where_it_is_wanted(
    plain: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distkgd.train(plain[0], out=tmp_path / "run", show=True)
    assert "student: done in" in capfd.readouterr().err


def test_what_cannot_be_done_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "mine.tsv", own_triples(900, 80, 4))
    with pytest.raises(ConfigError, match="say how small"):
        distkgd.distill(small_data(tmp_path / "data"))
    with pytest.raises(ConfigError, match="MB"), small_rules():
        distkgd.distill(file, max_mb=1e-5, overrides=QUIET, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_interrupt_is_a_keyboard_interrupt_after_which_the_run_goes_on(
    plain: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = loop.train_step, []

    def interrupted(*given: Any) -> Any:
        steps.append(given)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*given)

    whole = distkgd.train(plain[0], out=tmp_path / "whole").stages["student"]
    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        distkgd.train(plain[0], out=tmp_path / "run")
    assert len(steps) in (3, 4)
    resumed = distkgd.train(plain[0], out=tmp_path / "run", resume=True).stages["student"]
    assert resumed.mrr("test") == whole.mrr("test") and resumed.steps == whole.steps
