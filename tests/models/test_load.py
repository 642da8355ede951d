"""Transformers folders of the ten families: logits, names, ties, storage, notes, and what loading refuses to guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, write_tiny
from transformers import AutoModelForCausalLM

from luthier.errors import ModelError, PreflightError
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.models.load import check_finite, fingerprint, load, load_tokenizer

IDS = torch.arange(3, 83).reshape(2, 40)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_transformers(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    sharded = {"max_shard_size": "60KB"} if dtype == torch.bfloat16 else {}
    write_tiny(tmp_path, family, tied, dtype, **sharded)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(sharded)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = load(str(tmp_path)).model
    assert type(model) is type(reference)
    assert_close(logits(model), logits(reference))
    assert model(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(
        reference(input_ids=IDS, labels=IDS).loss.item(), rel=1e-5
    )

    ours, theirs = model.state_dict(), reference.state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name].to(torch.float32), value), name
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert embedding.dtype == head.dtype == model.dtype == dtype
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_a_matrix(tmp_path: Path, family: str) -> None:
    model = load(str(write_tiny(tmp_path, family, dtype=torch.bfloat16))).model
    assert {type(module) for module in model.modules() if hasattr(module, "matrix")} == {LowRankLinear, LowRankEmbedding}
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.endswith("matrix.weight") else torch.float32), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_by_transformers_and_read_back(tmp_path: Path, family: str, tied: bool) -> None:
    model = load(str(write_tiny(tmp_path / "a", family, tied))).model
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    assert_close(logits(again), logits(model))
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == set(load_file(tmp_path / "a" / "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_generates_as_transformers_does(tmp_path: Path, family: str) -> None:
    model = load(str(write_tiny(tmp_path, family))).model
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS[:, :5], **options), reference.generate(IDS[:, :5], **options))


def test_gradients_reach_a_trainable_part_as_in_transformers(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    grads = []
    for model in (load(str(tmp_path)).model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(model.model.layers[0].input_layernorm.weight.grad)
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("base", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_converts_matrices_only(tmp_path: Path, base: str, dtype: torch.dtype) -> None:
    write_tiny(tmp_path, "qwen2", True, dtype)
    model = load(str(tmp_path), base=base).model  # type: ignore[arg-type]
    wanted = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[base]
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(value, stored[name].to(wanted if value.ndim == 2 else torch.float32)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_f16_that_overflows_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    change(tmp_path, "model.layers.0.mlp.up_proj.weight", lambda weight: weight[0].fill_(1e6))
    with pytest.raises(
        ModelError, match=r"f16 holds numbers up to 65504; model\.layers\.0\.mlp\.up_proj\.weight has larger ones"
    ):
        load(str(tmp_path), base="f16")


def test_weights_that_are_not_tied_after_all(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = load(str(tmp_path))
    assert any("untied" in note for note in loaded.notes)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded.model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(loaded.model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


def test_mapped_weights_are_not_written_back(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(str(tmp_path)).model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def change(folder: Path, name: str, edit: Any) -> None:
    """Edit one stored tensor in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_check_finite_names_the_weights(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    check_finite(load(str(tmp_path)).model)
    change(tmp_path, "model.layers.1.self_attn.k_proj.weight", lambda weight: weight[3, :5].fill_(float("nan")))
    change(tmp_path, "model.norm.weight", lambda weight: weight[0].fill_(float("inf")))
    with pytest.raises(PreflightError) as caught:
        check_finite(load(str(tmp_path)).model)
    assert "model.layers.1.self_attn.k_proj.weight: 5 of 2048 values" in str(caught.value)
    assert "model.norm.weight: 1 of 64 values" in str(caught.value)
    assert caught.value.exit_code == 3


def test_fingerprint_tells_weights_apart_and_not_runs(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    first = fingerprint(load(str(tmp_path)).model)
    assert fingerprint(load(str(tmp_path)).model) == first
    change(tmp_path, "model.layers.1.self_attn.k_proj.weight", lambda weight: weight.mul_(1.001))
    assert fingerprint(load(str(tmp_path)).model) != first


def test_loaded_unpacks_and_reports_bytes(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    calls: list[tuple[str, int, int]] = []
    model, tokenizer = load(str(tmp_path), progress=lambda *call: calls.append(call))
    assert tokenizer.padding_side == "right"
    assert not model.training
    assert {stage for stage, _, _ in calls} == {"loading"}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == calls[-1][2] == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())


def test_tokenizer_alone(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_tokenizer_without_padding_pads_with_eos(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}))
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"
