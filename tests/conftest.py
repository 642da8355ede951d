"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tiny import write_tiny

from luthier.models.cache import cache_root

OWN_CACHE = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a cache of its own, in which the models of the real one stand, so that tests leave nothing there."""
    real, own = cache_root(), Path(tempfile.mkdtemp(prefix="luthier-tests-"))
    for name in ("models", "downloads"):
        if (real / name).is_dir():
            (own / name).symlink_to(real / name)
    config.stash[OWN_CACHE] = own
    os.environ["LUTHIER_CACHE"] = str(own)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[OWN_CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama as a Transformers folder, the same one for the whole session; do not write to it."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")
