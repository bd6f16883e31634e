"""Every script of examples/ is run as a user would, from another folder, and every code cell of its notebooks."""

import json
import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.launches import small_data

EXAMPLES = ROOT / "examples"
# What each script must have said and left (of the one folder that it makes).
LEAVES = {
    "own_graph": ("figures and run/report.html", "run/report.html"),
    "ask": ("2 questions, 0 errors", "answers.parquet"),
    "few_bits": ("student", "run/stages/student/model/config.json"),
    "own_method": ("own_method:Match", "own_method_Match/report.html"),
    "growth": ("63 entities before, 75 after", "new/report.html"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is worked in, that of temporary files, and where Python looks for modules beside a script."""
    if not Path(os.environ.get("DISTKGD_DATA", "nowhere"), "nations").is_dir():  # no network: something of its form
        small_data(tmp_path.with_name(f"{tmp_path.name}_data") / "nations")
        monkeypatch.setenv("DISTKGD_DATA", f"{tmp_path}_data")
        monkeypatch.setattr("distkgd.data.datasets.public.SHA256", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_every_example_is_in_this_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*LEAVES, "family"}


@pytest.mark.parametrize("name", LEAVES)
def test_a_script_runs_from_any_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said, left = LEAVES[name]
    (made,) = tmp_path.iterdir()
    assert said in capsys.readouterr().out and (made / left).exists()


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.py")], ids=lambda path: path.stem)
def test_a_script_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.ipynb")], ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] for cell in cells)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    assert namespace["checked"]  # what the last cell makes of the run
