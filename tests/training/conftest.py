"""Fixtures for tests that make whole runs."""

from __future__ import annotations

import pytest


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without drawing plots, which takes longer than training a tiny model does."""
    monkeypatch.setattr("luthier.training.report.write_plots", lambda *_: None)
