"""Steps that may be compared on any number of ranks, without a forecast of what they send."""

import pytest

from distkgd.pipeline import stage_job
from tests.toys import move_as_configured


@pytest.fixture(autouse=True)
def without_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step sends is rehearsed in tests/distributed/test_cost.py."""
    monkeypatch.setattr(stage_job, "choose_communication", move_as_configured)
