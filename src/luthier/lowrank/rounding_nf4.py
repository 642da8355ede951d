"""NF4 by rounding in a metric: an ordinary bitsandbytes matrix, its codes and scales chosen for what the inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import NumericError
from luthier.kernels.quantize import Nf4, quantize_absmax, scales_of
from luthier.kernels.quantize_reference import nf4_codes
from luthier.kernels.storage import NF4_BLOCK
from luthier.lowrank.rounding import DAMPING, damping_of, round_with_steps, search_steps
from luthier.matrices import NF4Matrix


def round_nf4(
    weight: Tensor,
    moments: Tensor,
    *,
    double: bool = True,
    passes: int = 2,
    rounds: int = 2,
    damping: float = DAMPING,
) -> NF4Matrix:
    """W (out, in) in NF4 so that tr((W - Q) (H + damping) (W - Q)^T) is small; bytes and file format are NF4's own.

    Each block's scale starts as the share of its absmax that rounds best; with `double` scales are stored in 8 bits as
    bitsandbytes does, before any code is chosen, so that codes make up for what that costs. Codes come from `passes` passes
    (`round_in_metric`). Then `rounds - 1` times scales are fitted to the codes in the metric and codes descend again, the best
    of all rounds being kept (`round_with_steps`).
    weight: float32, bfloat16 or float16, finite; moments H: (in, in). Scales are fitted only where 64 divides in_features, as
    blocks run on from row to row otherwise.
    Raises what `round_with_steps` raises, and NumericError for NaN or Inf in the weight.
    """
    if weight.ndim != 2 or not bool(weight.isfinite().all()):
        raise NumericError("a weight to round must be a finite matrix (out, in). Download the model again.")
    W, added, levels = weight.to(torch.float32), damping_of(moments, damping), nf4_codes()

    def store(steps: Tensor) -> tuple[Nf4, Tensor]:
        stored = _stored(steps, double)
        return stored, _steps(stored, W)

    first = _first_steps(W, moments.diagonal().to(torch.float64) + added, levels)
    found = round_with_steps(W, moments, levels, first, store, passes=passes, rounds=rounds, added=added)
    return _packed(*found, weight.dtype)


def _first_steps(W: Tensor, diagonal: Tensor, levels: Tensor) -> Tensor:
    """One scale for 64 weights of the flat matrix, (out, in / 64) where that divides and (blocks, 1) otherwise."""
    pad = -W.numel() % NF4_BLOCK
    blocks = torch.nn.functional.pad(W.reshape(-1), (0, pad)).view(-1, NF4_BLOCK)
    weights = diagonal.to(torch.float32).expand(len(W), -1).reshape(-1)
    weights = torch.nn.functional.pad(weights, (0, pad)).view(-1, NF4_BLOCK)
    found = search_steps(blocks, weights, levels, blocks.abs().amax(1, keepdim=True))
    return found if W.shape[1] % NF4_BLOCK else found.view(len(W), -1)


def _stored(steps: Tensor, double: bool) -> Nf4:
    """Scales as they are stored, without codes yet."""
    empty, absmax = torch.empty(0, 1, dtype=torch.uint8), steps.reshape(-1)
    return Nf4(empty, *quantize_absmax(absmax)) if double else Nf4(empty, absmax)


def _steps(stored: Nf4, W: Tensor) -> Tensor:
    """The scale of each block of a row, (out, in / 64); of each weight, (out, in), where blocks run on from row to row."""
    scales = scales_of(stored)
    if W.shape[1] % NF4_BLOCK == 0:
        return scales.view(len(W), -1)
    return scales.repeat_interleave(NF4_BLOCK)[: W.numel()].view_as(W)


def _packed(stored: Nf4, codes: Tensor, dtype: torch.dtype) -> NF4Matrix:
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_full((1,), 7)])  # 7 is the code of zero
    return NF4Matrix(
        ((flat[::2] << 4) | flat[1::2])[:, None],
        stored.absmax,
        (codes.shape[0], codes.shape[1]),
        nested_absmax=stored.nested_absmax,
        nested_offset=0.0 if stored.nested_offset is None else float(stored.nested_offset),
        dtype=dtype,
    )
