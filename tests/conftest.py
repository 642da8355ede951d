"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama as a Transformers folder, the same one for the whole session; do not write to it."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")
