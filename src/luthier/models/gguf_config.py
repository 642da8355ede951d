"""The Transformers configuration of a GGUF file, from its metadata.

Source: gguf.md, "standardized key-value pairs"; llama.cpp src/models for what the keys leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from luthier.errors import ModelError, bulleted
from luthier.models.gguf_file import GGUFFile
from luthier.models.gguf_names import ARCHITECTURES

MODEL_TYPE_OF = {"gemma3": "gemma3_text"}
# Gemma's 27B models scale queries by hidden size over heads, the others by the head size; the files do not say.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA3_LOCAL_ROPE_THETA = 10000.0
PARTLY_ROTATED = ("phi3",)  # Transformers' classes of the others turn whole heads, whatever their configuration says


class _Keys:
    """Typed access to the metadata of one architecture; gathers what is missing or of the wrong type."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; one list element a layer is accepted where all are the same."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(element == value[0] for element in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{self.architecture}.{key} must be a positive integer; got {value!r}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.problems.append(f"{self.architecture}.{key} must be a positive number; got {value!r}")
            return default
        return float(value)

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata


def architecture_of(file: GGUFFile) -> str:
    """The file's architecture. Raises ModelError if it is not one of those that can be loaded."""
    if "adapter.type" in file.metadata or file.metadata.get("general.type") == "adapter":
        raise ModelError(f"{file.path} holds an adapter, not a model. Load the model it was trained on.")
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{file.path}: a GGUF file's architecture must be one of {known}; got {architecture!r}. Try its "
            "Transformers folder."
        )
    return architecture


def config_content(file: GGUFFile) -> dict[str, Any]:
    """The content of the config.json that this file stands for.

    Raises ModelError naming every key that is missing or makes no sense, and models that need what is not supported.
    """
    architecture = architecture_of(file)
    keys = _Keys(file, architecture)
    if keys.has("expert_count") and file.metadata[f"{architecture}.expert_count"]:
        raise ModelError(f"{file.path}: mixtures of experts are not supported. Use a dense model.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} must hold the token embeddings (token_embd.weight); it does not. Download it again.")
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    content: dict[str, Any] = {
        "model_type": MODEL_TYPE_OF.get(architecture, architecture),
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": keys.size("block_count"),
        "intermediate_size": keys.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": keys.size("attention.key_length", max(1, hidden // heads)),
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_token_ids(file),
    }
    if keys.has("attention.value_length") and keys.size("attention.value_length") != content["head_dim"]:
        keys.problems.append(f"{architecture}.attention.value_length must equal the key length")
    content["rope_parameters"] = _rope(keys, content)
    if architecture in FAMILIES:
        FAMILIES[architecture](keys, content)
    if keys.problems:
        raise ModelError(f"{file.path} does not describe a whole model:\n{bulleted(keys.problems)}\nDownload it again.")
    return content


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    """bos, eos and pad ids; the end-of-turn token ends a text too where it is another than eos."""
    ids = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("eot", "eot")):
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        ids[key] = value if isinstance(value, int) and 0 <= value < file.tensors["token_embd.weight"].shape[0] else None
    ends = [value for value in dict.fromkeys((ids["eos"], ids["eot"])) if value is not None]
    eos = ends if len(ends) > 1 else (ends[0] if ends else None)
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["pad"]}


def _rope(keys: _Keys, content: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings. Llama 3's scaling comes as factors of the frequencies, which longrope expresses exactly."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    rotated = keys.size("rope.dimension_count", content["head_dim"])
    partly = keys.architecture in PARTLY_ROTATED
    if rotated > content["head_dim"] or rotated % 2 or (rotated < content["head_dim"] and not partly):
        sizes = f"even and at most {content['head_dim']}" if partly else f"the head size, {content['head_dim']}"
        keys.problems.append(f"{keys.architecture}.rope.dimension_count must be {sizes}; got {rotated}")
    elif rotated != content["head_dim"]:
        rope["partial_rotary_factor"] = rotated / content["head_dim"]
    kind = keys.file.metadata.get(f"{keys.architecture}.rope.scaling.type", "none")
    original = keys.size("rope.scaling.original_context_length", content["max_position_embeddings"])
    long, short = (_factors(keys, f"rope_factors_{length}.weight", rotated) for length in ("long", "short"))
    single = _factors(keys, "rope_freqs.weight", rotated)
    if single or (long and short):
        attention = keys.number("rope.scaling.attn_factor", 1.0)
        rope |= {"rope_type": "longrope", "short_factor": single or short, "long_factor": single or long}
        rope |= {"attention_factor": attention, "original_max_position_embeddings": original}
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor", 1.0)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        keys.problems.append(f"{keys.architecture}.rope.scaling.type must be none, linear or yarn; got {kind!r}")
    if keys.has("rope.scale_linear"):
        keys.problems.append(f"{keys.architecture}.rope.scale_linear is of an old converter")
    return rope


def _factors(keys: _Keys, name: str, rotated: int) -> list[float] | None:
    tensor = keys.file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.kind != GGMLQuantizationType.F32 or tensor.shape != (rotated // 2,):
        keys.problems.append(f"{name} must hold {rotated // 2} float32 numbers")
        return None
    return [float(value) for value in keys.file.data(tensor, mapped=False).view(np.float32)]


def _llama(keys: _Keys, content: dict[str, Any]) -> None:
    content["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
    content["mlp_bias"] = "blk.0.ffn_gate.bias" in keys.file.tensors


def _phi3(keys: _Keys, content: dict[str, Any]) -> None:
    content["original_max_position_embeddings"] = keys.size(
        "rope.scaling.original_context_length", content["max_position_embeddings"]
    )
    if keys.has("attention.sliding_window") and keys.file.metadata["phi3.attention.sliding_window"]:
        content["sliding_window"] = keys.size("attention.sliding_window")


def _gemma2(keys: _Keys, content: dict[str, Any]) -> None:
    _gemma_query_scale(keys, content)
    content["sliding_window"] = keys.size("attention.sliding_window", 4096)
    content["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    content["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0)


def _gemma3(keys: _Keys, content: dict[str, Any]) -> None:
    """Every sixth layer looks at everything, with the file's theta and scaling; the others at a window, with their own."""
    _gemma_query_scale(keys, content)
    content["sliding_window"] = keys.size("attention.sliding_window")
    local = keys.number("rope.freq_base_swa", GEMMA3_LOCAL_ROPE_THETA)
    content["rope_parameters"] = {
        "full_attention": content["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _gemma_query_scale(keys: _Keys, content: dict[str, Any]) -> None:
    large = content["num_hidden_layers"] == GEMMA_27B_LAYERS[keys.architecture]
    content["query_pre_attn_scalar"] = (
        content["hidden_size"] // content["num_attention_heads"] if large else content["head_dim"]
    )


FAMILIES: dict[str, Callable[[_Keys, dict[str, Any]], None]] = {
    "llama": _llama,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
