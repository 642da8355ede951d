"""Names of tensors in GGUF files and in Transformers, both ways, and what llama.cpp's converter does to the values."""

from __future__ import annotations

import re

import numpy as np

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QUERY_KEY_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

INNER = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON | QUERY_KEY_NORMS,
    "gemma2": COMMON | FOUR_NORMS,
    "gemma3": COMMON | FOUR_NORMS | QUERY_KEY_NORMS,
    "phi3": COMMON | FUSED,
}
ARCHITECTURES = tuple(INNER)

# Tensors that hold settings rather than weights; gguf_config reads them.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")


def to_transformers(name: str, architecture: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`; a name that is not known stays as it is."""
    block = _BLOCK.fullmatch(name)
    if block:
        inner = INNER[architecture].get(block[2])
        return f"model.layers.{block[1]}.{inner}.{block[3]}" if inner else name
    stem, _, kind = name.rpartition(".")
    return f"{OUTER[stem]}.{kind}" if stem in OUTER else name


def to_gguf(name: str, architecture: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`; a name that is not known stays as it is."""
    layer = _LAYER.fullmatch(name)
    if layer:
        inner = {transformers: gguf for gguf, transformers in INNER[architecture].items()}.get(layer[2])
        return f"blk.{layer[1]}.{inner}.{layer[3]}" if inner else name
    stem, _, kind = name.rpartition(".")
    outer = {transformers: gguf for gguf, transformers in OUTER.items()}.get(stem)
    return f"{outer}.{kind}" if outer else name


def permuted_heads(name: str, architecture: str, heads: int, key_heads: int) -> int | None:
    """How many heads the rows of this tensor are permuted in, or None. Only llama's q and k are, for interleaved rotary."""
    if architecture != "llama":
        return None
    if name.endswith((".q_proj.weight", ".q_proj.bias")):
        return heads
    return key_heads if name.endswith((".k_proj.weight", ".k_proj.bias")) else None


def original_rows(rows: int, heads: int) -> np.ndarray:
    """For each row of a Transformers q or k matrix, the row of the GGUF tensor that holds it. (rows,) int64.

    The converter interleaves the two halves of every head: row 2 i + j of a head is the original's row j D/2 + i.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def norm_offset(name: str, architecture: str) -> float:
    """What the converter added to this tensor: 1 for Gemma's norms, which Transformers applies as 1 + weight."""
    return 1.0 if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight") else 0.0
