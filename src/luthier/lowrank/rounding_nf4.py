"""NF4 by rounding in a metric: an ordinary bitsandbytes matrix, its codes and scales chosen for what the inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import NumericError, ShapeError
from luthier.kernels.quantize import Nf4, quantize_absmax, scales_of
from luthier.kernels.quantize_reference import NF4_BLOCK, nf4_codes
from luthier.lowrank.rounding import DAMPING, Grid, damped, fit_steps, round_in_metric, search_steps
from luthier.matrices import NF4Matrix

SHARES = torch.linspace(0.7, 1.05, 15)


def round_nf4(
    weight: Tensor,
    moments: Tensor,
    *,
    double: bool = True,
    passes: int = 2,
    rounds: int = 2,
    damping: float = DAMPING,
    table: Tensor | None = None,
) -> NF4Matrix:
    """W (out, in) in NF4 so that tr((W - Q) (H + damping) (W - Q)^T) is small; bytes and file format are NF4's own.

    Each block's scale starts as the share of its absmax that rounds best; with `double` scales are stored in 8 bits as
    bitsandbytes does, before any code is chosen, so that codes make up for what that costs. Codes come from `passes` passes
    (`round_in_metric`). Then `rounds - 1` times scales are fitted to the codes in the metric and codes descend again; the
    best of all rounds is kept, so that the error never exceeds the first's.
    weight: float32, bfloat16 or float16, finite; moments H: (in, in). Scales are fitted only where 64 divides in_features, as
    blocks run on from row to row otherwise.
    table: (16,) float32, ascending within -1 to 1, in place of NF4's own. Our kernels decode it; bitsandbytes does not.
    Raises ShapeError, NumericError as `round_in_metric` does, NumericError for NaN or Inf in the weight.
    """
    if weight.ndim != 2 or not bool(weight.isfinite().all()):
        raise NumericError("a weight to round must be a finite matrix (out, in). Download the model again.")
    if passes < 1 or rounds < 1:
        raise ShapeError(f"rounding takes at least one pass and one round; got {passes} and {rounds}.")
    W, H = weight.to(torch.float32), damped(moments, damping)
    levels = nf4_codes() if table is None else table.to(torch.float32)
    stored = _first_scales(W, H.diagonal(), levels, double)
    H32 = H.to(torch.float32)
    best: tuple[float, Nf4, Tensor] | None = None
    codes: Tensor | None = None
    for index in range(rounds):
        grid = Grid(levels, _steps(stored, W))
        codes, left = round_in_metric(W, H, grid, passes=passes, codes=codes)
        error = float(((left @ H32) * left).sum(dtype=torch.float64))
        if best is None or error < best[0]:
            best = (error, stored, codes)
        if index + 1 == rounds or W.shape[1] % NF4_BLOCK:
            break
        stored = _stored(fit_steps(W, H32, grid, codes).reshape(-1), double)
    assert best is not None
    return _packed(best[1], best[2], weight.dtype, table)


def _first_scales(W: Tensor, diagonal: Tensor, levels: Tensor, double: bool) -> Nf4:
    pad = -W.numel() % NF4_BLOCK
    blocks = torch.nn.functional.pad(W.reshape(-1), (0, pad)).view(-1, NF4_BLOCK)
    weights = diagonal.to(torch.float32).expand(len(W), -1).reshape(-1)
    weights = torch.nn.functional.pad(weights, (0, pad)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    return _stored(search_steps(blocks, weights, levels, largest, SHARES).reshape(-1), double)


def _stored(absmax: Tensor, double: bool) -> Nf4:
    """Scales (blocks,) as they are stored, without codes yet."""
    empty = torch.empty(0, 1, dtype=torch.uint8)
    return Nf4(empty, *quantize_absmax(absmax)) if double else Nf4(empty, absmax)


def _steps(stored: Nf4, W: Tensor) -> Tensor:
    """The scale of each block of a row, (out, in / 64); of each weight, (out, in), where blocks run on from row to row."""
    scales = scales_of(stored)
    if W.shape[1] % NF4_BLOCK == 0:
        return scales.view(len(W), -1)
    return scales.repeat_interleave(NF4_BLOCK)[: W.numel()].view_as(W)


def _packed(stored: Nf4, codes: Tensor, dtype: torch.dtype, table: Tensor | None) -> NF4Matrix:
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_full((1,), 7)])  # 7 is the code of zero
    return NF4Matrix(
        ((flat[::2] << 4) | flat[1::2])[:, None],
        stored.absmax,
        (codes.shape[0], codes.shape[1]),
        quant_map=None if table is None else table.to(torch.float32),
        nested_absmax=stored.nested_absmax,
        nested_offset=0.0 if stored.nested_offset is None else float(stored.nested_offset),
        dtype=dtype,
    )
