"""Teachers at URIs, and runs whose stages are kept at one for machines that share no disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch

from distkgd.config.tree import merge
from distkgd.distributed.checkpoint.reader import list_steps
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError, Stopped, StorageError
from distkgd.models import remote
from distkgd.models.model_folder import load_model, sha256_of
from distkgd.models.remote import fetch_model, read_remote_shape
from distkgd.pipeline import plan
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.storage import Storage
from distkgd.tracking.run_ids import adopt, noted
from distkgd.training import loop
from tests.launches import small_data
from tests.pipeline.test_plan import ran, run_on_data, trained_stages
from tests.ranks import run_on_ranks

STAGE: dict[str, Any] = {"batch_size": 100, "epochs": 3, "validate_every": 1, "optimizer": {"lr": 0.3}}
TREE: dict[str, Any] = {"teacher": STAGE | {"dim": 12}, "student": STAGE | {"dim": 6, "method": "bkd"}}
LONG = merge(TREE, {"student": {"epochs": 8, "checkpoint_every": 1}})


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def rows_of(folder: Path, stage: str = "student") -> torch.Tensor:
    return load_model(folder / "stages" / stage, Ranks()).model.entity.weight


def stopped_in(folder: Path, tree: dict[str, Any], stage: str, epoch: int) -> None:
    """Run a plan until that epoch of `stage`, and leave as after a signal."""
    real = plan.train_stage

    def train(job: Any) -> Any:
        job.watch = lambda name, at, _best: (name, at) != (stage, epoch)
        return real(job)

    with mock.patch.object(plan, "train_stage", train), pytest.raises(Stopped):
        ran(folder, tree)


def logged(folder: Path) -> list[int]:
    """The steps of the student's curves."""
    lines = (folder / "stages/student/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


# -- teachers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_teacher_at_a_uri_teaches_as_the_one_at_its_path_does(kind: str, memory: Any, tmp_path: Path) -> None:
    ran(tmp_path / "made", {"student": TREE["teacher"]})
    folder = tmp_path / "made/stages/student"
    uri = f"file://{folder}"
    if kind == "memory":
        memory.put(str(folder / "model"), "/bucket/teacher/model", recursive=True)
        uri = "memory://bucket/teacher"
    by_path = ran(tmp_path / "path", TREE | {"teacher": str(folder)})
    by_uri = ran(tmp_path / "uri", TREE | {"teacher": uri})
    at_uri, at_path = ({row["name"]: row for row in report["stages"]} for report in (by_uri, by_path))
    assert at_uri["teacher"]["source"] == uri and at_uri["student"]["teachers"] == ["teacher"]
    assert at_uri["student"]["test"] == at_path["student"]["test"]
    assert torch.equal(rows_of(tmp_path / "uri"), rows_of(tmp_path / "path"))
    with trained_stages() as trained, mock.patch("distkgd.pipeline.foreign_teachers.fetch_model") as fetched:
        ran(tmp_path / "uri", TREE | {"teacher": uri}, resume=True)
    assert not trained.called and not fetched.called


def test_ranks_fetch_a_teacher_once(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    run_on_data(Ranks(), {"student": STAGE | {"dim": 12}}, str(data), str(tmp_path / "made"))
    tree = TREE | {"teacher": f"file://{tmp_path}/made/stages/student"}
    run_on_ranks(2, run_on_data, tree=tree, data=str(data), folder=str(tmp_path / "run"))
    assert len(list((tmp_path / "run/imported").glob("*/model/config.json"))) == 1
    assert json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))["world"] == 2


