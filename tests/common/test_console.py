"""What a person at the terminal sees, and what nobody sees."""

import re
from pathlib import Path

import pytest

from distkgd.common import console
from distkgd.common.console import Display


@pytest.mark.parametrize("active", [True, False])
def test_a_bar_that_nobody_sees_is_never_made(
    active: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "Progress", None)
    with Display(active).bar("student", 3) as move:  # standard error is no terminal here
        move(1)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_shows_name_and_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with Display(True).bar("student", 3) as move:
        move(2)
    shown = capsys.readouterr().err
    assert "student" in shown and "2/3" in shown


def test_lines_of_a_run_are_kept_with_the_time_and_what_ended_it_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other, log = Display(False), Display(False), tmp_path / "run.log"
    first.line("before there was a folder")
    with pytest.raises(ZeroDivisionError), first.kept(log, 0), other.kept(log, 1):
        first.line("größer [bold]")
        other.line("of another rank")
        raise ZeroDivisionError("here")
    with pytest.raises(ValueError), Display(True).kept(log, 0):  # which goes on with it
        raise ValueError("again")
    text = log.read_text(encoding="utf-8")
    stamp = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    for words in ("before there was a folder", r"größer \[bold\]", r"rank 1: Traceback", r"rank 0: Traceback"):
        assert re.search(stamp + words, text, re.MULTILINE), text
    assert "another rank" not in text and text.count("ZeroDivisionError: here") == 2 and "ValueError: again" in text
    assert capsys.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(True)
    with display.kept(tmp_path / "nowhere/run.log", 0):
        display.line("one")
        display.line("two")
    said = capsys.readouterr().err
    assert said.count("no longer kept") == 1 and re.search(r"^\d\d:\d\d:\d\d two$", said, re.MULTILINE)
