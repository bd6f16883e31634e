"""The finished run that several files look at."""

from pathlib import Path

import pytest

from tests.reporting.html.pages import TAUGHT, ran


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of teacher, DualDE student and direct model; not to be changed."""
    made = tmp_path_factory.mktemp("taught") / "run"
    ran(made, TAUGHT)
    return made
