"""The launchers as a user runs them: a small data set in a folder, files and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distkgd.evaluation.ranking import protocol
from tests.launches import LAUNCH_SECONDS, ROOT, call, small_data
from tests.programs import started

CONFIG = """
device: cpu
threads: 1
mlflow: {enabled: false}
teacher: {dim: 16, epochs: 8, batch_size: 20, validate_every: 4}
student: {dim: 4, method: bkd, epochs: 8, batch_size: 20, validate_every: 4}
baseline: true
"""


def launch(cwd: Path, name: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """A launcher that has run in this process; results on stdout, talk and errors on stderr."""
    with pytest.MonkeyPatch.context() as mend:
        mend.chdir(cwd)
        mend.setenv("NO_COLOR", "1")
        mend.setenv("COLUMNS", "110")
        return subprocess.CompletedProcess(arguments, *call(name, arguments))


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a data set of some 60 triples, a config, and a finished run."""
    cwd = tmp_path_factory.mktemp("launch")
    data = small_data(cwd / "data", entities=12, relations=3, triples=80)
    (data / "names.tsv").write_text("e03\ttwin\ne04\ttwin\ne05\tsingle one\n", encoding="utf-8")
    (cwd / "small.yaml").write_text(CONFIG, encoding="utf-8")
    done = launch(cwd, "distill", "small.yaml", "--data", "./data", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "teacher" in done.stdout and "student" in done.stdout and "direct" in done.stdout
    return cwd


def assert_one_line_error(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """User errors are one line on stderr and exit code 2; results and tracebacks are nowhere."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and done.stdout == ""
    for word in words:
        assert word in line


def test_a_run_folder_holds_what_the_readme_says(place: Path) -> None:
    run = place / "run"
    for path in ("plan.yaml", "report.json", "report.md"):
        assert (run / path).is_file()
    for stage in ("teacher", "student", "direct"):
        for path in ("model/config.json", "model/entities.tsv", "model/relations.tsv", "metrics.jsonl", "checkpoint"):
            assert (run / "stages" / stage / path).exists()
    assert not list(place.glob("mlflow*")) and not list(place.glob("mlruns*"))


def test_evaluate_finds_the_figures_of_the_report(place: Path) -> None:
    done = launch(place, "evaluate", "run/stages/student", "--json", "out/test.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "out" / "test.json").read_text(encoding="utf-8"))
    (student,) = (stage for stage in report_of(place / "run")["stages"] if stage["name"] == "student")
    for name, value in student["test"].items():
        assert found["overall"][name] == pytest.approx(value, abs=1e-6)
    assert found["protocol"] == protocol() and found["split"] == "test"
    for word in ("overall", "tail asked", "head asked", "r0", "filter: filtered", f"{found['overall']['mrr']:.4f}"):
        assert word in done.stdout


def test_evaluate_obeys_its_options(place: Path) -> None:
    options = ("--split", "valid", "--ties", "pessimistic", "--filter", "raw", "--data", "./data", "--rare", "7")
    done = launch(place, "evaluate", "run/stages/student", *options, "--json", "valid.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "valid.json").read_text(encoding="utf-8"))
    assert (found["split"], found["protocol"]) == ("valid", protocol("pessimistic", "raw"))
    assert list(found["relation_frequency"]) == ["<7", ">=7"]
    (student,) = (stage for stage in report_of(place / "run")["stages"] if stage["name"] == "student")
    assert found["overall"]["mrr"] < student["valid"]["mrr"]


def test_evaluate_refuses_a_data_set_of_other_entities(place: Path) -> None:
    small_data(place / "other", entities=9, relations=3, triples=80, seed=1)
    assert_one_line_error(launch(place, "evaluate", "run/stages/student", "--data", "./other"), "other entities")


def test_predict_prints_ranked_answers_and_says_which_twin_it_took(place: Path) -> None:
    done = launch(place, "predict", "run/stages/student", "--head", "twin", "--relation", "R1", "--top", "12")
    assert done.returncode == 0, done.stderr
    assert "2 entities are called 'twin'" in done.stderr
    assert done.stdout.startswith("(twin [e0") and "train" in done.stdout and "single one" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]) == 12
    fresh = launch(
        place, "predict", "run/stages/student", "--head", "e03", "--relation", "r1", "--top", "12", "--exclude-known"
    )
    assert fresh.returncode == 0 and "train" not in fresh.stdout


def test_predict_names_the_nearest_spelling(place: Path) -> None:
    done = launch(place, "predict", "run/stages/student", "--tail", "singel one", "--relation", "r1")
    assert_one_line_error(done, "singel one", "'single one'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("small.yaml", "student.dimm=3"), ("student.dimm", "no such option", "dim,")),
        (("small.yaml", "--data", "./nowhere"), ("nowhere", "no such folder")),
        (("small.yaml", "--data", "./data", "--out", "run"), ("already holds a run", "--resume")),
    ],
    ids=["unknown key", "no data", "a folder that holds a run"],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(
    place: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line_error(launch(place, "distill", *arguments), *words)


def test_a_mistake_ends_a_fresh_process_in_the_same_way(place: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/distill.py"), "small.yaml", "student.dimm=3"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "110"}
    done = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False
    )
    assert_one_line_error(done, "student.dimm")


@pytest.mark.parametrize(
    ("name", "arguments", "printed", "told"),
    [
        ("evaluate", ("--split", "valid"), "overall", ""),
        ("predict", ("--head", "e03", "--relation", "r1", "--top", "3"), "e03", ""),
        ("export", ("exported", "--format", "numpy"), "", "written: exported (README.md, config.json, entities.tsv"),
    ],
)
def test_a_launcher_of_a_finished_run_is_a_program(
    place: Path, tmp_path: Path, name: str, arguments: tuple[str, ...], printed: str, told: str
) -> None:
    command = [str(ROOT / f"launch/{name}.py"), "run/stages/student", *arguments]
    files = tmp_path / "printed.txt", tmp_path / "said.txt"
    code = started(command, place, os.environ | {"NO_COLOR": "1"}, *files).wait(LAUNCH_SECONDS)
    out, err = (file.read_text(encoding="utf-8") for file in files)
    assert code == 0, err
    assert printed in out and told in " ".join(err.split()) and "Traceback" not in err


def test_a_run_says_how_far_it_is_and_keeps_it(place: Path) -> None:
    text = (place / "run/run.log").read_text(encoding="utf-8")
    for number, stage in enumerate(("teacher", "student", "direct"), 1):
        line = next(line for line in text.splitlines() if f"{stage} (stage {number} of 3): epoch 4/8 " in line)
        assert "loss " in line and "valid MRR " in line and "triples/s" in line and " left" in line
        assert ("all stages" in line) == (number < 3)
    assert "\x1b" not in text and "\r" not in text


def test_torchrun_is_told_what_ended_a_rank_and_where_its_log_lies(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    out = tmp_path / "run"
    done = launch(place, "distill", "small.yaml", "--data", "./data", "--out", out, "teacher.optimizer.lr=1e30")
    assert done.returncode == 2
    told = json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))["message"]
    assert (
        told["message"].startswith("rank 0: DivergedError: Stage teacher, ") and str(out / "run.log") in told["message"]
    )
    assert "py_callstack" not in told["extraInfo"]  # which torchrun would show in its place
    text = (out / "run.log").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text and "error: Stage teacher" in text
