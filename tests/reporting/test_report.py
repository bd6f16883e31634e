"""The report: figures checked against numbers worked out by hand."""

import io
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from distkgd.common.console import Display
from distkgd.common.files import write_atomic
from distkgd.errors import ModelError, StorageError
from distkgd.models.run_paths import RESULT
from distkgd.models.stage_result import read_result
from distkgd.reporting.report import HEADER, difference, markdown, notes, rows, show, table, write_report
from distkgd.reporting.run_report import read_report
from tests.records import RUN, report_of


def _split(mrr: float) -> dict[str, float]:
    return {"mrr": mrr, "hits_at_1": mrr - 0.1, "hits_at_3": mrr + 0.05, "hits_at_10": mrr + 0.15}


def _stage(name, method, dim, size, teachers, valid, test):
    return {
        "name": name,
        "method": method,
        "scorer": "complex",
        "dim": dim,
        "bytes": size,
        "num_parameters": size // 4,
        "teachers": teachers,
        "seconds": 12.34,
        "steps": 100,
        "triples_per_second": 5000.0,
        "valid": _split(valid),
        "test": _split(test),
    }


def _report() -> dict:
    return {
        "data": {
            "name": "wn18rr",
            "sha256": "0123456789abcdef" * 4,
            "num_entities": 40943,
            "num_relations": 11,
            "num_train": 86835,
            "num_valid": 3034,
            "num_test": 3134,
        },
        "protocol": {
            "filter": "filtered",
            "candidates": "all",
            "ties": "realistic",
            "directions": "both",
            "unseen": "kept",
        },
        "world": 2,
        "device": "cpu",
        "stages": [
            _stage("teacher", "direct", 256, 41_943_040, [], 0.480, 0.475),
            _stage("student", "dualde", 32, 5_242_880, ["teacher"], 0.431, 0.428),
            _stage("direct", "direct", 32, 5_242_880, [], 0.410, 0.410),
        ],
    }


def _cell(report: dict, stage: str, column: str) -> str:
    row = next(row for row in rows(report_of(report)) if row[0] == stage)
    return row[HEADER.index(column)]


def _drawn(report: dict, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table(report_of(report)))
    return out.getvalue()


def test_the_student_keeps_its_share_of_the_teachers_test_mrr_and_of_its_bytes():
    report = _report()
    assert _cell(report, "student", "retained") == "90.1%"  # 0.428 / 0.475 = 0.90105
    assert _cell(report, "student", "smaller") == "8.0×"  # 41 943 040 / 5 242 880
    assert _cell(report, "student", "size") == "5.2 MB"
    assert _cell(report, "student", "valid MRR") == "0.431"
    assert _cell(report, "student", "test MRR") == "0.428"
    assert [_cell(report, "student", f"H@{k}") for k in (1, 3, 10)] == ["0.328", "0.478", "0.578"]
    assert _cell(report, "student", "seconds") == "12.3"


def test_the_teacher_has_no_share_and_the_direct_model_is_measured_against_the_teacher():
    report = _report()
    assert _cell(report, "teacher", "retained") == "–"
    assert _cell(report, "teacher", "smaller") == "–"
    assert _cell(report, "direct", "retained") == "86.3%"  # 0.410 / 0.475 = 0.86316
    assert _cell(report, "direct", "smaller") == "8.0×"


def test_a_chain_is_measured_against_its_head_like_the_direct_model_beside_it():
    report = _report()
    report["stages"].insert(1, _stage("assistant", "kd", 64, 10_485_760, ["teacher"], 0.460, 0.450))
    report["stages"][2]["teachers"] = ["assistant"]
    assert _cell(report, "assistant", "smaller") == "4.0×"
    assert _cell(report, "student", "smaller") == _cell(report, "direct", "smaller") == "8.0×"
    assert _cell(report, "student", "retained") == "90.1%"
    assert not any(
        note.startswith("assistant") for note in notes(report_of(report))
    )  # nothing of its dim, nothing owed


