"""One command on a small file of triples: split, forecast, trained, judged; and that nothing is left of what fails."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.models.model_folder import load_model
from distkgd.pipeline.autoconfig import NOT_REACHABLE, Budget, Outcome, request_of, run_config, run_own
from distkgd.pipeline.config import load_config
from distkgd.reporting.run_report import RunReport, read_report
from tests.launches import distil
from tests.own_graphs import own_triples, write_tsv
from tests.test_launch import assert_one_line_error, launch

QUICK = ["device=cpu", "threads=1", "mlflow.enabled=false", "student.epochs=3"]
QUICK_TO = [*QUICK, "teacher.epochs=3", "teacher.dim=16"]
QUICK_CROPS = [*QUICK, "student.dim=16", "student.distill.dims={from: 4, to: 16, step: 4}"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = own_triples(1500, 150, 6)
    rows += [(t, "back", h) for h, r, t in rows if r == "r00"]
    return write_tsv(tmp_path_factory.mktemp("own") / "my graph.tsv", rows)


def go(file: Path, out: Path, overrides: list[str], *, resume: bool = False, **how: Any) -> Outcome:
    request = request_of(None, overrides, str(file), **how)
    assert request is not None
    return run_own(request, Ranks(), Display(True), out, resume)


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "mine"
    assert go(file, out, QUICK_TO, to=8).code == 0
    return out


def figures(report: RunReport | None) -> dict[str, tuple[float | None, float | None]]:
    assert report is not None
    return {stage.name: (stage.mrr("valid"), stage.mrr("test")) for stage in report.stages}


def test_the_plan_and_what_it_takes_are_said_before_anything_is_trained(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = go(file, tmp_path / "run", QUICK_TO, to=8)
    said = capsys.readouterr().err
    before, trained, after = said.partition("teacher: one rank")
    assert trained
    for stage, words in (("teacher", "16 numbers"), ("student", "8 numbers"), ("direct", "8 numbers")):
        (line,) = [line for line in before.splitlines() if line.startswith(f"{stage}: ")]
        assert words in line and "memory" in line and "time about" in line and "3 epochs" in line
        assert f"{stage}: done in" in after
    assert "in all about" in before and "leakage" in before and "'back'" in before
    assert outcome.report is not None
    assert any("leakage" in remark for remark in outcome.report.remarks)
    assert list(figures(outcome.report)) == ["teacher", "student", "direct"]


def test_the_run_folder_holds_the_split_and_the_config_of_its_run(file: Path, finished: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (finished / "data" / "my_graph").iterdir()) == [
        "split.json",
        "test.tsv",
        "train.tsv",
        "valid.tsv",
    ]
    tree = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    assert tree["teacher"]["dim"] == 16 and tree["student"]["dim"] == 8 and tree["student"]["method"] == "bkd"
    config = load_config(finished / "config.yaml")
    again = run_config(config, Ranks(), Display(False), tmp_path / "again")
    assert figures(again.report) == figures(read_report(finished))


def test_a_finished_command_is_resumed_without_training_and_refused_without_resume(
    file: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        go(file, finished, QUICK_TO, to=8)
    report = read_report(finished)
    assert figures(go(file, finished, QUICK_TO, to=8, resume=True).report) == figures(report)
    assert capsys.readouterr().err.count("finished before") == 3
    by_config = run_config(load_config(finished / "config.yaml"), Ranks(), Display(False), finished, resume=True)
    assert figures(by_config.report) == figures(report)
    with pytest.raises(ConfigError, match="another plan"):
        go(file, finished, QUICK_TO, to=6, resume=True)
    with pytest.raises(ConfigError, match="the data or its split"):
        go(file, finished, QUICK_TO, to=8, resume=True, seed=5)


def test_another_method_does_not_inherit_the_options_of_the_chosen_one(file: Path, tmp_path: Path) -> None:
    outcome = go(file, tmp_path / "run", [*QUICK_TO, "student.method=dualde", "student.epochs=1"], to=8)
    assert outcome.code == 0 and outcome.report is not None
    assert outcome.report.student.method == "dualde"


def test_a_folder_is_not_split_again(finished: Path, tmp_path: Path) -> None:
    outcome = go(finished / "data" / "my_graph", tmp_path / "run", QUICK_TO, to=8)
    assert not (tmp_path / "run" / "data").exists()
    assert figures(outcome.report) == figures(read_report(finished))


def test_a_budget_is_met_by_a_crop_that_stands_beside_a_direct_model(file: Path, tmp_path: Path) -> None:
    outcome = go(file, tmp_path / "run", QUICK_CROPS, budget=Budget(max_mb=1, max_ms=1000, min_retained=0.01))
    report = outcome.report
    assert outcome.code == 0 and report is not None and report.budget is not None
    assert report.budget.chosen == 4 and [one.dim for one in report.budget.sizes] == [4, 8, 12, 16]
    assert list(figures(report)) == ["student", "student_4", "direct"]
    student, crop, direct = report.stages
    assert crop.valid == student.curve["valid"][4]
    assert crop.dim == direct.dim == 4
    assert any("met; the first of 16 numbers" in remark for remark in report.remarks)
    exported = sum(
        path.stat().st_size for path in (tmp_path / "run" / "stages" / "student_4").rglob("*") if path.is_file()
    )
    said = report.budget.sizes[0].bytes
    assert said - 4096 < exported <= said
    done = launch(
        tmp_path, "predict", "run/stages/student_4", "--relation", "r00", "--head", own_triples(1500, 150, 6)[0][0]
    )
    assert done.returncode == 0, done.stderr
    again = go(
        file, tmp_path / "run", QUICK_CROPS, resume=True, budget=Budget(max_mb=1, max_ms=1000, min_retained=0.01)
    )
    assert figures(again.report) == figures(report)


def test_a_budget_out_of_reach_is_said_with_the_best_and_a_code_of_its_own(file: Path, tmp_path: Path) -> None:
    outcome = go(file, tmp_path / "run", QUICK_CROPS, budget=Budget(max_mb=0.009, min_retained=0.999))
    assert outcome.code == NOT_REACHABLE == 3 and outcome.report is not None
    assert (
        outcome.report.budget is not None
        and not outcome.report.budget.met
        and list(figures(outcome.report)) == ["student"]
    )
    (remark,) = [remark for remark in outcome.report.remarks if remark.startswith("Budget")]
    assert "not reachable; best was" in remark and "at least 99.9%" in remark
    assert not (tmp_path / "run" / "stages" / "direct").exists()


def test_what_no_training_can_reach_is_said_before_it_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    for how in ({"to": 8}, {}):
        overrides = QUICK_TO if how else QUICK_CROPS
        for budget in (Budget(max_mb=0.001), Budget(max_ms=1e-6)):
            outcome = go(file, tmp_path / "run", overrides, budget=budget, **how)
            assert outcome.code == NOT_REACHABLE and outcome.report is None
    assert files_in(tmp_path) == set()


def test_a_student_of_a_given_size_is_held_to_the_budget(file: Path, tmp_path: Path) -> None:
    met = go(file, tmp_path / "met", QUICK_TO, to=8, budget=Budget(max_mb=1, min_retained=0.001))
    worse = [*QUICK_TO, "student.optimizer.lr=0.0001", "student.distill.weight=0"]
    failed = go(file, tmp_path / "failed", worse, to=8, budget=Budget(max_mb=1, min_retained=1.0))
    assert (met.code, failed.code) == (0, NOT_REACHABLE)
    assert met.report is not None and any("Budget" in remark and "met" in remark for remark in met.report.remarks)
    assert list(figures(failed.report)) == ["teacher", "student", "direct"]


@pytest.mark.parametrize(
    ("overrides", "how", "words"),
    [
        (["student.epoch=3"], {"to": 8}, "no such option"),
        (["teacher.dim=6", "student.start=crop"], {"to": 8}, "student.start"),
        (["student.method=scratch"], {"budget": Budget(max_mb=1)}, "student.method"),
        (["teacher=null", "student.method=scratch"], {"to": 8, "budget": Budget(min_retained=0.5)}, "--min-retained"),
        ([], {"to": 7}, "Use 8"),
    ],
)
def test_what_is_refused_leaves_nothing(
    file: Path, tmp_path: Path, overrides: list[str], how: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as error:
        go(file, tmp_path / "run", [*QUICK, *overrides], **how)
    assert words in str(error.value)
    assert files_in(tmp_path) == set()


def test_the_launcher_ends_with_the_report_and_its_errors_are_one_line(file: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, "distill", *QUICK_TO, "--data", file, "--to", "8")
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout and "direct" in done.stdout and "leakage" in done.stdout
    assert (tmp_path / "runs" / "my_graph_8" / "report.md").is_file()
    broken = tmp_path / "broken.tsv"
    broken.write_bytes(b"a\tr\tb\nc\tr\n")
    before = files_in(tmp_path)
    assert_one_line_error(launch(tmp_path, "distill", "--data", "broken.tsv", "--to", "8"), "broken.tsv, line 2")
    assert_one_line_error(launch(tmp_path, "distill", "--data", file), "--to 32")
    assert files_in(tmp_path) == before
    unreachable = launch(tmp_path, "distill", "--data", file, "--max-mb", "0.0001", *QUICK)
    assert unreachable.returncode == NOT_REACHABLE and "not reachable" in unreachable.stderr


def test_a_config_file_may_have_one_file_split_for_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("student: {dim: 4, epochs: 2, batch_size: 100}\n", encoding="utf-8")
    request = request_of(tmp_path / "small.yaml", QUICK[:3], str(file))
    assert request is not None
    outcome = run_own(request, Ranks(), Display(False), tmp_path / "run")
    assert list(figures(outcome.report)) == ["student"]
    assert (tmp_path / "run" / "data" / "my_graph" / "train.tsv").is_file()


def test_a_folder_in_another_order_of_columns_is_trained_on_as_it_was_said(tmp_path: Path) -> None:
    rows = own_triples(400, 40, 3)
    (tmp_path / "my[1]").mkdir()
    for split, part in (("train", rows), ("dev", rows[:40])):
        text = "".join(f"{h}\t{t}\t{r}\n" for h, r, t in part)
        (tmp_path / "my[1]" / f"{split}.tsv").write_text(text, encoding="utf-8")
    (tmp_path / "small.yaml").write_text("student: {dim: 4, epochs: 1, batch_size: 100}\n", encoding="utf-8")
    request = request_of(tmp_path / "small.yaml", QUICK[:3], str(tmp_path / "my[1]"), columns="head,tail,relation")
    assert request is not None
    outcome = run_own(request, Ranks(), Display(False), tmp_path / "run[1]")
    assert outcome.report is not None and outcome.report.data.num_relations == 3
    loaded = load_model(
        tmp_path / "run[1]" / "stages" / "student", Ranks()
    )  # names and labels are read from paths that look like patterns
    graph = load_graph(loaded.config["source"])
    assert graph.relations.names.to_list() == loaded.relations.names.to_list() and len(graph.valid) == 40


def test_two_ranks_split_and_train_the_same(file: Path, finished: Path, tmp_path: Path) -> None:
    code, text = distil([*QUICK_TO, "--data", file, "--to", "8", "--out", "run"], tmp_path, world=2)
    assert code == 0, text
    one, two = (read_report(run) for run in (finished, tmp_path / "run"))
    assert one.data == two.data and two.world == 2
    for name, pair in figures(one).items():
        assert figures(two)[name] == pytest.approx(pair, abs=5e-3)
