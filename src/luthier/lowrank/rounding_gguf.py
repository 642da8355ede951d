"""GGUF blocks by rounding in a metric: ordinary Q4_0 and Q4_K blocks, their codes chosen for what the inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import ConfigError, NumericError, ShapeError, nearest
from luthier.kernels.quantize import quantize_gguf
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.lowrank.rounding import DAMPING, Grid, damped, fit_steps, round_in_metric, search_steps
from luthier.matrices import GGUFMatrix

KINDS = ("q4_0", "q4_k")
SHARES = torch.linspace(0.7, 1.05, 15)
SIGNED = torch.arange(-8.0, 8.0)
UNSIGNED = torch.arange(0.0, 16.0)


def round_gguf(
    weight: Tensor, moments: Tensor, kind: str, *, passes: int = 2, rounds: int = 2, damping: float = DAMPING
) -> GGUFMatrix:
    """W (out, in) in Q4_0 or Q4_K blocks so that tr((W - Q) (H + damping) (W - Q)^T) is small.

    q4_0: w = d (q - 8), d float16 for 32 weights, at first the share of the largest weight / -8 that rounds best; codes come
    from `passes` passes (`round_in_metric`), then `rounds - 1` times d is fitted to the codes in the metric and codes descend
    again; the best of all rounds is kept.
    q4_k: w = d s q - dmin m; scales and minima are those of `kernels.quantize_gguf`, which searches them for each weight's
    own size, and codes alone are chosen in the metric; `rounds` adds further passes.
    weight: float32, bfloat16 or float16, finite, its columns a multiple of the block (32; 256); moments H: (in, in).
    Raises ConfigError for another kind, ShapeError where blocks do not fit, NumericError for NaN or Inf.
    """
    if kind not in KINDS:
        raise ConfigError(f"kinds that are rounded in a metric are {', '.join(KINDS)}; got {kind!r}.{nearest(kind, KINDS)}")
    if passes < 1 or rounds < 1:
        raise ShapeError(f"rounding takes at least one pass and one round; got {passes} and {rounds}.")
    blocks = quantize_gguf(weight.contiguous(), kind.upper())  # checks the weight and its shape
    W, H = weight.to(torch.float32), damped(moments, damping)
    rounded = _round_q4_0(W, H, passes, rounds) if kind == "q4_0" else _round_q4_k(W, H, blocks, passes * rounds)
    return GGUFMatrix(rounded, kind)


def _round_q4_0(W: Tensor, H: Tensor, passes: int, rounds: int) -> Tensor:
    width = GGUF_BLOCKS["q4_0"][0]
    grouped = W.reshape(-1, width)
    largest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True)) / -8
    diagonal = H.diagonal().to(torch.float32).expand(len(W), -1).reshape(-1, width)
    steps = _half(search_steps(grouped, diagonal, SIGNED, largest, SHARES).view(len(W), -1))
    H32 = H.to(torch.float32)
    codes: Tensor | None = None
    best: tuple[float, Tensor, Tensor] | None = None
    for index in range(rounds):
        grid = Grid(SIGNED, steps)
        codes, left = round_in_metric(W, H, grid, passes=passes, codes=codes)
        error = float(((left @ H32) * left).sum(dtype=torch.float64))
        if best is None or error < best[0]:
            best = (error, steps, codes)
        if index + 1 < rounds:
            steps = _half(fit_steps(W, H32, grid, codes))
    assert best is not None
    d = best[1].reshape(-1, 1).to(torch.float16).view(torch.uint8)
    return torch.cat([d, _packed_halves(best[2].reshape(-1, width))], 1).view(len(W), -1)


def _half(steps: Tensor) -> Tensor:
    """The float16 nearest to each step, as float32, which is what the file will hold."""
    rounded = steps.to(torch.float16)
    if not bool(rounded.isfinite().all()):
        raise NumericError(f"GGUF scales are float16, at most 65504; got {steps.abs().max().item():.4g}. Try NF4.")
    return rounded.to(torch.float32)


def _packed_halves(q: Tensor) -> Tensor:
    """(n, 32) codes -> (n, 16): byte j holds code j low and code j + 16 high."""
    return q[:, :16] | (q[:, 16:] << 4)


def _round_q4_k(W: Tensor, H: Tensor, blocks: Tensor, passes: int) -> Tensor:
    size = GGUF_BLOCKS["q4_k"][1]
    header = blocks.view(-1, size)[:, :16]
    step, offset = (part.view(len(W), -1) for part in _k_steps(header))
    codes, _ = round_in_metric(W, H, Grid(UNSIGNED, step, offset), passes=passes)
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
