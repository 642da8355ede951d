"""Compressed models through export: merged they are dense again; in blocks alone they are an ordinary GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tiny import compressed_folder, set_matrix, write_folder
from gguf import GGUFReader
from safetensors.torch import load_file
from tiny import write_tiny
from transformers import AutoModelForCausalLM

from luthier.adapters.targets import low_rank_layers
from luthier.compression import runner
from luthier.compression.planning import fixed_bytes
from luthier.compression.runner import compress
from luthier.compression.settings import Budget, CompressSettings
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


def test_a_result_in_nf4_is_a_folder_that_transformers_opens_with_the_same_weights(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    path = nf4_folder(tmp_path)
    ours = {name: layer.matrix for name, layer in low_rank_layers(load(str(path)).model).items()}
    theirs = AutoModelForCausalLM.from_pretrained(path)
    found = 0
    for name, module in theirs.named_modules():
        # On CPUs bitsandbytes 0.50 reads the scales wrong where rows are not whole blocks of 64 (tests/models).
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64 == 0:
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert ours[name].kind == "nf4"
            assert torch.equal(weight.to(torch.float32), ours[name].dequantize().to(weight.dtype).to(torch.float32))
            found += 1
    kept = [matrix for matrix in ours.values() if matrix.kind == "nf4"]
    assert len(kept) == 14
    assert found == sum(matrix.shape[1] % 64 == 0 for matrix in kept) == 12
    assert torch.equal(theirs.get_input_embeddings().weight.float(), ours["model.embed_tokens"].dequantize())


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_a_result_in_nf4_goes_into_a_gguf_file(tmp_path: Path, dtype: str) -> None:
    path = nf4_folder(tmp_path)
    export(str(path), to="gguf", out=tmp_path / "gguf", dtype=dtype)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    ours, theirs = load(str(path)).model, load(str(file)).model
    for name, layer in low_rank_layers(ours).items():
        got, wanted = low_rank_layers(theirs)[name].matrix.dequantize(), layer.matrix.dequantize()
        bound = wanted.abs().max() * {"f16": 2**-11, "q8_0": 0.5 / 127 + 2**-10}[dtype]
        assert (got - wanted).abs().max() <= bound


def nf4_folder(tmp_path: Path) -> Path:
    """What compress writes where plain NF4 fits the budget best: calibrated on its own text, rounded in the metric."""
    model = write_tiny(tmp_path / "original", "llama", tied=True, dtype=torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Book a table for {i} at noon; {i**3} guests." for i in range(300)))
    settings = CompressSettings(
        str(model), Budget.parse("75%"), tmp_path / "out", str(text), bits="4", windows=8, window=32, eval_windows=4,
        footprints=False,
    )  # fmt: skip
    plan = runner._plans

    def only_nf4(*arguments, **more):
        return plan(*arguments, **more)[-1:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_plans", only_nf4)
        report = compress(settings)
    assert (report.form, report.chosen) == ("bitsandbytes", "plain nf4")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == stored["model.norm.weight"].dtype == torch.bfloat16
    assert report.result.size_bytes <= report.result.plan.size_bytes + fixed_bytes(load(str(tmp_path / "out")).model)
    return tmp_path / "out"
