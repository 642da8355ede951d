"""Adapters written here give the same logits under PEFT, and PEFT's give the same logits here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft_pair import logits, made_by_peft, ours, plain, randomize, relative, with_peft, write_model
from safetensors import safe_open
from safetensors.torch import load_file

from luthier.adapters import AdapterSpec, attach, load_adapter, save_adapter, trainable_parameters

pytest.importorskip("peft")

PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
    "alpha_pattern": {r"layers\.1\..*": 3.0, "q_proj": 20.5},
}
HERE = {
    "lora": ("llama", False, AdapterSpec(rank=4)),
    "rslora": ("llama", False, AdapterSpec(rank=4, variant="rslora")),
    "dora": ("llama", False, AdapterSpec(rank=4, variant="dora")),
    "rsdora": ("llama", False, AdapterSpec(rank=4, variant="rsdora")),
    "patterns": ("llama", False, AdapterSpec(rank=4, **PATTERNS)),
    "rslora patterns": ("llama", False, AdapterSpec(rank=4, variant="rslora", **PATTERNS)),
    "regex": ("llama", False, AdapterSpec(rank=4, targets=r"model\.layers\.1\..*(q|down)_proj")),
    "list": ("llama", False, AdapterSpec(rank=4, targets=["v_proj", "layers.0.mlp.up_proj"])),
    "saved head": ("llama", False, AdapterSpec(rank=4, modules_to_save=["lm_head"])),
    "saved norm and block": (
        "llama",
        False,
        AdapterSpec(rank=4, targets=["q_proj"], modules_to_save=["model.norm", "layers.1.mlp"]),
    ),
    "saved tied head": ("llama", True, AdapterSpec(rank=4, modules_to_save=["lm_head"])),
    "saved tied embedding": ("llama", True, AdapterSpec(rank=4, modules_to_save=["embed_tokens"])),
    "saved as one": ("llama", True, AdapterSpec(rank=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "head": ("llama", False, AdapterSpec(rank=4, targets=["lm_head", "q_proj"])),
    "tied head": ("llama", True, AdapterSpec(rank=4, targets=["lm_head", "q_proj"])),
    "embedding": ("llama", False, AdapterSpec(rank=4, targets=["embed_tokens", "q_proj"])),
    "tied embedding": ("llama", True, AdapterSpec(rank=4, targets=["embed_tokens"])),
    "tied head and embedding": ("llama", True, AdapterSpec(rank=4, targets=["embed_tokens", "lm_head"])),
    "dora on embedding": ("llama", False, AdapterSpec(rank=4, variant="dora", targets=["embed_tokens", "lm_head"])),
    "scaled embedding": ("gemma3", True, AdapterSpec(rank=4, targets=["embed_tokens"])),
    "dora on scaled embedding": ("gemma3", True, AdapterSpec(rank=4, variant="dora", targets=["embed_tokens"])),
    "conv1d": ("gpt2", True, AdapterSpec(rank=4)),
    "conv1d dora": ("gpt2", True, AdapterSpec(rank=4, variant="dora")),
    "conv1d and embedding": ("gpt2", True, AdapterSpec(rank=4, targets=["c_attn", "wte"])),
    "conv1d saved": ("gpt2", True, AdapterSpec(rank=4, targets=["c_attn"], modules_to_save=["h.1.mlp", "ln_f"])),
    "qwen2": ("qwen2", None, AdapterSpec(rank=4, variant="dora")),
    "phi3": ("phi3", None, AdapterSpec(rank=4)),
    "gpt_neox": ("gpt_neox", None, AdapterSpec(rank=4, targets=["query_key_value", "lm_head"])),
    "olmo2": ("olmo2", None, AdapterSpec(rank=4)),
}


@pytest.mark.parametrize("case", HERE)
def test_an_adapter_written_here_opens_in_peft(tmp_path: Path, case: str) -> None:
    family, tied, spec = HERE[case]
    folder = write_model(tmp_path / "model", family, tied)
    model = ours(folder)
    before = logits(model)
    attach(model, spec, seed=0)
    randomize([parameter for _, parameter in trainable_parameters(model)])
    expected = logits(model)
    assert relative(before, expected) > 1e-2
    save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    assert relative(logits(with_peft(folder, tmp_path / "adapter")), expected) < 1e-5

    again = ours(folder)
    load_adapter(again, tmp_path / "adapter")
    assert relative(logits(again), expected) < 1e-6
    assert trainable_parameters(again) == []
    save_adapter(again, tmp_path / "again", base_name=str(folder))
    assert_same_folders(tmp_path / "adapter", tmp_path / "again")


def assert_same_folders(first: Path, second: Path) -> None:
    one, two = load_file(first / "adapter_model.safetensors"), load_file(second / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (first / "adapter_config.json").read_text() == (second / "adapter_config.json").read_text()


THERE = {
    "lora": ("llama", False, {"target_modules": "all-linear"}),
    "rslora": ("llama", False, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 4}),
    "dora": ("llama", False, {"target_modules": "all-linear", "use_dora": True, "r": 4}),
    "rsdora": ("llama", False, {"target_modules": ["k_proj"], "use_dora": True, "use_rslora": True, "r": 4}),
    "patterns": (
        "llama",
        False,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"^model.layers.0.*": 5},
        },
    ),
    "regex": ("llama", False, {"target_modules": r".*\.0\..*_proj"}),
    "lora_bias": ("qwen2", False, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "exclude list": (
        "llama",
        False,
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "exclude regex": ("llama", False, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*q_proj"}),
    "layers": ("llama", False, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "one layer by pattern": (
        "gpt2",
        True,
        {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h", "fan_in_fan_out": True},
    ),
    "saved head": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved by the end of a name": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["layernorm"]}),
    "saved and targeted": ("llama", False, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    "saved tied embedding": ("llama", True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved as one": (
        "llama",
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved as one by the head": (
        "llama",
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "head": ("llama", False, {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("llama", True, {"target_modules": ["lm_head"]}),
    "embedding": ("llama", False, {"target_modules": ["embed_tokens"]}),
    "tied embedding": ("llama", True, {"target_modules": ["embed_tokens"]}),
    "tied terms": ("llama", True, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "dora on embedding": ("llama", False, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "scaled embedding": ("gemma3", True, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", True, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", True, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d saved": ("gpt2", True, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["c_fc", "wte"]}),
    "mistral": ("mistral", None, {"target_modules": "all-linear"}),
    "qwen3": ("qwen3", None, {"target_modules": "all-linear"}),
    "gemma2": ("gemma2", None, {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", None, {"target_modules": "all-linear", "use_dora": True}),
    "phi3": ("phi3", None, {"target_modules": "all-linear"}),
    "gpt_neox": ("gpt_neox", None, {"target_modules": "all-linear"}),
    "olmo2": ("olmo2", None, {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", THERE)
def test_an_adapter_of_peft_opens_here(tmp_path: Path, case: str) -> None:
    family, tied, settings = THERE[case]
    folder = write_model(tmp_path / "model", family, tied)
    expected = made_by_peft(folder, tmp_path / "adapter", **settings)
    model = ours(folder)
    assert relative(logits(model), expected) > 1e-3
    load_adapter(model, tmp_path / "adapter")
    assert relative(logits(model), expected) < 1e-5

    save_adapter(model, tmp_path / "again", base_name=str(folder))
    assert relative(logits(with_peft(folder, tmp_path / "again")), expected) < 1e-5


def test_what_a_written_adapter_holds(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", True)
    model = ours(folder)
    spec = AdapterSpec(
        rank=2, alpha=4, dropout=0.1, variant="dora", targets=["q_proj", "embed_tokens"], modules_to_save=["model.norm"]
    )
    attach(model, spec, seed=0)
    save_adapter(model, tmp_path / "adapter", base_name="some/model")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "luthier_base.json",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "revision": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "target_modules": ["embed_tokens", "q_proj"],
        "exclude_modules": None,
        "modules_to_save": ["model.norm"],
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "ensure_weight_tying": False,
        "auto_mapping": None,
        "peft_version": "0.18.0",
    }
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    layer = "base_model.model.model.layers.{}.self_attn.q_proj"
    expected = {
        "base_model.model.model.embed_tokens.base_layer.weight": [512, 64],
        "base_model.model.model.embed_tokens.lora_embedding_A": [2, 512],
        "base_model.model.model.embed_tokens.lora_embedding_B": [64, 2],
        "base_model.model.model.embed_tokens.lora_magnitude_vector": [64],
        "base_model.model.model.norm.weight": [64],
    }
    for index in (0, 1):
        expected[layer.format(index) + ".lora_A.weight"] = [2, 64]
        expected[layer.format(index) + ".lora_B.weight"] = [64, 2]
        expected[layer.format(index) + ".lora_magnitude_vector"] = [64]
    assert shapes == expected


def test_names_are_written_whole_where_their_ends_say_too_much(tmp_path: Path) -> None:
    model = ours(write_model(tmp_path / "model", "llama", False))
    attach(model, AdapterSpec(rank=2, targets=["layers.0.self_attn.q_proj"]), seed=0)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_a_loaded_adapter_can_be_trained_further(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", True)
    made_by_peft(
        folder, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    model = ours(folder)
    report = load_adapter(model, tmp_path / "adapter", trainable=True)
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == 5
    assert report.trainable_parameters == 512 * 64 + 2 * 2 * 8 * 64
    assert model.lm_head.matrix is model.model.embed_tokens.matrix


def test_a_half_precision_adapter_loads_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write_model(tmp_path / "model", "llama", False)
    made_by_peft(folder, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(path).items()}, path)
    model = ours(folder)
    load_adapter(model, tmp_path / "adapter")
    assert model.model.layers[0].self_attn.q_proj.terms["default"].lora_A.dtype == torch.float32
    assert relative(logits(model), logits(plain(folder))) > 1e-3
