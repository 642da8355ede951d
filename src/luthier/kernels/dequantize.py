"""Stored matrices in float32: the reference for each kind, in plain torch.

GGUF blocks: the layout of llama.cpp's ggml-common.h. NF4: QLoRA, arXiv:2305.14314, in bitsandbytes' layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS, NF4_BLOCK, NF4_NESTED_BLOCK, Storage


def dequantize_reference(s: Storage) -> Tensor:
    """W, (out_features, in_features), float32."""
    if s.kind in DENSE_DTYPES:
        return (s.data.T if s.transposed else s.data).to(torch.float32)
    if s.kind == "nf4":
        return _nf4(s)
    blocks = s.data.reshape(-1, GGUF_BLOCKS[s.kind][1])
    return _GGUF[s.kind](blocks).reshape(s.shape)


def nf4_scales(s: Storage) -> Tensor:
    """One float32 scale for each 64 weights of the flat matrix."""
    assert s.absmax is not None
    if s.nested_absmax is None or s.nested_map is None:
        return s.absmax
    coarse = s.nested_absmax.repeat_interleave(NF4_NESTED_BLOCK)[: s.absmax.numel()]
    return s.nested_map[s.absmax.to(torch.int64)] * coarse + s.offset


def _nf4(s: Storage) -> Tensor:
    assert s.code is not None
    weights = s.shape[0] * s.shape[1]
    data = s.data.reshape(-1)
    nibbles = torch.stack((data >> 4, data & 15), 1).reshape(-1)[:weights].to(torch.int64)
    return (s.code[nibbles] * nf4_scales(s).repeat_interleave(NF4_BLOCK)[:weights]).reshape(s.shape)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, (blocks, 1), float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(data: Tensor) -> Tensor:
    """All low nibbles of a row of bytes, then all high ones."""
    return torch.cat((data & 15, data >> 4), 1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 bits from byte `at`, each worth 16."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (bits & 1).reshape(-1, 32) << 4


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).to(torch.float32) - 8) * _half(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).to(torch.float32) * _half(b, 0) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return ((_nibbles(b[:, 6:]) | _fifth_bits(b, 2)).to(torch.float32) - 16) * _half(b, 0)


def _q5_1(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 8:]) | _fifth_bits(b, 4)).to(torch.float32) * _half(b, 0) + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).to(torch.float32) * _half(b, 0)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima, (blocks, 8, 1) each."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scales.to(torch.float32)[:, :, None], minima.to(torch.float32)[:, :, None]


def _k_codes(data: Tensor) -> Tensor:
    """128 bytes -> (blocks, 8, 32): each 32 bytes hold two groups, low nibbles and high ones."""
    quarters = data.reshape(-1, 4, 1, 32)
    return torch.cat((quarters & 15, quarters >> 4), 2).reshape(-1, 8, 32)


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(b[:, 4:16])
    d, least = _half(b, 0)[:, :, None], _half(b, 2)[:, :, None]
    return d * scales * _k_codes(b[:, 16:]).to(torch.float32) - least * minima


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(b[:, 4:16])
    d, least = _half(b, 0)[:, :, None], _half(b, 2)[:, :, None]
    shifts = torch.arange(8, dtype=torch.uint8, device=b.device)[None, :, None]
    fifth = ((b[:, None, 16:48] >> shifts) & 1) << 4
    return d * scales * (_k_codes(b[:, 48:]) | fifth).to(torch.float32) - least * minima


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    nibbles = torch.cat((low & 15, low >> 4), 2).reshape(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device)[None, None, :, None]
    top = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 8, 32) << 4
    scales = b[:, 192:208].contiguous().view(torch.int8).to(torch.float32) * _half(b, 208)
    codes = (nibbles | top).reshape(-1, 16, 16).to(torch.float32) - 32
    return codes * scales[:, :, None]


_GGUF = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
