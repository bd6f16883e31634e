"""Whatever is given to a launcher that it cannot use ends in one line and an exit code, before anything is written.

Launchers run in this process, by their functions; what needs a process of its own is in test_launch.py.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

import distkgd
from distkgd.commands.cli import launch, run_main
from distkgd.common.files import write_atomic
from distkgd.common.paths import check_folder, check_name
from distkgd.data import load_graph
from distkgd.data.reading.folders import read_files
from distkgd.data.split import split_file
from distkgd.distributed.checkpoint.tables import atomic_folder
from distkgd.distributed.ranks import Ranks, join_ranks
from distkgd.errors import ConfigError, RendezvousError, StorageError
from distkgd.evaluation.model_metrics import evaluate_model
from distkgd.models.export import export_model
from distkgd.models.export.faiss_format import open_searcher
from distkgd.models.export.source import open_source
from distkgd.models.importers import Given, import_model
from distkgd.models.model_folder import check_files, find_model, load_model, read_config, read_shape, save_model
from distkgd.pipeline.autoconfig.rules import batch_size
from distkgd.pipeline.config import load_config
from distkgd.pipeline.sweep.config import load_sweep
from distkgd.reporting.html import remake
from distkgd.tracking.serving.entries import entries_at, read_run
from tests.launches import ROOT, program, small_data

STAGE = {"dim": 4, "batch_size": 20, "epochs": 1, "validate_every": 1}
PLAN = {"device": "cpu", "mlflow": {"enabled": False}, "report": {"queries": 5}, "student": STAGE}
SWEEP = "configs/tables/iterde-ablation.yaml"


INTERRUPTED = "Interrupted; a run of distill, chain or ablate that had begun goes on with --resume.\n"


def ran(name: str, *arguments: str | Path) -> int:
    """A launcher's exit code."""
    return run_main(program(name), [*map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set and a finished run on it."""
    cwd = tmp_path_factory.mktemp("door")
    small_data(cwd / "data", entities=12, relations=3, triples=80)
    (cwd / "plan.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    assert ran("distill", cwd / "plan.yaml", "--data", cwd / "data", "--out", cwd / "run") == 0
    assert ran("export", cwd / "run/stages/student", cwd / "arrays", "--format", "numpy") == 0
    return cwd


# -- places that cannot be written ----------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path, str], list[str | Path]]] = {
    "distill": lambda place, out: [place / "plan.yaml", "--data", place / "data", "--out", out],
    "chain": lambda place, out: [place / "plan.yaml", "--data", place / "data", "--out", out],
    "ablate": lambda place, out: [ROOT / SWEEP, "--out", out],
    "export": lambda place, out: [place / "run/stages/student", out],
    "import": lambda place, out: [f"plain:{place / 'arrays'}", out],
    "evaluate": lambda place, out: [place / "run/stages/student", "--json", out],
    "bench": lambda place, out: ["--quick", "--json", out],
}
PLACES = {
    "a file": "{cwd}/file",
    "under a file": "{cwd}/file/run",
    "/proc": "/proc/run",
    "under a device": "/dev/null/run",
    "a long name": "{cwd}/" + "x" * 300,
    "a long path": "{cwd}/" + "/".join(["y" * 200] * 25),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_cannot_be_written_is_refused_at_the_door(
    name: str, where: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = str(tmp_path) if where == "a file" and name in ("evaluate", "bench") else PLACES[where].format(cwd=tmp_path)
    begun = time.monotonic()
    with mock.patch.object(torch.Tensor, "backward", side_effect=AssertionError("it was trained")):
        assert ran(name, *WRITERS[name](place, out)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert out[:40] in said.err
    assert time.monotonic() < begun + 10
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_path_that_no_system_takes_is_named() -> None:
    for path in ("a\0b", "\ud800"):
        with pytest.raises(ConfigError, match="--out"):
            check_folder(path)


def test_a_run_that_is_refused_leaves_no_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [place / "plan.yaml", "--data", place / "data", "--out", "new/run"]
    (tmp_path / "file").touch()
    for wrong in ("storage=file/x", "mlflow={uri: file/x}", "student.dim=5", "teacher=file", "student.batch_size=900"):
        assert ran("distill", *given, wrong) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["file"], wrong
    assert "batch_size 900 does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["xyz", "pdf", ""])
def test_a_file_of_an_unknown_ending_is_refused_by_name(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"file.{ending}".rstrip(".")
    path.write_text("a\tb\tc\n", encoding="utf-8")
    assert ran("distill", "--data", path, "--to", "4", "--out", tmp_path / "run") == 2
    assert str(path) in capsys.readouterr().err and not (tmp_path / "run").exists()


# -- a full disk, Ctrl-C ---------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("os.fsync", full), pytest.raises(StorageError, match=r"report\.json cannot be written: No space"):
        write_atomic(tmp_path / "report.json", "{}")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as info:
        launch(lambda ranks, display: full())
    assert info.value.code == 2 and capsys.readouterr().err == "error: No space left on device.\n"


@pytest.mark.parametrize("name", ["export", "import"])
def test_a_folder_for_which_there_is_no_room_is_named_and_gone(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = place / "run/stages/student"
    with mock.patch("pathlib.Path.write_text", full):
        code = ran(name, source if name == "export" else f"plain:{place / 'arrays'}", tmp_path / "out")
    assert code == 2 and str(tmp_path / "out") in (said := capsys.readouterr().err) and "No space left" in said
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_a_line_and_130_and_leaves_no_half_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [place / "plan.yaml", "--data", place / "data", "--out", tmp_path / "run"]
    with mock.patch("distkgd.pipeline.autoconfig.command.load_graph", side_effect=KeyboardInterrupt):
        assert ran("distill", *given) == 130
    with mock.patch("distkgd.pipeline.plan.prepare_folder", side_effect=KeyboardInterrupt):
        assert ran("distill", *given) == 130
    with mock.patch("distkgd.pipeline.ray.driver.ray_session", side_effect=KeyboardInterrupt):
        assert ran("chain", *given) == 130
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model", Ranks()):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == INTERRUPTED * 3


def test_ctrl_c_in_the_imports_is_130_without_a_traceback(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch/distill.py")]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b" signal" in line or b"typer" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert b"Traceback" not in rest and b"distkgd.pipeline.autoconfig.command" not in rest
    assert not list(tmp_path.iterdir())


def test_our_own_mistakes_are_raised() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main, [])


# -- ranks -----------------------------------------------------------------------------------------------------------

COMPANIONS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


WRONG = (None, "", "abc", "-1", "1.5", "99999999")
# Any text may be an address; without a WORLD_SIZE there is one rank.
INCOMPLETE = [(name, value) for name in COMPANIONS for value in WRONG if not (name == "MASTER_ADDR" and value)]
INCOMPLETE.remove(("WORLD_SIZE", None))


@pytest.mark.parametrize(("name", "value"), INCOMPLETE)
def test_a_world_without_its_companions_is_refused_by_name(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, usual in COMPANIONS.items():
        monkeypatch.setenv(key, usual)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(RendezvousError, match=rf"{name}.*torchrun, which sets WORLD_SIZE"):
        join_ranks("cpu")


def test_a_rank_that_is_no_number_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "one")
    assert ran("evaluate", place / "run/stages/student") == 2
    assert capsys.readouterr().err.startswith("error: RANK is 'one'; allowed is a whole number from 0 to 1")


# -- names -----------------------------------------------------------------------------------------------------------

NO_NAMES = ["../../x", "a/b", "/x", "", " ", ".", "..", "a\0b", "a\nb", "x" * 300, "a\\b"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no folder|too long"):
        check_name(name)
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump({"name": name}), encoding="utf-8")
    with pytest.raises(ConfigError, match="name: "):
        load_config(path)
    path.write_text(yaml.safe_dump({"name": name, "base": {}, "rows": {"a": {}}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="name: "):
        load_sweep(path)
    path.write_text(yaml.safe_dump({"teachers": {name: {"dim": 8}}, "student": {"method": "bkd"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot name a stage"):
        load_config(path)


def test_an_ordinary_name_is_a_name() -> None:
    for name in ("demo", "wn18rr_dualde-2.5", "größer", "a b", "...x", "x" * 200):
        assert check_name(name) == name


# -- paths as text ---------------------------------------------------------------------------------------------------


def test_every_function_that_takes_a_path_takes_text(place: Path, tmp_path: Path) -> None:
    run, stage, out = str(place / "run"), str(place / "run/stages/student"), str(tmp_path / "{}")
    one = Ranks()
    loaded = load_model(stage, one)
    assert find_model(stage) == find_model(Path(stage)) and read_config(find_model(stage)) == loaded.config
    assert repr(read_shape(stage)[0]) == repr(loaded.model.scorer)
    check_files(f"{stage}/model")
    save_model(out.format("saved"), loaded.model, loaded, {})
    assert export_model(stage, out.format("faiss"), "faiss", one)
    assert open_searcher(out.format("faiss")).scorer.dim == loaded.model.scorer.dim
    assert open_source(stage).folder == find_model(stage)
    import_model(f"plain:{place}/arrays", out.format("imported"), Given(), one)
    assert evaluate_model(stage, one, split="test", source=None)["split"] == "test"
    assert remake(run)[0] == place / "run/report.html"
    assert entries_at(run)[0] == read_run(run).entries()
    assert load_config(str(place / "plan.yaml")) == load_config(place / "plan.yaml")
    assert load_sweep(str(ROOT / SWEEP)) == load_sweep(ROOT / SWEEP)
    assert load_graph(str(place / "data")).sha256 == load_graph(place / "data").sha256
    (tmp_path / "one.tsv").write_text("".join(f"a{i % 12}\tr\tb{i % 5}\n" for i in range(60)), encoding="utf-8")
    assert len(read_files({"train": out.format("one.tsv")}).rows["train"]) == 60
    assert split_file(out.format("one.tsv"), "one").files
    assert distkgd.load(stage).scorer.dim == loaded.model.scorer.dim


# -- small graphs ----------------------------------------------------------------------------------------------------


def test_a_graph_smaller_than_the_default_plans_batch_is_trained_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path / "data", entities=30, relations=3, triples=240)
    few = ["mlflow.enabled=false", "report.html=false", "teacher.epochs=1", "student.epochs=1", "student.dim=4"]
    number = len(load_graph(data).train)
    size = batch_size(number)
    assert ran("distill", "--data", data, "--out", tmp_path / "run", "teacher.dim=8", *few) == 0
    said = capsys.readouterr().err
    for stage in ("teacher", "student", "baseline"):
        assert f"{stage}.batch_size 512 does not fit {number} training triples; {size} is taken" in said
    kept = yaml.safe_load((tmp_path / "run/plan.yaml").read_text(encoding="utf-8"))["config"]
    assert kept["teacher"]["batch_size"] == kept["student"]["batch_size"] == kept["baseline"]["batch_size"] == size
    assert ran("distill", "--data", data, "--out", tmp_path / "run", "teacher.dim=8", *few, "--resume") == 0
    capsys.readouterr()
    assert ran("distill", "--data", data, "--out", tmp_path / "other", *few, "student.batch_size=512") == 2
    assert "student.batch_size 512 does not fit" in capsys.readouterr().err and not (tmp_path / "other").exists()
