"""GGUF blocks by rounding in a metric: ordinary Q4_0 and Q4_K blocks, their codes chosen for what the inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import ConfigError, NumericError, nearest
from luthier.kernels.quantize import quantize_gguf
from luthier.kernels.quantize_reference import packed_nibbles
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.lowrank.rounding import DAMPING, Grid, damping_of, round_in_metric, round_with_steps, search_steps
from luthier.matrices import GGUFMatrix

KINDS = ("q4_0", "q4_k")
SIGNED = torch.arange(-8.0, 8.0)
UNSIGNED = torch.arange(0.0, 16.0)


def round_gguf(
    weight: Tensor, moments: Tensor, kind: str, *, passes: int = 2, rounds: int = 2, damping: float = DAMPING
) -> GGUFMatrix:
    """W (out, in) in Q4_0 or Q4_K blocks so that tr((W - Q) (H + damping) (W - Q)^T) is small.

    q4_0: w = d (q - 8), d float16 for 32 weights, at first the share of the largest weight / -8 that rounds best; codes come
    from `passes` passes, d and codes are then fitted to each other `rounds - 1` times (`round_with_steps`).
    q4_k: w = d s q - dmin m; scales and minima are those of `kernels.quantize_gguf`, which searches them for each weight's
    own size, and codes alone are chosen in the metric; `rounds` adds further passes.
    weight: float32, bfloat16 or float16, finite, its columns a multiple of the block (32; 256); moments H: (in, in).
    Raises ConfigError for another kind, ShapeError where blocks do not fit, and what `round_with_steps` raises.
    """
    if kind not in KINDS:
        raise ConfigError(f"kinds that are rounded in a metric are {', '.join(KINDS)}; got {kind!r}.{nearest(kind, KINDS)}")
    blocks = quantize_gguf(weight.contiguous(), kind.upper())  # checks the weight and its shape
    W, added = weight.to(torch.float32), damping_of(moments, damping)
    if kind == "q4_0":
        return GGUFMatrix(_round_q4_0(W, moments, added, passes, rounds), kind)
    return GGUFMatrix(_round_q4_k(W, moments, added, blocks, passes * rounds), kind)


def _round_q4_0(W: Tensor, moments: Tensor, added: float, passes: int, rounds: int) -> Tensor:
    width = GGUF_BLOCKS["q4_0"][0]
    grouped = W.reshape(-1, width)
    largest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True)) / -8
    weights = (moments.diagonal().to(torch.float64) + added).to(torch.float32)
    first = search_steps(grouped, weights.expand(len(W), -1).reshape(-1, width), SIGNED, largest).view(len(W), -1)
    d, codes = round_with_steps(W, moments, SIGNED, first, _half, passes=passes, rounds=rounds, added=added)
    return torch.cat([d.reshape(-1, 1).view(torch.uint8), packed_nibbles(codes.reshape(-1, width))], 1).view(len(W), -1)


def _half(steps: Tensor) -> tuple[Tensor, Tensor]:
    """The float16 nearest to each step, as the file will hold it and in float32."""
    rounded = steps.to(torch.float16)
    if not bool(rounded.isfinite().all()):
        raise NumericError(f"GGUF scales are float16, at most 65504; got {steps.abs().max().item():.4g}. Try NF4.")
    return rounded, rounded.to(torch.float32)


def _round_q4_k(W: Tensor, moments: Tensor, added: float, blocks: Tensor, passes: int) -> Tensor:
    size = GGUF_BLOCKS["q4_k"][1]
    header = blocks.view(-1, size)[:, :16]
    step, offset = (part.view(len(W), -1) for part in _k_steps(header))
    codes, _ = round_in_metric(W, moments, Grid(UNSIGNED, step, offset), passes=passes, added=added)
    pairs = codes.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    return torch.cat([header, packed], 1).view(len(W), -1)


def _k_steps(header: Tensor) -> tuple[Tensor, Tensor]:
    """(d s, dmin m) of each of 8 groups of 32 weights, (blocks, 8) float32, from the first 16 bytes of Q4_K blocks."""
    d, least = header[:, :4].contiguous().view(torch.float16).to(torch.float32).split(1, 1)
    first, second, third = header[:, 4:8], header[:, 8:12], header[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return d * scales.to(torch.float32), least * minima.to(torch.float32)
