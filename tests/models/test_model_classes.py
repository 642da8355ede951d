"""Models whose classes have ways of their own: other linear layers, experts, weights that they leave out or compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from luthier.adapters import AdapterSpec, attach
from luthier.config import NF4Options
from luthier.errors import ModelError
from luthier.linear import LowRankLinear
from luthier.matrices import NF4Matrix
from luthier.models.load import load
from luthier.models.quantize import quantize

IDS = torch.arange(3, 43).reshape(2, 20)
COMMON = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 64}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def write_model(folder: Path, kind: str, **sizes: Any) -> Any:
    """A random model of the type `kind`, written as a folder; returns it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | sizes))).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def assert_same_logits(first: Any, second: Any) -> None:
    actual, expected = logits(first), logits(second)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bias", [False, True])
def test_falcons_own_linear_layers_are_matrices(tmp_path: Path, bias: bool) -> None:
    source = write_model(tmp_path, "falcon", num_hidden_layers=2, num_attention_heads=4, bias=bias)
    loaded = load(str(tmp_path))
    assert loaded.notes == []
    assert_same_logits(loaded.model, source)
    assert not any(isinstance(module, torch.nn.Linear) for module in loaded.model.modules())
    wanted = ["dense", "query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    report = attach(loaded.model, AdapterSpec(rank=2), seed=0)
    assert len(report.targets) == 2 * len(wanted)
    assert {target.partition("h.0.")[2] for target in report.targets if ".h.0." in target} == {
        f"self_attention.{name}" if "." not in name else name for name in wanted
    }
    quantized = load(str(tmp_path), base="nf4").model
    assert sum(isinstance(module, NF4Matrix) for module in quantized.modules()) == 2 * len(wanted)


def test_parts_that_are_more_than_a_product_are_named(tmp_path: Path) -> None:
    """Llama 4's router is a subclass of nn.Linear that returns scores too; its experts lie in tensors of three dimensions."""
    source = write_model(
        tmp_path, "llama4_text", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=48, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, moe_layers=[1],
    )  # fmt: skip
    experts = 2 * (64 * 96 + 48 * 64) * 4
    for base in (None, "nf4"):
        loaded = load(str(tmp_path), base=base)  # type: ignore[arg-type]
        router = "model.layers.1.feed_forward.router"
        assert loaded.notes == [
            "3 parts do more than multiply by one matrix, so they take no adapter and are held in float32, "
            f"{experts + 2 * 64 * 4} bytes: model.layers.1.feed_forward.experts.gate_up_proj, "
            f"model.layers.1.feed_forward.experts.down_proj, {router} (Llama4Router)."
        ]
        assert isinstance(loaded.model.get_submodule("model.layers.1.feed_forward.shared_expert.up_proj"), LowRankLinear)
        if base is None:
            assert_same_logits(loaded.model, source)
        report = attach(loaded.model, AdapterSpec(rank=2), seed=0)
        assert router not in report.targets
        loaded.model(input_ids=IDS, labels=IDS).loss.backward()
    report = quantize(str(tmp_path), tmp_path / "nf4", nf4=NF4Options())
    assert report.kept == [router, "lm_head"]
    assert_same_logits(load(report.folder).model, load(str(tmp_path), base="nf4").model)


def test_experts_that_lie_apart_are_refused(tmp_path: Path) -> None:
    write_model(
        tmp_path, "mixtral", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"mixtures of experts whose files hold each expert by itself are not supported; .*"
                       r"experts\.\w+ would have to be put together from several tensors\. Use a dense model"):  # fmt: skip
        load(str(tmp_path))


def test_weights_that_the_class_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    extra = {f"mtp.layers.0.{name}.weight": torch.ones(4) for name in "abcd"} | {"mtp": torch.ones(1)}
    save_file(state | extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mtp\.layers\.0\.a\.weight has no place in the model"):
        load(str(folder))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\.layers"])
    with pytest.raises(ModelError, match=r":\n  - mtp has no place in the model\n"):
        load(str(folder))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\.layers", "^mtp$"])
    (note,) = load(str(folder)).notes
    assert note.startswith("5 weights (mtp")
    assert note.endswith(", ...) are left out: LlamaForCausalLM has no use for them.")


def test_weights_that_the_class_computes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a weight that has a value can be missing: one that would be drawn at random cannot, whatever the class says."""
    folder = write_tiny(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        load(str(folder))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"norm\.weight$", "q_proj"])
    loaded = load(str(folder))
    assert loaded.notes == [f"model.norm.weight is not stored in {folder}; the model's own values stand there."]
    assert torch.equal(loaded.model.model.norm.weight, torch.ones(64))
    assert not loaded.model.model.norm.weight.requires_grad
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r":\n  - model\.layers\.0\.self_attn\.q_proj\.weight is missing\n"):
        load(str(folder))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SCB", "bitsandbytes int8"),
        ("qweight", "gptq or awq"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "fp8"),
    ],
)
def test_other_quantizers_are_named_where_the_configuration_says_nothing(tmp_path: Path, name: str, kind: str) -> None:
    folder = write_tiny(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    state[f"model.layers.0.mlp.up_proj.{name}"] = torch.ones(4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(str(folder))
    assert str(caught.value) == (
        f"{folder}: quantized weights must be bitsandbytes nf4 or a GGUF file; these are {kind} "
        f"(model.layers.0.mlp.up_proj.{name}). Use the original model; --method qlora quantizes it while loading."
    )


def test_fp4_weights_are_named_where_the_configuration_says_nothing(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__fp4"] = torch.ones(4, dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"must be bitsandbytes nf4 or a GGUF file; these are bitsandbytes fp4 \(model\.layers"
    ):
        load(str(folder))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_checkpoint_does_not_choose_the_code_that_computes(tmp_path: Path, key: str) -> None:
    """Transformers reads `org/name` there as code of the hub, to be fetched and run."""
    folder = write_tiny(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "somebody/kernel", "experts_implementation": "a/b"}))
    model = load(str(folder)).model
    assert model.config._attn_implementation == "sdpa"
    logits(model)
