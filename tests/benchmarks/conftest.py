"""What tests of the benchmarks share."""

import pytest


@pytest.fixture
def offline(monkeypatch):
    """No test may look for the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
