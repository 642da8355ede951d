"""What the check in llama.cpp finds although our own reading of the file cannot: mistakes that writer and reader would share.

Needs the extra `llamacpp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import row_file
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, vocabulary, write_gguf
from peft_pair import randomize
from tiny import tiny_tokenizer

from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.data import Example
from luthier.export import gguf_adapter
from luthier.export.by_llama_cpp import judged_by_llama_cpp
from luthier.export.subject import Subject, open_subject, rows_of

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Right:
    """A file of a random model, what we read from it, and rows."""

    model: Any
    kind: Kind
    path: Path
    subject: Subject
    examples: list[Example]

    def passes(self, path: Path, adapter: Path | None = None) -> bool:
        return judged_by_llama_cpp(path, adapter, self.subject.model, self.subject.tokenizer, self.examples).passed


@pytest.fixture(params=[Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def right(request: pytest.FixtureRequest, tmp_path: Path) -> Right:
    model = random_model("llama", hidden_size=256, intermediate_size=256, vocab_size=len(tiny_tokenizer()))
    path = write_gguf(tmp_path / "right.gguf", model, "llama", request.param)
    subject = open_subject(str(path))
    return Right(model, request.param, path, subject, rows_of(subject, row_file(tmp_path), 4))


WRONG: dict[str, dict[str, Any]] = {
    "rope base": {"ARCH.rope.freq_base": 20000.0},
    "merges": {"tokenizer.ggml.merges": vocabulary()["tokenizer.ggml.merges"][::-1]},
    "rows of q and k": {},
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_file(right: Right, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert right.passes(right.path)
    if wrong == "rows of q and k":
        monkeypatch.setattr("gguf_tiny._interleaved", lambda data, _: data)
    assert not right.passes(write_gguf(tmp_path / "wrong.gguf", right.model, "llama", right.kind, **WRONG[wrong]))


@pytest.mark.parametrize(
    ("wrong", "spec"),
    [
        ("a fifth too much", {"targets": ["q_proj"]}),
        ("alphas of other layers", {"alpha_pattern": {"up_proj": 3.0}}),
        ("rows of B", {"targets": ["q_proj"]}),
    ],
)
def test_a_wrong_adapter(
    right: Right, wrong: str, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(right.subject.model, AdapterSpec(rank=4, alpha=8, **spec), seed=1)
    with torch.no_grad():
        randomize([parameter for _, parameter in trainable_parameters(right.subject.model)])
    adapter = tmp_path / "adapter.gguf"
    gguf_adapter.write_adapter(adapter, right.subject.model, {"general.name": "right"})
    assert right.passes(right.path, adapter)
    add_value, pair = gguf_adapter.add_value, gguf_adapter._pair
    if wrong == "a fifth too much":
        scaled = {"adapter.lora.alpha": 1.2}
        change = {"add_value": lambda writer, key, value: add_value(writer, key, value * scaled.get(key, 1))}
    elif wrong == "rows of B":
        change = {"permutation": lambda *_: None}
    else:
        change = {"_pair": lambda model, architecture, target, term, _: pair(model, architecture, target, term, 1.0)}
    for name, value in change.items():
        monkeypatch.setattr(gguf_adapter, name, value)
    gguf_adapter.write_adapter(adapter, right.subject.model, {"general.name": "wrong"})
    assert not right.passes(right.path, adapter)
