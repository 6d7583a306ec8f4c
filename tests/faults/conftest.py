import outcomes
import pytest
from hypothesis import Phase


@pytest.fixture
def unshrunk(monkeypatch):
    """Failures as they are found, where one has to be."""
    monkeypatch.setattr(outcomes, "PHASES", [Phase.generate])