@pytest.mark.parametrize("harm", ["changed", "missing", "unsigned"])
def test_a_damaged_model_is_named_and_nothing_of_it_stays(harm: str, memory: Any, tmp_path: Path) -> None:
    ran(tmp_path / "made", {"student": TREE["teacher"]})
    memory.put(str(tmp_path / "made/stages/student/model"), "/bucket/m", recursive=True)
    (table,) = memory.glob("/bucket/m/entity-*.safetensors")
    if harm == "changed":
        memory.pipe_file(table, memory.cat_file(table)[:-1] + b"x")
    elif harm == "missing":
        memory.rm(table)
    else:
        config = json.loads(memory.cat_file("/bucket/m/config.json"))
        memory.pipe_file("/bucket/m/config.json", json.dumps(config | {"sha256": {}}).encode())
    with pytest.raises(ModelError, match=r"memory://bucket/m/(config.json has no sha256 of )?entity-"):
        fetch_model("memory://bucket/m", tmp_path / "out/model")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_remote_model_of_nan_is_not_fetched(memory: Any, tmp_path: Path) -> None:
    ran(tmp_path / "made", {"student": TREE["teacher"]})
    model = tmp_path / "made/stages/student/model"
    path = next(model.glob("relation-*.safetensors"))
    before = sha256_of(path)
    content = bytearray(path.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    config = (model / "config.json").read_text(encoding="utf-8").replace(before, sha256_of(path))
    (model / "config.json").write_text(config, encoding="utf-8")
    memory.put(str(model), "/bucket/m", recursive=True)
    with pytest.raises(
        ModelError, match=r"memory://bucket/m/relation-.*: tensor 'relation', row \d+ \(.*\), holds nan"
    ):
        fetch_model("memory://bucket/m", tmp_path / "out/model")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_a_teacher_is_named_before_anything_is_written(memory: Any, tmp_path: Path) -> None:
    for uri, said in (
        ("nosuch://bucket/x", "nosuch://bucket/x cannot be opened"),
        ("memory://bucket/nothing", "memory://bucket/nothing holds no model"),
    ):
        with pytest.raises((ConfigError, ModelError), match=said):
            ran(tmp_path / "run", TREE | {"teacher": uri})
        assert not (tmp_path / "run").exists()


def test_only_the_config_travels_for_a_models_shape(memory: Any, tmp_path: Path) -> None:
    ran(tmp_path / "made", {"student": TREE["teacher"]})
    memory.put(str(tmp_path / "made/stages/student/model/config.json"), "/bucket/m/config.json")
    scorer, reciprocal = read_remote_shape("memory://bucket/m")
    assert (scorer.name, scorer.dim, reciprocal) == ("complex", 12, True)


def test_an_error_of_the_file_system_is_told_in_a_line(memory: Any, tmp_path: Path) -> None:
    with (
        mock.patch.object(type(memory), "exists", side_effect=PermissionError("not yours\nat all")),
        pytest.raises(
            StorageError, match=r"fetching memory://a failed \(PermissionError: not yours\); look at the URI"
        ),
    ):
        fetch_model("memory://a", tmp_path / "out")


# -- storage -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_taken_up_from_its_storage_and_nothing_is_trained(memory: Any, tmp_path: Path) -> None:
    tree = TREE | {"storage": "memory://bucket/run"}
    first = ran(tmp_path / "one", tree)
    kept = {name.removeprefix("/bucket/run/") for name in memory.find("/bucket/run")}
    assert {"plan.yaml", "stages/student/result.json", "stages/teacher/model/config.json"} <= kept
    assert not any("checkpoint" in name for name in kept)
    with pytest.raises(ConfigError, match="memory://bucket/run already holds a run; add --resume"):
        ran(tmp_path / "two", tree)
    assert not (tmp_path / "two").exists()
    with trained_stages() as trained:
        second = ran(tmp_path / "two", tree, resume=True)
    assert not trained.called and second["stages"] == first["stages"]
    assert torch.equal(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"))


def test_a_stage_goes_on_elsewhere_at_its_last_copied_checkpoint(memory: Any, tmp_path: Path) -> None:
    tree = LONG | {"storage": "memory://bucket/run"}
    whole = ran(tmp_path / "whole", LONG)
    stopped_in(tmp_path / "one", tree, "student", 5)
    here = list_steps(tmp_path / "one/stages/student/checkpoint")
    there = sorted(int(name.split("_")[1].split("/")[0]) for name in memory.glob("/bucket/run/**/manifest.json"))
    assert there[-1] == here[-1] and len(there) <= 2  # the newest and the best
    with trained_stages() as trained, mock.patch.object(loop, "train_step", side_effect=loop.train_step) as steps:
        report = ran(tmp_path / "two", tree, resume=True)
    assert [call.args[0].name for call in trained.call_args_list] == ["student"]
    assert steps.call_count == report["stages"][1]["steps"] - here[-1]
    assert logged(tmp_path / "two") == logged(tmp_path / "whole")
    assert report["stages"][1]["test"] == whole["stages"][1]["test"]
    assert torch.equal(rows_of(tmp_path / "two"), rows_of(tmp_path / "whole"))


@pytest.mark.parametrize("harm", ["torn", "changed", "without its best"])
def test_a_copy_that_is_not_whole_is_passed_over(harm: str, memory: Any, tmp_path: Path) -> None:
    tree = LONG | {"storage": "memory://bucket/run"}
    stopped_in(tmp_path / "one", tree, "student", 5)
    manifests = sorted(memory.glob("/bucket/run/**/manifest.json"))
    for manifest in manifests[:1] if harm == "without its best" and len(manifests) > 1 else manifests:
        if harm == "changed":
            (table,) = memory.glob(manifest.replace("manifest.json", "rows-*"))
            memory.pipe_file(table, b"x" * memory.size(table))
        else:
            memory.rm(manifest)
    storage = Storage("memory://bucket/run", tmp_path / "two")
    storage.download_checkpoints("student")
    left = list_steps(tmp_path / "two/stages/student/checkpoint")
    assert left == [] or (harm == "without its best" and len(manifests) == 1)
    assert not list((tmp_path / "two").rglob(".*tmp"))


def test_a_uri_is_no_pattern(memory: Any, tmp_path: Path) -> None:
    storage = Storage("memory://bucket/run[1]*", tmp_path)
    for step in (7, 30):
        memory.pipe_file(f"/bucket/run[1]*/stages/student/checkpoint/step_{step}/manifest.json", b"{}")
    memory.pipe_file("/bucket/run1/stages/student/checkpoint/step_5/manifest.json", b"{}")
    memory.pipe_file("/bucket/run[1]*/stages/student/checkpoint/step_40/rows.safetensors", b"")
    assert storage._steps("student") == [7, 30]


def test_another_runs_place_is_not_taken(memory: Any, tmp_path: Path) -> None:
    ran(tmp_path / "one", TREE | {"storage": "memory://bucket/run"})
    with pytest.raises(ConfigError, match=r"made by another plan \(differs in: seed\)"):
        ran(tmp_path / "two", TREE | {"storage": "memory://bucket/run", "seed": 1}, resume=True)
    stages = TREE | {"seed": 1}
    ran(tmp_path / "four", stages)
    with pytest.raises(ConfigError, match=r"^memory://bucket/run was made by another plan \(differs in: seed\)"):
        ran(tmp_path / "four", stages | {"storage": "memory://bucket/run"}, resume=True)


def test_a_place_that_cannot_be_written_is_an_error_before_training(memory: Any, tmp_path: Path) -> None:
    with (
        mock.patch.object(type(memory), "put_file", side_effect=PermissionError("read only")),
        pytest.raises(StorageError, match=r"writing to memory://bucket/run failed \(PermissionError: read only\)"),
        trained_stages() as trained,
    ):
        ran(tmp_path / "one", TREE | {"storage": "memory://bucket/run"})
    assert not trained.called


def test_a_checkpoint_that_cannot_be_copied_does_not_end_the_training(
    memory: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = remote.upload

    def upload(fs: Any, folder: Path, there: str, last: str) -> None:
        if "checkpoint" in there:
            raise OSError("no room")
        real(fs, folder, there, last)

    with mock.patch("distkgd.pipeline.storage.upload", upload):
        report = ran(tmp_path / "one", TREE | {"storage": "memory://bucket/run"})
    assert len(report["stages"]) == 2 and "no room" in caplog.text


def test_a_stages_run_in_mlflow_is_known_on_the_next_machine(memory: Any, tmp_path: Path) -> None:
    state = {"uri": "http://x", "experiment": "distkgd", "run_id": "p", "stages": {"student": {"run_id": "s"}}}
    (tmp_path / "one").mkdir()
    (tmp_path / "one/mlflow.json").write_text(json.dumps(state), encoding="utf-8")
    Storage("memory://bucket/run", tmp_path / "one").keep_ids("student")
    other = Storage("memory://bucket/run", tmp_path / "two")
    other.download_checkpoints("teacher")
    assert noted(tmp_path / "two", "teacher") == {}
    other.download_checkpoints("student")
    assert noted(tmp_path / "two", "student") == {"run_id": "s"}
    assert json.loads((tmp_path / "two/mlflow.json").read_text(encoding="utf-8"))["run_id"] == "p"
    adopt(tmp_path / "two", {"run_id": "q"}, "student", {"run_id": "t"})
    assert noted(tmp_path / "two", "student") == {"run_id": "s"}  # its own is kept


def test_storage_and_overlapping_links_are_refused_together() -> None:
    stage = {"method": "iterde"}
    with pytest.raises(ConfigError, match=r"chain\.overlap.*drop storage"):
        tree = {"teacher": {}, "student": stage, "chain": {"dims": [8, 4], "overlap": 0.5}, "storage": "memory://x"}
        parse_config(tree, "test")
