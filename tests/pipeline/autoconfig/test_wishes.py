"""Which command lines mean a graph of one's own, and which are refused."""

from pathlib import Path

import pytest

from distkgd.data import How
from distkgd.errors import ConfigError
from distkgd.pipeline.autoconfig import Budget, DistillRequest, request_of


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.tsv"
    path.write_text("a\tr\tb\n", encoding="utf-8")
    return str(path)


def test_ordinary_runs_stay_ordinary(tmp_path: Path) -> None:
    assert request_of(None, [], None) is None
    assert request_of(Path("x.yaml"), ["seed=1"], "umls") is None
    assert request_of(None, [], str(tmp_path)) is None
    assert request_of(None, [], "powerlaw:entities=9,triples=9,relations=1,skew=0.8,seed=0") is None


def test_a_file_or_a_size_asks_for_more(file: str, tmp_path: Path) -> None:
    assert request_of(None, [], file, to=32) == DistillRequest(file, 32)
    assert request_of(None, [], "umls", budget=Budget(max_mb=2)) == DistillRequest("umls", None, Budget(max_mb=2))
    assert request_of(Path("x.yaml"), [], file, seed=3) == DistillRequest(file, config=Path("x.yaml"), seed=3)
    assert request_of(None, [], str(tmp_path), to=8) is not None


def test_what_is_said_of_a_file_or_folder_is_asked_for(file: str, tmp_path: Path) -> None:
    how = How(("head", "tail", "relation"), literals=True)
    for data in (file, str(tmp_path)):
        request = request_of(None, [], data, to=8, columns="Head, tail,relation", literals=True)
        assert request == DistillRequest(data, 8, how=how)
        assert (request.file is None) == (request.copied is not None) == (data == str(tmp_path))


def test_what_cannot_be_meant_is_refused(file: str, tmp_path: Path) -> None:
    for words, call in {
        "how small": lambda: request_of(None, [], file),
        "drop --to": lambda: request_of(Path("x.yaml"), [], file, to=8),
        "need your graph": lambda: request_of(None, [], None, to=8),
        "no such file": lambda: request_of(None, [], str(tmp_path / "other.tsv"), to=8),
        "--split-seed": lambda: request_of(None, [], "umls", to=8, seed=1),
        "--allow-unseen": lambda: request_of(None, [], None, allow_unseen=True),
        "--columns and --literals": lambda: request_of(None, [], "umls", to=8, columns="head,tail,relation"),
        "name head, relation and tail once each": lambda: request_of(None, [], file, to=8, columns="head,tail"),
        "--bits 5: allowed are 1, 2, 3, 4, 8, 16, 32": lambda: request_of(None, [], file, to=8, bits=5),
        "add --to": lambda: request_of(None, [], file, bits=4, budget=Budget(max_mb=2)),
        "--to 0": lambda: request_of(None, [], file, to=0),
        "--max-mb 0": lambda: request_of(None, [], file, budget=Budget(max_mb=0.0)),
        "--max-ms-per-query nan": lambda: request_of(None, [], file, budget=Budget(max_ms=float("nan"))),
        "--min-retained 95": lambda: request_of(None, [], file, budget=Budget(min_retained=95.0)),
    }.items():
        with pytest.raises(ConfigError) as error:
            call()
        assert words in str(error.value)


def test_device_and_threads_are_known_before_the_graph(file: str) -> None:
    request = request_of(None, ["threads=3", "device=cpu", "teacher.dim=8"], file, to=8)
    assert request is not None and (request.machine().threads, request.machine().device) == (3, "cpu")
    with pytest.raises(ConfigError, match="device"):
        DistillRequest(file, 8, overrides=["device=gpu"]).machine()
