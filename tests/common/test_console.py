"""What a person at the terminal sees, and what nobody sees."""

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
