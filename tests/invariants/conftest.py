"""As in tests/methods: steps are compared without a forecast of what they send."""

from tests.methods.conftest import without_forecast

__all__ = ["without_forecast"]
