"""The default model's own GGUF file, made by llama.cpp's converter, is what an export of it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.export.export import export
from luthier.export.gguf_vocabulary import gguf_vocabulary
from luthier.models.gguf_file import read_gguf
from luthier.models.load import load_tokenizer
from luthier.models.smollm2 import ALIAS, gguf_path

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _own_cache() -> None:
    """The real cache, in place of the one that other tests of exports get."""


def test_settings_vocabulary_and_blocks_are_the_converters(tmp_path: Path) -> None:
    before = read_gguf(gguf_path())
    export(ALIAS, to="gguf", out=tmp_path / "out", dtype="asis", rows=0, offline=True)
    after = read_gguf(tmp_path / "out" / f"{ALIAS}-asis.gguf")
    assert set(after.tensors) == set(before.tensors)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].kind == tensor.kind
        assert np.array_equal(before.data(tensor, mapped=True), after.data(after.tensors[name], mapped=True)), name
    for key, value in before.metadata.items():
        if not key.startswith("general.") or key in ("general.architecture", "general.file_type"):
            wanted = pytest.approx(value) if isinstance(value, float) else value
            assert after.metadata[key] == wanted, key


def test_the_vocabulary_made_from_the_tokenizer_is_the_converters() -> None:
    """Not copied from the file: found again from the tokenizer that was read from it."""
    metadata = read_gguf(gguf_path()).metadata
    made = gguf_vocabulary(load_tokenizer(ALIAS, offline=True), len(metadata["tokenizer.ggml.tokens"]), None)
    assert made.pop("tokenizer.ggml.add_eos_token") is False  # which the converter leaves to its default
    assert set(made) == {key for key in metadata if key.startswith("tokenizer.")}
    for key, value in made.items():
        assert value == metadata[key], key
