"""Tiny GGUF files made from Transformers models the way llama.cpp's converter makes them, with gguf's own tensor names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tiny import CHATML, tiny_config, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def random_model(family: str, *, seed: int = 0, **changes: Any):
    """A random float32 model of `family`, its norms and biases random too; `changes` go into the configuration."""
    content = tiny_config(family).to_dict() | changes
    if family in ("gemma2", "gemma3"):
        content["query_pre_attn_scalar"] = content["head_dim"]  # as in every Gemma but the 27B ones; files do not say
    if family == "gemma3":
        content.pop("layer_types", None)
        config = Gemma3TextConfig.from_dict(content)
    else:
        config = AutoConfig.for_model(content.pop("model_type"), **content)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.eval()


def write_gguf(
    path: Path,
    model: Any,
    family: str,
    kind: Kind = Kind.F32,
    extra: dict | None = None,
    blocks: dict[str, Kind] | None = None,
    **keys: Any,
) -> Path:
    """Write `model`: matrices stored as `kind`, the rest and `extra` in f32. keys: metadata, None to leave one out.

    blocks: tensors, by gguf's name, that are stored in random blocks of a type which gguf cannot quantise to.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    for key, value in (_settings(model.config, family) | vocabulary() | keys).items():
        if value is not None:
            _add(writer, key.replace("ARCH", gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]]), value)
    for name, data in (tensors(model, family) | (extra or {})).items():
        if name in (blocks or {}):
            writer.add_tensor(name, random_blocks(data.shape, blocks[name]), raw_dtype=blocks[name])
        elif data.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    return _close(writer, path)


def random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Bytes of a matrix of that shape, small enough that they are finite as float16 scales too."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(0).integers(0, 60, (shape[0], shape[1] // block * block_bytes), np.uint8)


def write_random_blocks(path: Path, config: Any, matrices: dict[str, tuple[int, int]], norms: list[str]) -> Path:
    """A llama in random Q8_0 blocks of small scales, made and written one tensor at a time; norms are 1. Names are gguf's."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (_settings(config, "llama") | vocabulary()).items():
        _add(writer, key.replace("ARCH", "llama"), value)
    generator, block, block_bytes = np.random.default_rng(0), *gguf.GGML_QUANT_SIZES[Kind.Q8_0]
    for name, (rows, columns) in matrices.items():
        size = (rows, columns // block * block_bytes)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), rows * size[1], raw_dtype=Kind.Q8_0)
    for name in norms:
        writer.add_tensor_info(name, (config.hidden_size,), np.dtype(np.float32), 4 * config.hidden_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for rows, columns in matrices.values():
        data = generator.integers(0, 256, (rows, columns // block, block_bytes), np.uint8)
        data[:, :, :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        writer.write_tensor_data(data.reshape(rows, -1))
    for _ in norms:
        writer.write_tensor_data(np.ones(config.hidden_size, np.float32))
    writer.close()
    return path


def write_vocabulary(path: Path, architecture: str, metadata: dict[str, Any], rows: int = 512) -> Path:
    """A file with a tokenizer and an embedding of `rows` rows, no whole model."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    writer.add_tensor("token_embd.weight", np.zeros((rows, 32), np.float32))
    return _close(writer, path)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tensors(model: Any, family: str) -> dict[str, np.ndarray]:
    """The model's tensors under gguf's names, llama's q and k permuted, Gemma's norms plus one, a tied head left out."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config.num_hidden_layers)
    found = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = value.detach().to(torch.float32).numpy()
        if family == "llama" and ".q_proj." in name:
            data = _interleaved(data, config.num_attention_heads)
        if family == "llama" and ".k_proj." in name:
            data = _interleaved(data, config.num_key_value_heads)
        if family in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            data = data + 1
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = data
    return found


def _interleaved(data: np.ndarray, heads: int) -> np.ndarray:
    return data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def _settings(config: Any, family: str) -> dict[str, Any]:
    rope = config.rope_parameters
    settings = {
        "ARCH.block_count": config.num_hidden_layers,
        "ARCH.context_length": config.max_position_embeddings,
        "ARCH.embedding_length": config.hidden_size,
        "ARCH.feed_forward_length": config.intermediate_size,
        "ARCH.attention.head_count": config.num_attention_heads,
        "ARCH.attention.head_count_kv": config.num_key_value_heads,
        "ARCH.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "ARCH.rope.freq_base": float((rope.get("full_attention") or rope)["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        settings |= {"ARCH.attention.key_length": config.head_dim, "ARCH.attention.value_length": config.head_dim}
    if family in ("gemma2", "gemma3"):
        settings["ARCH.attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        settings["ARCH.attn_logit_softcapping"] = config.attn_logit_softcapping
        settings["ARCH.final_logit_softcapping"] = config.final_logit_softcapping
    if family == "phi3":
        settings["ARCH.rope.dimension_count"] = config.hidden_size // config.num_attention_heads
        settings["ARCH.rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return settings


def vocabulary() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }
