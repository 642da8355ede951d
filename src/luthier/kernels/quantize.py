"""Quantisers: 4-bit NormalFloat byte for byte as bitsandbytes stores it, and GGUF blocks that llama.cpp reads."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.errors import ConfigError, NumericError, ShapeError, nearest
from luthier.kernels import native
from luthier.kernels import quantize_reference as reference
from luthier.kernels.frozen_linear import dequantize
from luthier.kernels.registry import define_op
from luthier.kernels.storage import NF4_BLOCK, NF4_NESTED_BLOCK, Storage

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Bytes of a block that hold float16: its scale, and the minimum behind it where there is one.
GGUF_HALF_BYTES = {"Q4_1": 4, "Q4_K": 4}
# Elements and bytes of a block, and the number that the C entry knows the format by.
GGUF_FORMATS = {"Q4_0": (32, 18, 0), "Q4_1": (32, 20, 1), "Q8_0": (32, 34, 2), "Q4_K": (256, 144, 3), "Q6_K": (256, 210, 4)}


class Nf4(NamedTuple):
    """A matrix in NF4, its tensors named and laid out as in a bitsandbytes checkpoint.

    codes: uint8 (ceil(n / 2), 1). absmax: float32 (ceil(n / 64),), or uint8 with double quantisation; then
    nested_absmax: float32 (ceil(blocks / 256),) and nested_offset: float32 ().
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None


def quantize_nf4(weight: Tensor, *, double: bool = True) -> Nf4:
    """Store a tensor in 4-bit NormalFloat, one scale for 64 elements of the flat row-major tensor.

    Each block is divided by its absmax and rounded to the nearest of 16 codes. With `double` the scales are stored in
    8 bits: their mean is taken off and blocks of 256 go to the nearest value of the signed dynamic map.
    weight: any shape, float32, bfloat16 or float16, contiguous, finite and not empty. The bytes are those of
    bitsandbytes 0.50 on a CPU: with `double` always for up to 32768 scales, and for more where it runs on one torch
    thread. Its mean of the scales is torch's, whose order of addition then depends on the threads; ours is that of one.
    Error without `double`: |w - w_hat| <= 0.1519 absmax of the block.
    Raises ShapeError for another dtype, and NumericError that names the first NaN or Inf.
    Source: QLoRA, arXiv:2305.14314, section 3.
    """
    _check_weight(weight)
    codes, absmax = _nf4_quantize(weight)
    if not bool(absmax.isfinite().all()):
        raise NumericError(_first_bad(weight))
    return Nf4(codes, *quantize_absmax(absmax)) if double else Nf4(codes, absmax)


def dequantize_nf4(stored: Nf4, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """code[nibble[j]] * absmax[j // 64] in float32, then cast to `dtype`; the tensor has `shape`.

    Raises ShapeError if the parts do not hold that many elements.
    """
    count = torch.Size(shape).numel()
    matrix_shape = (shape[0], shape[1]) if len(shape) == 2 else (1, count)
    return dequantize(nf4_storage(stored, matrix_shape)).view(shape).to(dtype)


def nf4_storage(stored: Nf4, shape: tuple[int, int]) -> Storage:
    """The parts as the frozen matrix that `frozen_linear` multiplies with; nothing is copied."""
    codes, device = reference.nf4_codes(stored.codes.device), stored.codes.device
    if stored.nested_absmax is None or stored.nested_offset is None:
        return Storage("nf4", shape, stored.codes, stored.absmax, codes)
    nested_map = reference.dynamic_map().to(device)
    return Storage(
        "nf4", shape, stored.codes, stored.absmax, codes, stored.nested_absmax, nested_map, offset=float(stored.nested_offset)
    )


def scales_of(stored: Nf4) -> Tensor:
    """The float32 absmax of each block, (ceil(n / 64),): stored so, or map[q] * nested_absmax + offset."""
    if stored.nested_absmax is None:
        return stored.absmax
    assert stored.nested_offset is not None
    values = reference.dynamic_map().to(stored.absmax.device)[stored.absmax.to(torch.int64)]
    nested = stored.nested_absmax.repeat_interleave(NF4_NESTED_BLOCK)[: values.numel()]
    return values * nested + stored.nested_offset


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 codes, nested_absmax, offset) of the block scales, float32 (blocks,).

    offset = mean(absmax); the differences are multiplied by the reciprocal of the absmax of their block of 256 and
    rounded through a table of 65536 steps of [-1, 1], as bitsandbytes does; a block of zeros gets code 0.
    """
    offset = _mean_on_one_thread(absmax)
    blocks = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NF4_NESTED_BLOCK)).view(-1, NF4_NESTED_BLOCK)
    nested_absmax = blocks.abs().amax(1)
    # The reciprocal of a denormal is Inf, and 0 Inf is NaN; bitsandbytes reads that as -1.
    scaled = (blocks * (1.0 / nested_absmax).unsqueeze(1)).nan_to_num(nan=-1.0).clamp(-1, 1)
    codes = _lookup_on(str(absmax.device))[((scaled + 1.0) * 32767.5 + 0.5).to(torch.int64).clamp(max=65535)]
    codes = torch.where((nested_absmax == 0).unsqueeze(1), 0, codes)
    return codes.reshape(-1)[: absmax.numel()].clone(), nested_absmax, offset


def _mean_on_one_thread(values: Tensor) -> Tensor:
    """torch's mean, whose last bit depends on the number of threads above 32768 values, as one thread computes it."""
    threads = torch.get_num_threads()
    if values.device.type != "cpu" or threads == 1:
        return values.mean()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


def quantize_gguf(weight: Tensor, kind: str) -> Tensor:
    """The rows of a matrix as GGUF blocks: (rows, columns) -> uint8 (rows, columns / block * bytes a block).

    Q4_0, Q4_1 and Q8_0 round to nearest as gguf-py and llama.cpp do, byte for byte. Q4_K and Q6_K search each
    sub-block's scale (and lift) for the smallest weighted error, then round the scales and the weights to them.
    weight: float32, bfloat16 or float16, contiguous, finite; kind: a key of GGUF_FORMATS.
    Raises ConfigError for another kind, ShapeError if the block does not divide the columns, NumericError for NaN, Inf
    or a block whose scale or minimum is beyond float16.
    Source: the block formats of ggml; k-quants, llama.cpp pull request 1684.
    """
    _check_gguf(weight, kind)
    stored = _gguf_quantize(weight, kind)
    at, size_bytes = reference.GGUF_SCALE_OFFSETS[kind], GGUF_FORMATS[kind][1]
    halves = stored.view(-1, size_bytes)[:, at : at + GGUF_HALF_BYTES.get(kind, 2)].contiguous().view(torch.float16)
    if not bool(halves.isfinite().all()):
        raise NumericError(_first_bad(weight))
    return stored


def _check_gguf(weight: Tensor, kind: str) -> None:
    if kind not in GGUF_FORMATS:
        hint = nearest(kind, list(GGUF_FORMATS))
        raise ConfigError(f"GGUF kinds that can be written are {', '.join(GGUF_FORMATS)}; got {kind!r}.{hint}")
    _check_weight(weight)
    block = GGUF_FORMATS[kind][0]
    if weight.ndim != 2 or weight.shape[1] % block:
        raise ShapeError(
            f"{kind} holds rows in blocks of {block}, so the columns must be a multiple of it; "
            f"got {tuple(weight.shape)}. Try a kind with blocks of 32."
        )


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in FLOAT_TYPES:
        raise ShapeError(f"a weight to quantise must be float32, bfloat16 or float16; got {weight.dtype}. Try .float().")
    if weight.numel() == 0:
        raise ShapeError(f"a weight to quantise must not be empty; got {tuple(weight.shape)}.")


def _first_bad(weight: Tensor) -> str:
    """What is wrong with a weight that could not be quantised: the first NaN or Inf, else its largest value."""
    bad = (~weight.isfinite()).reshape(-1)
    if bool(bad.any()):
        flat = int(bad.to(torch.uint8).argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(flat), weight.shape)]
        return (
            f"a weight to quantise must be finite; got {weight.reshape(-1)[flat].item()} at {where}, {int(bad.sum())} in all."
        )
    largest = weight.abs().max().item()
    return f"GGUF scales and minima are float16, at most 65504; got a weight of {largest:.4g}. Try NF4 or a dense dtype."


@functools.cache
def _lookup_on(device: str) -> Tensor:
    return reference.dynamic_lookup().to(device)


def _nf4_quantize_native(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    native.check_tensor(weight, "weight", weight.dtype)
    codes, absmax = _nf4_quantize_fake(weight)
    call = native.entry("lt_nf4_quantize", *[c_void_p, c_int, c_int64], *[c_void_p] * 2, c_int)
    kind = FLOAT_TYPES[weight.dtype]
    call(weight.data_ptr(), kind, weight.numel(), codes.data_ptr(), absmax.data_ptr(), native.threads())
    return codes, absmax


def _nf4_quantize_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    codes = weight.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return codes, weight.new_empty((-(-count // NF4_BLOCK),), dtype=torch.float32)


def _gguf_quantize_native(weight: Tensor, kind: str) -> Tensor:
    _check_gguf(weight, kind)
    native.check_tensor(weight, "weight", weight.dtype)
    out = _gguf_quantize_fake(weight, kind)
    block, _, number = GGUF_FORMATS[kind]
    call = native.entry("lt_gguf_quantize", *[c_void_p, c_int, c_int64, c_int], c_void_p, c_int)
    blocks = weight.shape[0] * (weight.shape[1] // block)
    call(weight.data_ptr(), FLOAT_TYPES[weight.dtype], blocks, number, out.data_ptr(), native.threads())
    return out


def _gguf_quantize_fake(weight: Tensor, kind: str) -> Tensor:
    block, size_bytes, _ = GGUF_FORMATS[kind]
    return weight.new_empty((weight.shape[0], weight.shape[1] // block * size_bytes), dtype=torch.uint8)


_nf4_quantize = define_op(
    "nf4_quantize",
    "(Tensor weight) -> (Tensor, Tensor)",
    reference=reference.nf4_quantize,
    fake=_nf4_quantize_fake,
    native_call=_nf4_quantize_native,
)
_gguf_quantize = define_op(
    "gguf_quantize",
    "(Tensor weight, str kind) -> Tensor",
    reference=reference.gguf_quantize,
    fake=_gguf_quantize_fake,
    native_call=_gguf_quantize_native,
)
