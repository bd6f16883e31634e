"""Teachers that a run did not train: ranked, reported and doubted like all others."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distkgd.common.console import Display
from distkgd.data import Graph, load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.models.model_folder import bytes_on_disk, save_model
from distkgd.pipeline import foreign_reports
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.foreign_reports import seen_held_out, warnings_of, with_brought
from distkgd.pipeline.plan import run_plan
from distkgd.pipeline.stage_job import Run
from distkgd.reporting.report import HEADER
from tests.jobs import toy_model
from tests.launches import small_data
from tests.ranks import run_on_ranks
from tests.records import report_of
from tests.toys import toy_graph

SMALL: dict[str, Any] = {"batch_size": 100, "epochs": 2, "validate_every": 1, "optimizer": {"lr": 0.3}}
STUDENT = {**SMALL, "dim": 6, "method": "bkd"}


def taught_by(teacher: Path | str, graph: Graph, out: Path, ranks: Ranks | None = None, **more: Any) -> dict[str, Any]:
    """The report of a student of a model from elsewhere, and of the direct model beside it."""
    tree = {"teacher": str(teacher), "student": STUDENT, "baseline": True, "mlflow": {"enabled": False}}
    resume = bool(more.pop("resume", False))
    config = parse_config(tree | more, "test")
    return run_plan(config, graph, ranks or Ranks(), out, resume=resume, display=Display(False)).to_json()


def on_data(ranks: Ranks, teacher: str, data: str, out: str) -> dict[str, Any]:
    """`taught_by`, for rank processes."""
    return taught_by(teacher, load_graph(data), Path(out), ranks)


@pytest.fixture
def graph() -> Graph:
    return toy_graph()


@pytest.fixture
def elsewhere(graph: Graph, tmp_path: Path) -> Path:
    """A model that was trained on nothing, in a folder of its own."""
    save_model(tmp_path / "elsewhere", toy_model(graph, dim=12), graph, {"data": graph.summary()})
    return tmp_path / "elsewhere"


def test_it_has_a_row_of_its_own_and_the_others_are_measured_against_it(
    elsewhere: Path, graph: Graph, tmp_path: Path
) -> None:
    report = taught_by(elsewhere, graph, tmp_path / "run")
    teacher, student, direct = report["stages"]
    assert [teacher["name"], student["name"], direct["name"]] == ["teacher", "student", "direct"]
    assert (teacher["method"], teacher["scorer"], teacher["dim"]) == ("brought", "complex", 12)
    assert teacher["bytes"] == bytes_on_disk(elsewhere) and "seconds" not in teacher
    assert teacher["source"] == str(elsewhere) and student["teachers"] == ["teacher"]
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in text.splitlines() if row.startswith("| ")}
    kept_at = HEADER.index("retained")
    for row in (student, direct):
        kept = 100 * row["test"]["mrr"] / teacher["test"]["mrr"]
        assert cells[row["name"]][kept_at : kept_at + 2] == [
            f"{kept:.1f}%",
            f"{teacher['bytes'] / row['bytes']:.1f}×",
        ]
    assert (
        cells["teacher"][1] == "brought" and cells["teacher"][kept_at] == "–" and cells["teacher"][-1].startswith("–")
    )
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "of the teacher" in page and "The models could not be asked" not in page


def test_two_ranks_rank_it_as_one_does(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    graph = load_graph(str(data))
    save_model(tmp_path / "elsewhere", toy_model(graph, dim=12, dtype=torch.float32), graph, {"data": graph.summary()})
    where = {"teacher": str(tmp_path / "elsewhere"), "data": str(data)}
    (one,) = run_on_ranks(1, on_data, **where, out=str(tmp_path / "one"))
    two = run_on_ranks(2, on_data, **where, out=str(tmp_path / "two"))[0]
    assert one["stages"][0] == two["stages"][0] and one["stages"][0]["test"]["mrr"] > 0


def test_it_is_ranked_once_in_a_run_even_where_its_student_has_to_begin_again(
    elsewhere: Path, graph: Graph, tmp_path: Path
) -> None:
    first = taught_by(elsewhere, graph, tmp_path / "run")
    (tmp_path / "run/stages/student/result.json").unlink()
    with mock.patch.object(foreign_reports, "seen_held_out", side_effect=AssertionError("made again")):
        again = taught_by(elsewhere, graph, tmp_path / "run", resume=True)
        assert again["stages"][0] == first["stages"][0]
        assert taught_by(elsewhere, graph, tmp_path / "run", resume=True)["stages"] == again["stages"]


def test_its_test_triples_are_not_read_where_the_plan_leaves_them_unread(
    elsewhere: Path, graph: Graph, tmp_path: Path
) -> None:
    read: list[str] = []
    evaluate = Run.evaluate

    def noted(self: Run, model: Any, split: str, *how: Any) -> Any:
        read.append(split)
        return evaluate(self, model, split, *how)

    with mock.patch.object(Run, "evaluate", noted):
        report = taught_by(elsewhere, graph, tmp_path / "run", test=False)
    assert set(read) == {"valid"} and "test" not in report["stages"][0] and "valid_by" in report["stages"][0]


def test_several_have_the_names_that_the_plan_gives_them(elsewhere: Path, graph: Graph, tmp_path: Path) -> None:
    student = {**STUDENT, "method": "dualde"}
    teachers = {"ours": {**SMALL, "dim": 8}, "theirs": str(elsewhere)}
    tree = {"teachers": teachers, "student": student, "mlflow": {"enabled": False}}
    config = parse_config(tree, "test")
    report = run_plan(config, graph, Ranks(), tmp_path / "run", resume=False, display=Display(False)).to_json()
    assert [row["name"] for row in report["stages"]] == ["theirs", "ours", "student"]
    assert report["stages"][2]["teachers"] == ["ours", "theirs"]


def test_a_teacher_worse_than_the_direct_model_is_a_warning(elsewhere: Path, graph: Graph, tmp_path: Path) -> None:
    report = taught_by(elsewhere, graph, tmp_path / "run")
    teacher, _, direct = report["stages"]
    assert teacher["valid"]["mrr"] < direct["valid"]["mrr"]
    said = f"Warning: teacher (valid MRR {teacher['valid']['mrr']:.3f}) is worse than direct "
    said += f"({direct['valid']['mrr']:.3f})"
    for file in ("report.md", "report.html"):
        assert said in (tmp_path / "run" / file).read_text(encoding="utf-8")
    assert warnings_of(report_of(report))
    for mrr in (0.9, None):
        teacher["valid"]["mrr"] = mrr
        assert not warnings_of(report_of(report))


def write_data(folder: Path, graph: Graph, train: torch.Tensor, valid: torch.Tensor) -> Graph:
    folder.mkdir()
    e, r = graph.entities.name, graph.relations.name
    for split, triples in (("train", train), ("valid", valid), ("test", graph.test)):
        lines = (f"{e(h)}\t{r(k)}\t{e(t)}\n" for h, k, t in triples.tolist())
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return load_graph(str(folder))


def test_a_teacher_of_another_split_of_the_same_triples_is_a_warning(
    graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_data(tmp_path / "mine", graph, graph.train, graph.valid)
    theirs = write_data(tmp_path / "theirs", graph, torch.cat([graph.train, graph.valid[:7]]), graph.valid[7:])
    about = {"data": theirs.summary(), "source": str(tmp_path / "theirs")}
    save_model(tmp_path / "elsewhere", toy_model(theirs), theirs, about)
    assert seen_held_out(tmp_path / "elsewhere", theirs) == []
    told = "it was trained on 7 valid triples: its figures there are no measure"
    assert seen_held_out(tmp_path / "elsewhere", mine) == [told]
    config = parse_config(
        {"teacher": str(tmp_path / "elsewhere"), "student": STUDENT, "mlflow": {"enabled": False}}, "test"
    )
    report = run_plan(config, mine, Ranks(), tmp_path / "run", resume=False, display=Display(True)).to_json()
    assert f"warning: teacher: {told}" in capsys.readouterr().err
    assert f"Warning: teacher: {told}." in report["remarks"]
    assert f"Warning: teacher: {told}." in (tmp_path / "run/report.md").read_text(encoding="utf-8")
    (tmp_path / "theirs").rename(tmp_path / "gone")
    (unknown,) = seen_held_out(tmp_path / "elsewhere", mine)
    assert "which is not at hand: whether it has seen valid and test triples is not known" in unknown


def test_rows_without_such_teachers_stay_as_they_are() -> None:
    stages = report_of({"stages": [{"name": "teacher"}, {"name": "student", "teachers": ["teacher"]}]}).stages
    assert with_brought(stages) == list(stages)
