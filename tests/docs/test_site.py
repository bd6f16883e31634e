"""The documentation as a site: built without a warning, its docstrings as people read them."""

import logging
import os
from pathlib import Path

import pytest

from tests.launches import ROOT

mkdocs = pytest.importorskip("mkdocs")


def test_docstrings_become_code_and_lists() -> None:
    from docs.docstrings import page

    text = "One.\n\nk: how many.\n    At most 9. ids, rows: of what.\n\n>>> 1 + 1\n2"
    said = "- `k`: how many.\n    At most 9.\n- `ids, rows`: of what."
    assert page(text) == f"One.\n\n{said}\n\n```pycon\n>>> 1 + 1\n2\n```"


def test_the_site_is_built_without_a_warning_and_has_every_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    with caplog.at_level(logging.WARNING, "mkdocs"):
        build(load_config(os.fspath(ROOT / "mkdocs.yml"), site_dir=os.fspath(tmp_path / "site")))
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("mkdocs")]
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} - {"assets", "search"}
    shown = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert "predict_relation" in shown and '<span class="gp">' in shown  # prompts of doctests, which are code
