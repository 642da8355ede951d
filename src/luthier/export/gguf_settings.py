"""A model's configuration as the metadata of a GGUF file, and the tensors that hold rotary settings.

Source: gguf.md, "standardized key-value pairs"; llama.cpp's conversion scripts for what each architecture reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from luthier.errors import ModelError, bulleted
from luthier.models.gguf_config import GEMMA3_LOCAL_ROPE_THETA, GEMMA_27B_LAYERS

ARCHITECTURE_OF = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
ACTIVATION = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "phi3"), ("silu",)),
    **dict.fromkeys(("gemma2", "gemma3"), ("gelu_pytorch_tanh",)),
}
GEMMA3_PERIOD = 6
# Architectures whose query, key and value layers may have biases in llama.cpp, and whose other layers may.
BIASED_ATTENTION, BIASED_ALL = ("llama", "qwen2"), ("llama",)
YARN_DEFAULTS = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}


@dataclass
class GGUFSettings:
    """metadata under its whole keys; tensors: rotary factors, float32; notes: where the file cannot say everything."""

    architecture: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def architecture_of(config: PretrainedConfig) -> str:
    """llama.cpp's name for the model's architecture. Raises ModelError for a family that cannot be written."""
    architecture = ARCHITECTURE_OF.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"GGUF files are written for {', '.join(ARCHITECTURE_OF)}; this model is {config.model_type}. Try --to merged."
        )
    return architecture


def gguf_settings(model: PreTrainedModel) -> GGUFSettings:
    """Sizes, rotary settings and the rest of what llama.cpp needs to know of the model.

    Raises ModelError naming everything that an architecture's file cannot express.
    """
    config = model.config
    settings = GGUFSettings(architecture_of(config))
    problems = _problems(model, settings.architecture)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    if settings.architecture in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window or 0
    if settings.architecture not in ("gemma2", "gemma3"):
        settings.notes += _window_note(config, settings.architecture)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, key, None)
        if value is not None:
            keys[key] = float(value)
    problems += _add_rope(model, keys, settings)
    if problems:
        raise ModelError(f"a GGUF file of architecture {settings.architecture} cannot express:\n{bulleted(problems)}\n"
                         "Try --to merged.")  # fmt: skip
    settings.metadata = {f"{settings.architecture}.{key}": value for key, value in keys.items()}
    return settings


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window_note(config: PretrainedConfig, architecture: str) -> list[str]:
    """What one should know of a model whose attention looks back over a window only."""
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True) or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if not window or not uses or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp uses no attention window for {architecture}: from {window} tokens on it looks at more than the model does."
    ]


def _problems(model: PreTrainedModel, architecture: str) -> list[str]:
    config = model.config
    problems = []
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATION[architecture]:
        problems.append(f"the activation {activation}; it is always {ACTIVATION[architecture][0]}")
    biases = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters() if name.endswith("proj.bias")}
    allowed = {"q_proj", "k_proj", "v_proj"} if architecture in BIASED_ATTENTION else set()
    wrong = biases if architecture not in BIASED_ALL else set()
    if wrong - allowed:
        problems.append(f"biases of {', '.join(sorted(wrong - allowed))}")
    if architecture in GEMMA_27B_LAYERS:
        problems += _gemma_problems(config, architecture)
    return problems


def _gemma_problems(config: PretrainedConfig, architecture: str) -> list[str]:
    problems = []
    large = config.num_hidden_layers == GEMMA_27B_LAYERS[architecture]
    scalar = config.hidden_size // config.num_attention_heads if large else head_size(config)
    if config.query_pre_attn_scalar != scalar:
        problems.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}; for these sizes it is always {scalar}")
    period = 2 if architecture == "gemma2" else GEMMA3_PERIOD
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != expected:
        problems.append(f"its pattern of attention windows; it is always one layer in {period} that looks at everything")
    return problems


def _add_rope(model: PreTrainedModel, keys: dict[str, Any], settings: GGUFSettings) -> list[str]:
    """Add the rotary settings to keys and tensors; returns what cannot be expressed."""
    config, rope = model.config, dict(model.config.rope_parameters)
    if settings.architecture == "gemma3":
        local, rope = dict(rope["sliding_attention"]), dict(rope["full_attention"])
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
        if local.get("rope_type", "default") != "default":
            return [f"scaled rotary embeddings in windowed layers ({local['rope_type']}), theta {GEMMA3_LOCAL_ROPE_THETA:g}"]
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    rotated = int(head_size(config) * partial)
    keys |= {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotated}
    if rotated != head_size(config) and settings.architecture == "llama":
        return [f"rotary embeddings on {rotated} of a head's {head_size(config)} features"]
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return []
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        return []
    if kind == "dynamic":
        settings.notes.append(
            f"Rotary scaling of type dynamic begins beyond {config.max_position_embeddings} tokens, where the file ends."
        )
        return []
    if kind == "llama3":
        settings.tensors["rope_freqs.weight"] = _llama3_factors(rope, rotated)
        return []
    if kind == "longrope":
        return _add_longrope(config, rope, keys, settings)
    if kind == "yarn":
        return _add_yarn(config, rope, keys)
    return [f"rotary scaling of type {kind}"]


def _llama3_factors(rope: dict[str, Any], rotated: int) -> np.ndarray:
    """What each frequency is divided by: nothing for short waves, the factor for long ones, a mixture between.

    Source: Llama 3.1's reference code, apply_scaling.
    """
    original = float(rope["original_max_position_embeddings"])
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    waves = original * frequencies / (2 * math.pi)  # how many waves fit the original length
    smooth = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _add_longrope(config: PretrainedConfig, rope: dict[str, Any], keys: dict[str, Any], settings: GGUFSettings) -> list[str]:
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = int(original or config.max_position_embeddings)
    short, long = (np.asarray(rope[name], np.float32) for name in ("short_factor", "long_factor"))
    stretch = config.max_position_embeddings / original
    factor = rope.get("attention_factor")
    if factor is None:
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    if np.array_equal(short, long) and settings.architecture != "phi3":
        settings.tensors["rope_freqs.weight"] = short
        return [] if factor == 1.0 else [f"an attention factor of {factor:g} beside rotary factors"]
    if settings.architecture not in ("phi3", "llama"):
        return ["rotary scaling of type longrope"]
    settings.tensors |= {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    keys |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(factor)}
    if settings.architecture == "llama":
        keys["rope.scaling.type"] = "longrope"
    return []


def _add_yarn(config: PretrainedConfig, rope: dict[str, Any], keys: dict[str, Any]) -> list[str]:
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    keys |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(original),
    }
    return [
        f"yarn with {name} {rope[name]}"
        for name, usual in YARN_DEFAULTS.items()
        if rope.get(name) is not None and rope[name] != usual
    ]
