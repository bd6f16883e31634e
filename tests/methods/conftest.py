"""Steps that may be compared on any number of ranks, without a forecast of what they send."""

import pytest

from distkgd.training import communication
from tests.toys import forecast_for_auto


@pytest.fixture(autouse=True)
def without_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step sends is rehearsed in tests/distributed/test_cost.py."""
    monkeypatch.setattr(communication, "forecast", forecast_for_auto)
