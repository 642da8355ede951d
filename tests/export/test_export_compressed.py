"""Compressed models through export: merged they are dense again; in blocks alone they are an ordinary GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tiny import compressed_folder, set_matrix, write_folder
from gguf import GGUFReader
from tiny import write_tiny

from luthier.adapters.targets import low_rank_layers
from luthier.errors import ConfigError
from luthier.export.export import export
from luthier.linear import LowRankLinear
from luthier.matrices import DenseMatrix, stored
from luthier.models.load import load

IDS = torch.tensor([[5, 9, 100, 7, 7, 30]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_merged_it_is_dense_and_computes_the_same(tmp_path: Path) -> None:
    path, _ = compressed_folder(tmp_path)
    export(str(path), to="merged", out=tmp_path / "merged", dtype="f32")
    dense, compressed = load(str(tmp_path / "merged")).model, load(str(path)).model
    assert all(isinstance(layer.matrix, DenseMatrix) for layer in low_rank_layers(dense).values())
    expected = logits(compressed)
    assert (logits(dense) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_factors_do_not_go_into_a_gguf_file_as_they_are(tmp_path: Path) -> None:
    path, _ = compressed_folder(tmp_path)
    with pytest.raises(ConfigError, match="is stored in low-rank factors, which no GGUF type holds"):
        export(str(path), to="gguf", out=tmp_path / "gguf", dtype="asis")


def test_blocks_alone_are_copied_into_a_gguf_file(tmp_path: Path) -> None:
    loaded = load(str(write_tiny(tmp_path / "original", "llama", tied=True)))
    for name, layer in low_rank_layers(loaded.model).items():
        if isinstance(layer, LowRankLinear) and layer is not loaded.model.get_output_embeddings():
            set_matrix(loaded.model, name, stored(layer.matrix.dequantize(), "q4_0"))
    table = stored(loaded.model.get_input_embeddings().matrix.dequantize(), "q8_0")
    loaded.model.get_input_embeddings().matrix = loaded.model.get_output_embeddings().matrix = table
    path = write_folder(loaded, tmp_path / "blocks")
    export(str(path), to="gguf", out=tmp_path / "gguf", dtype="asis")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == "Q4_0"
    assert torch.equal(logits(load(str(file)).model), logits(loaded.model))
