"""One command on a small file of triples: split, forecast, trained, judged; and that nothing is left of what fails."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.models.model_folder import load_model
from distkgd.pipeline.autoconfig import NOT_REACHABLE, Budget, Outcome, request_of, rules, run_config, run_own
from distkgd.pipeline.config import load_config
from distkgd.reporting.run_report import RunReport, read_report
from tests.launches import distil
from tests.own_graphs import own_triples, write_tsv
from tests.test_launch import assert_one_line_error, launch

QUICK = ["device=cpu", "threads=1", "mlflow.enabled=false", "student.epochs=3"]
QUICK_TO = [*QUICK, "teacher.epochs=3", "teacher.dim=16"]
QUICK_CROPS = [*QUICK, "student.dim=16", "student.distill.dims={from: 4, to: 16, step: 4}"]


@pytest.fixture(scope="module", autouse=True)
def few_epochs() -> Iterator[None]:
    """Of a student or direct model that begins at random, where no override says how many: one more than of others."""
    with patch.object(rules, "STUDENT_EPOCHS", (4, 4)):
        yield


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


def test_a_budget_is_met_by_few_bits_that_are_taught_and_stand_beside_a_direct_model_of_them(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = Budget(max_mb=1, max_ms=1000, min_retained=0.01)
    outcome = go(file, tmp_path / "run", QUICK_CROPS, budget=budget)
    said = capsys.readouterr().err.partition("student: one rank")[0]
    assert "student_few_bits: complex, 16 numbers per entity of 2 bits, bkd, taught by student; 1 epochs" in said
    assert "choice: up to 6 rounded sizes ranked; time about" in said
    report = outcome.report
    assert outcome.code == 0 and report is not None and report.budget is not None
    verdict = report.budget
    assert (verdict.chosen, verdict.bits) == (4, 1)  # all that has any MRR will do
    _, taught, *rounded, direct = report.stages
    assert (taught.name, taught.method, taught.bits, taught.relation_bits) == ("student_4_1bit", "bkd", 1, 4)
    assert taught.teachers == ("student",) and (direct.dim, direct.bits, direct.relation_bits) == (4, 1, 4)
    assert direct.bytes == taught.bytes
    (merely,) = (mrr for one in verdict.sizes if (mrr := one.valid) and (one.dim, one.bits) == (4, 1))
    chosen = report.stage(verdict.stage or "")
    assert chosen is not None and chosen.mrr("valid") == merely
    better = max((taught, *rounded), key=lambda stage: stage.mrr("valid") or 0.0)
    assert chosen is better
    exported = sum(path.stat().st_size for path in (tmp_path / "run/stages" / chosen.name / "model").rglob("*.*"))
    (size,) = (one.bytes for one in verdict.sizes if (one.dim, one.bits) == (4, 1))
    assert size - 4096 < exported <= size
    assert [one.dim for one in verdict.sizes if one.bits == 32] == [4, 8, 12, 16]
    (remark,) = [remark for remark in report.remarks if remark.startswith("Budget")]
    assert "met; 4 numbers per entity of 1 bit" in remark and "merely rounded" in remark
    asked = ("--relation", "r00", "--head", own_triples(1500, 150, 6)[0][0])
    done = launch(tmp_path, "predict", f"run/stages/{chosen.name}", *asked)
    assert done.returncode == 0, done.stderr
    with patch("distkgd.pipeline.autoconfig.sizes.query_ms", lambda *_: 1e-9):  # which would choose otherwise
        again = go(file, tmp_path / "run", QUICK_CROPS, resume=True, budget=budget)
    assert figures(again.report) == figures(report) and again.report is not None and again.report.budget == verdict


def test_the_better_of_taught_and_merely_rounded_is_the_student(file: Path, tmp_path: Path) -> None:
    harm = {"start": "crop", "epochs": 1, "validate_every": 1, "optimizer": {"name": "adagrad", "lr": 50.0}}
    with patch("distkgd.pipeline.autoconfig.rules._from_rows", lambda _: harm):
        outcome = go(file, tmp_path / "run", QUICK_CROPS, budget=Budget(min_retained=0.01))
    report = outcome.report
    assert report is not None and report.budget is not None and report.budget.stage == "rounded_4_1bit"
    _, taught, rounded, _ = report.stages
    assert (rounded.name, rounded.method, rounded.bits, rounded.row_bytes) == ("rounded_4_1bit", "rounded", 1, 3)
    assert (rounded.mrr("valid") or 0.0) > (taught.mrr("valid") or 0.0) and report.student is rounded
    (looked,) = (one for one in report.budget.sizes if (one.dim, one.bits) == (4, 1))
    assert (looked.valid, looked.test) == (rounded.mrr("valid"), rounded.mrr("test"))
    assert any("merely rounded, exported to" in remark for remark in report.remarks)


def test_a_budget_that_allows_full_precision_is_met_by_a_crop_of_it(file: Path, tmp_path: Path) -> None:
    outcome = go(file, tmp_path / "run", QUICK_CROPS, budget=Budget(max_mb=1))
    report = outcome.report
    assert outcome.code == 0 and report is not None and report.budget is not None
    student, crop, direct = report.stages
    verdict = report.budget
    assert verdict.bits == 32 and len(verdict.sizes) == 4 and verdict.stage == crop.name == f"student_{verdict.chosen}"
    assert crop.valid == student.curve["valid"][crop.dim] and crop.dim == direct.dim and direct.bits == 32
    assert any("the first of 16 numbers" in remark for remark in report.remarks)
    assert not (tmp_path / "run/stages/student_few_bits").exists()


def test_a_budget_out_of_reach_is_said_with_the_best_and_a_code_of_its_own(file: Path, tmp_path: Path) -> None:
    request = request_of(None, QUICK_CROPS, str(file), budget=Budget(max_mb=0.009))
    assert request is not None
    request = replace(request, budget=Budget(max_mb=0.009, min_retained=5.0))
    outcome = run_own(request, Ranks(), Display(True), tmp_path / "run")
    assert outcome.code == NOT_REACHABLE == 3 and outcome.report is not None
    assert (
        outcome.report.budget is not None
        and not outcome.report.budget.met
        and next(iter(figures(outcome.report))) == "student"
    )
    (remark,) = [remark for remark in outcome.report.remarks if remark.startswith("Budget")]
    assert "not reachable; best was" in remark and "at least 500%" in remark
    assert not (tmp_path / "run" / "stages" / "direct").exists()


def test_what_no_training_can_reach_is_said_before_it_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    for how in ({"to": 8}, {}):
        overrides = QUICK_TO if how else QUICK_CROPS
        for budget in (Budget(max_mb=0.001), Budget(max_ms=1e-6)):
            outcome = go(file, tmp_path / "run", overrides, budget=budget, **how)
            assert outcome.code == NOT_REACHABLE and outcome.report is None
    assert files_in(tmp_path) == set()


def test_what_the_bytes_of_a_student_would_carry_is_said_beside_it(file: Path, tmp_path: Path) -> None:
    report = go(file, tmp_path / "run", [*QUICK_TO, "report.rounded=[8]"], to=8).report
    assert report is not None
    teacher, student, _ = report.stages
    assert teacher.bytes_per_entity is not None and student.bytes_per_entity is not None
    assert set(teacher.rounded) == {8, 16}  # 16 numbers of 16 bits are as large as 8 of 32
    merely = teacher.rounded[16]
    (remark,) = [remark for remark in report.remarks if remark.startswith("The same bytes")]
    assert f"16 numbers merely rounded to 16 bits take {merely.bytes / 150:.1f} bytes per entity" in remark
    assert f"student: {student.bytes_per_entity:.1f}" in remark and merely.bytes <= 1.05 * student.bytes
    assert f"valid MRR {merely.mrr('valid'):.3f}, test MRR {merely.mrr('test'):.3f}" in remark
    assert remark.endswith("--to 16 --bits 16 teaches them.") and remark in (tmp_path / "run/report.md").read_text()


def test_a_croppable_teacher_of_elsewhere_is_shown_in_fewer_numbers_too(file: Path, tmp_path: Path) -> None:
    go(file, tmp_path / "first", QUICK_CROPS, budget=Budget(max_mb=1))
    path = tmp_path / "first/stages/student"
    report = go(file, tmp_path / "run", [*QUICK, f"teacher={path}"], to=4, bits=2).report
    assert report is not None and report.stages[0].source is not None
    assert set(report.stages[0].rounded) == {1} and report.stage("student") == report.student
    (remark,) = [remark for remark in report.remarks if remark.startswith("The same bytes")]
    assert "16 numbers merely rounded to 1 bits" in remark  # nothing is as small as 4 numbers of 2 bits
    croppable = ["teacher.method=med", "teacher.dim=16", "teacher.epochs=2", "teacher.distill.dims=[8, 16]", *QUICK]
    report = go(file, tmp_path / "crops", croppable, to=8).report
    assert report is not None
    (remark,) = [remark for remark in report.remarks if remark.startswith("The same bytes")]
    crop = report.stages[0].curve["test"][8]["mrr"]
    assert "Its first 8 numbers as they are take" in remark and remark.endswith(f"test MRR {crop:.3f}.")


def test_a_student_of_few_bits_is_asked_for_by_two_flags(file: Path, tmp_path: Path) -> None:
    outcome = go(
        file,
        tmp_path / "run",
        [*QUICK, "teacher.epochs=3"],
        to=128,
        bits=2,
        budget=Budget(max_mb=0.03, min_retained=0.001),
    )
    report = outcome.report
    assert outcome.code == 0 and report is not None and report.budget is not None
    teacher, student, direct = report.stages
    assert (teacher.dim, student.dim, student.bits, student.relation_bits) == (128, 128, 2, 4)
    assert (direct.dim, direct.bits, direct.bytes) == (128, 2, student.bytes)
    tree = yaml.safe_load((tmp_path / "run/config.yaml").read_text(encoding="utf-8"))
    assert tree["student"]["start"] == "crop" and tree["name"] == "my_graph_128_2bit"
    assert tree["baseline"]["epochs"] > tree["student"]["epochs"] == 3
    verdict = report.budget
    assert (verdict.chosen, verdict.bits, verdict.stage) == (128, 2, "student")
    assert student.bytes - 2000 < verdict.sizes[0].bytes - 4096 < 30_000 - 4096
    (remark,) = [remark for remark in report.remarks if remark.startswith("The same bytes")]
    assert "128 numbers merely rounded to 2 bits" in remark and remark.endswith("student is these, taught.")


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
        (["student.bits=2"], {"budget": Budget(max_mb=1)}, "chooses the bits itself"),
        (["student.distill.bits=[1, 2]"], {"budget": Budget(max_mb=1)}, "chooses the bits itself"),
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
