"""Helpers of other test folders, and a cache of its own for each test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without drawing plots, which takes longer than training a tiny model does."""
    monkeypatch.setattr("luthier.training.report.write_plots", lambda *_: None)


@pytest.fixture(autouse=True)
def _without_llama_cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF files are judged by our own reader, whether llama.cpp is installed or not; test_llama_cpp.py has it judge."""
    if request.path.name != "test_llama_cpp.py":
        monkeypatch.setattr("luthier.export.llama_cpp.is_installed", lambda: False)