def test_the_first_of_several_teachers_is_the_one_measured_against():
    report = _report()
    report["stages"].insert(1, _stage("other", "direct", 128, 20_971_520, [], 0.4, 0.4))
    report["stages"][2]["teachers"] = ["other", "teacher"]
    assert _cell(report, "student", "smaller") == "4.0×"
    assert _cell(report, "student", "retained") == "107.0%"  # 0.428 / 0.4


def test_a_teacher_that_is_no_stage_of_this_plan_gives_no_share():
    report = _report()
    report["stages"][1]["teachers"] = ["elsewhere"]
    assert _cell(report, "student", "retained") == "–"


def test_each_student_stands_beside_the_direct_model_of_its_dim_in_a_sentence():
    assert "student − direct: +0.021 valid MRR, +0.018 test MRR (one seed)." in notes(report_of(_report()))


def test_a_loss_against_the_direct_model_is_told_with_a_minus_and_a_tie_with_plus_zero():
    report = _report()
    report["stages"][1]["valid"]["mrr"] = 0.400
    report["stages"][1]["test"]["mrr"] = 0.4099
    assert "student − direct: −0.010 valid MRR, +0.000 test MRR (one seed)." in notes(report_of(report))


def test_biases_stand_beside_the_dim():
    report = _report()
    report["stages"][1]["biases"] = 1
    report["stages"][2]["biases"] = 0
    assert [row[HEADER.index("dim")] for row in rows(report_of(report))] == ["256", "32+1", "32"]


def test_a_student_without_a_direct_model_of_its_dim_is_said_to_lack_one():
    report = _report()
    report["stages"][2]["dim"] = 64
    assert any(note.startswith("student: no directly trained model of dim 32") for note in notes(report_of(report)))


def test_several_direct_models_are_matched_by_dim():
    report = _report()
    report["stages"][2]["name"] = "direct-32"
    report["stages"].append(_stage("direct-64", "direct", 64, 10_485_760, [], 0.3, 0.3))
    assert "student − direct-32: +0.021 valid MRR, +0.018 test MRR (one seed)." in notes(report_of(report))


def test_the_protocol_and_the_data_stand_below_the_table():
    protocol, data = notes(report_of(_report()))[:2]
    assert protocol == (
        "Protocol: filter: filtered, candidates: all, ties: realistic, directions: both, unseen: kept; "
        "world: 2, device: cpu; H@k are test figures."
    )
    assert data == (
        "Data: wn18rr (sha256 0123456789ab): 40,943 entities, 11 relations, "
        "triples: 86,835 train, 3,034 valid, 3,134 test."
    )


def test_markdown_and_terminal_show_the_same_cells_and_sentences():
    report = _report()
    text, drawn = markdown(report_of(report)), _drawn(report, width=300)
    for row in rows(report_of(report)):
        assert "| " + " | ".join(row) + " |" in text
        assert " ".join(row).split() in [line.split() for line in drawn.splitlines()]
    for note in notes(report_of(report)):
        assert note in text
        assert " ".join(note.split()) in " ".join(drawn.split())


def test_the_terminal_table_fits_100_columns_and_loses_no_figure_there():
    report = _report()
    report["stages"][1]["name"] = "student-of-a-rather-long-name"
    report["stages"][1]["method"] = "dualde-with-two-phases"
    report["stages"][1]["scorer"] = "tucker-with-relations"
    report["stages"][1]["seconds"] = 123456.7
    report["stages"][0]["bytes"] = 999_900_000_000
    drawn = _drawn(report)
    assert max(len(line.rstrip()) for line in drawn.splitlines()) <= 100
    assert "…" not in drawn
    for row in rows(report_of(report)):
        for cell in row[3:]:
            assert cell in drawn


