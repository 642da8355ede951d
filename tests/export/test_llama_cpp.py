"""llama.cpp itself opens what is exported and computes the same. Needs the extra `llamacpp`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exporting import adapted, row_file
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from peft_pair import randomize
from tiny import tiny_tokenizer

import luthier
from luthier.adapters import AdapterSpec, attach, save_adapter, trainable_parameters
from luthier.export.compare import difference_to, reference_of
from luthier.export.export import export
from luthier.export.rounding import rounded_logits
from luthier.export.subject import open_subject, rows_of

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_merged_file_computes_what_was_trained(tmp_path: Path, family: str, kind: str) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}  # which llama.cpp knows none of for it
    random_model(family, **changes).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    adapter = adapted(tmp_path, model=tmp_path / "model")
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype=kind, data=row_file(tmp_path), verify=True)
    ours, theirs, _ = report.verification
    assert ours.by == "luthier's reader"
    assert theirs.by.startswith("llama.cpp")
    assert theirs.passed
    assert theirs.difference.logits_error < (1e-3 if kind == "f32" else 1e-2)
    assert theirs.equal_tokens == 1.0


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q4_k", "q4_1", "q4_0"])
def test_blocks_are_read_as_we_read_them(tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds what goes into blocks to 8 bits, which moves the logits as far as our own rounded forward is moved."""
    random_model("llama", hidden_size=256, intermediate_size=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    adapter = adapted(tmp_path, model=tmp_path / "model")
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype=kind, data=row_file(tmp_path), verify=True)
    assert kind.upper() in report.kinds
    _, theirs, _ = report.verification
    assert theirs.by.startswith("llama.cpp")
    assert theirs.difference.logits_error < 5e-2
    assert theirs.difference.token_agreement > 0.85
    model = luthier.load(str(next((tmp_path / "out").glob("*.gguf")))).model
    reference = reference_of(model, rows_of(open_subject(str(adapter)), row_file(tmp_path), 4))
    moved = difference_to(reference, rounded_logits(model, reference)).logits_error
    assert theirs.difference.logits_error == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("spec", [{}, {"variant": "rslora", "rank_pattern": {"q_proj": 2}}])
def test_an_adapter_on_blocks_as_they_are(tmp_path: Path, kind: Kind, spec: dict) -> None:
    """What was trained here on a GGUF file's own blocks is what llama.cpp serves from that file and the adapter's.

    llama.cpp rounds what goes into such a matrix to 16 or 8 bits. A random model's likeliest tokens are nearly tied, so
    that its greedy text turns on this; that of a trained one is compared in benchmarks/export.py.
    """
    model = random_model("llama", vocab_size=len(tiny_tokenizer()))  # llama.cpp wants a token for each row
    base = write_gguf(tmp_path / "base.gguf", model, "llama", kind)
    model, _ = luthier.load(str(base))
    attach(model, AdapterSpec(rank=4, **spec), seed=1)
    with torch.no_grad():
        randomize([parameter for _, parameter in trainable_parameters(model)])
    save_adapter(model, tmp_path / "adapter", base_name=str(base))
    report = export(str(tmp_path / "adapter"), to="gguf-adapter", out=tmp_path / "out", data=row_file(tmp_path), verify=True)
    ours, theirs = report.verification
    assert ours.difference.largest_logits_error <= 1e-4
    assert theirs.by.startswith("llama.cpp")
    assert theirs.difference.logits_error < (1e-3 if kind == Kind.F16 else 5e-2)
    assert theirs.difference.token_agreement > 0.9
    assert theirs.equal_tokens == 1.0


def test_an_adapter_trained_on_nf4_of_a_file_is_judged_on_the_file(tmp_path: Path) -> None:
    """llama.cpp opens the file, whose weights are others than those trained on: that is no fault of the adapter's file."""
    model = random_model("llama", vocab_size=len(tiny_tokenizer()))
    base = write_gguf(tmp_path / "base.gguf", model, "llama", Kind.F16)
    model, _ = luthier.load(str(base), base="nf4")
    attach(model, AdapterSpec(rank=4), seed=1)
    with torch.no_grad():
        randomize([parameter for _, parameter in trainable_parameters(model)])
    save_adapter(model, tmp_path / "adapter", base_name=str(base))
    report = export(str(tmp_path / "adapter"), to="gguf-adapter", out=tmp_path / "out", data=row_file(tmp_path), verify=True)
    ours, theirs = report.verification
    assert ours.difference.largest_logits_error <= 1e-4
    assert theirs.difference.logits_error < 1e-2
    assert any("trained on the base in NF4" in note for note in report.notes)
