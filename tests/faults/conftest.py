import pytest
from hypothesis import Phase

from tests.faults import outcomes


@pytest.fixture
def unshrunk(monkeypatch):
    """Failures as they are found, where one has to be."""
    monkeypatch.setattr(outcomes, "PHASES", [Phase.generate])