def test_names_with_markup_characters_are_shown_as_they_are():
    report = _report()
    report["stages"][1]["name"] = "a[b]|c"
    report["stages"][1]["method"] = "[red]"
    assert "a[b]|c" in _drawn(report)
    assert "[red]" in _drawn(report)
    assert "| a[b]\\|c |" in markdown(report_of(report))


def test_a_stage_without_figures_yet_shows_dashes():
    report = _report()
    report["stages"] = [{"name": "student", "method": "dualde", "teachers": ["teacher"], "dim": 32}]
    assert rows(report_of(report)) == [["student", "dualde", "complex", "32", "9 B", *["–"] * (len(HEADER) - 5)]]
    assert "student" in markdown(report_of(report))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2_500_000_000, "2.5 GB"),
        (3_000_000_000_000, "3.0 TB"),
    ],
)
def test_sizes_are_told_in_decimal_units(size, text):
    report = _report()
    report["stages"][0]["bytes"] = size
    assert _cell(report, "teacher", "size") == text


def test_write_report_keeps_every_key_and_leaves_no_temporary_file(tmp_path: Path):
    report = RUN | _report() | {"extra": {"nested": [1, 2, "drei · 3"]}}
    report["stages"][1]["triples_per_second"] = 5000.5
    report["stages"][2] |= {"joules": None, "of_a_method": [0.5], "curve": {"valid": {"8": _split(0.3)}}}
    write_report(tmp_path / "run", report_of(report))
    text = (tmp_path / "run" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert text.startswith('{\n  "name": "toy",\n  "data": {\n')
    assert "drei · 3" in text
    assert read_report(tmp_path / "run") == report_of(report)
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == markdown(report_of(report))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.json", "report.md"]


def test_a_result_is_read_as_it_was_written_and_a_damaged_one_is_named(tmp_path: Path):
    brought = report_of({"stages": [{"name": "teacher", "source": "elsewhere"}]}).stages
    (row,) = report_of({"stages": [{"curve": {"valid": {8: {"mrr": 0.5}}}, "teachers": ["elsewhere"]}]}).stages
    result = row.model_copy(update={"brought": brought, "digest": "d"})
    result.write(tmp_path)
    assert read_result(tmp_path) == result
    assert not {"brought", "digest"} & result.to_json().keys()  # which are for result.json alone
    whole = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
    for key, value in (("dim", "many"), ("digest", None), ("teachers", None)):
        (tmp_path / RESULT).write_text(json.dumps(whole | {key: value}), encoding="utf-8")
        with pytest.raises(ModelError, match=rf"result\.json is damaged \({key}: .*train it again"):
            read_result(tmp_path)


def test_a_result_cannot_be_changed():
    (row,) = report_of({"stages": [{}]}).stages
    with pytest.raises(ValidationError, match="frozen"):
        row.dim = 9


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_write_that_is_broken_off_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    file = tmp_path / "file.txt"
    write_atomic(file, "earlier")
    inode = file.stat().st_ino

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken, pytest.raises(StorageError, match="cannot be written: disk full"):
        broken.setattr(*(("os.fsync", fail) if moment == "write" else (Path, "replace", fail)))
        write_atomic(file, "later")
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]
    write_atomic(file, "later")
    assert file.read_text() == "later"
    assert file.stat().st_ino != inode  # another file took the name; the earlier was never written into


def test_a_difference_is_that_of_the_figures_that_stand_beside_it():
    assert difference(0.4004, 0.3896, "test") == "+0.010 test MRR"  # 0.400 − 0.390, though 0.0108 is nearer to 0.011


def test_the_printed_table_has_the_crops_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _report()
    report["stages"][1]["curve"] = {"valid": {8: _split(0.313)}, "test": {8: _split(0.297)}}
    show(report_of(report), tmp_path, Display(False))
    said = capsys.readouterr().out
    (row,) = (line.split() for line in said.partition("Crops of student")[2].splitlines() if "0.313" in line)
    assert row[0] == "8" and "0.297" in row
