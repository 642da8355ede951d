"""Attention over documents that lie end to end, each attending causally inside itself.

One document after the other goes through `scaled_dot_product_attention`, so the work is the sum of the documents'
own squares and no mask over the whole row is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ROWS = 256


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(mask(c tanh(scale q k^T / c))) v for each document alone; c = softcap, and without it the plain scores.

    q: (T, H, D); k: (T, K, D); v: (T, K, E); K divides H, query head h reads key head h // (H / K). -> (T, H, E).
    starts: the N + 1 boundaries of N documents, from 0 to T; an empty document is allowed.
    window: position t sees the positions t - window + 1 to t of its document; None sees all before it.
    dropout: probability with which an attention weight is dropped; 0 when not training.
    sinks: (H,), one more score a head that takes part in the softmax and has no value (gpt-oss).
    Where a softcap, a sink or a window shorter than the document rules out the flash kernel, scores live in blocks of
    BLOCK_ROWS rows and, for softcap and sinks, are computed again in backward.
    """
    attend = partial(_attend, scale=scale, window=window, softcap=softcap, dropout=dropout, sinks=sinks)
    documents = [attend(q[first:end], k[first:end], v[first:end]) for first, end in pairwise(starts) if end > first]
    return torch.cat(documents) if documents else q.new_empty(0, q.shape[1], v.shape[2])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    sinks: Tensor | None,
) -> Tensor:
    """One document. q: (L, H, D); k: (L, K, D); v: (L, K, E) -> (L, H, E)."""
    length = q.shape[0]
    if window is not None and window >= length:
        window = None
    q, k, v = (heads.transpose(0, 1) for heads in (q, k, v))
    if softcap is not None or sinks is not None:
        explicit = partial(_explicit_rows, scale=scale, window=window, softcap=softcap, dropout=dropout, sinks=sinks)
        outputs = []
        for first, end, oldest in _row_blocks(length, window):
            block = (q[:, first:end], k[:, oldest:end], v[:, oldest:end])
            # The scores of a block are cheap to compute again and would otherwise be kept for every block.
            outputs.append(checkpoint(explicit, *block, use_reentrant=False, preserve_rng_state=dropout > 0))
        return torch.cat(outputs, 1).transpose(0, 1)
    flash = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale, enable_gqa=q.shape[0] != k.shape[0])
    if window is None:
        return flash(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1)
    outputs = []
    for first, end, oldest in _row_blocks(length, window):
        mask = _visible(end - first, end - oldest, window, q.device)
        outputs.append(flash(q[None, :, first:end], k[None, :, oldest:end], v[None, :, oldest:end], attn_mask=mask)[0])
    return torch.cat(outputs, 1).transpose(0, 1)


def _row_blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first row, row after the last, oldest key that any of them sees) of each block."""
    for first in range(0, length, BLOCK_ROWS):
        oldest = 0 if window is None else max(0, first - window + 1)
        yield first, min(first + BLOCK_ROWS, length), oldest


def _visible(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(rows, keys) bool: which keys each row sees, the last row standing at the last key."""
    distance = torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _explicit_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    sinks: Tensor | None,
) -> Tensor:
    """Rows of one document at its end. q: (H, R, D); k: (K, S, D); v: (K, S, E) -> (H, R, E). Softmax in float32."""
    (heads, rows, _), (groups, keys, _) = q.shape, k.shape
    grouped = q.reshape(groups, heads // groups * rows, -1)
    scores = (grouped @ k.transpose(1, 2)).to(torch.float32).mul(scale).view(heads, rows, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(rows, keys, window, q.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(heads, 1, 1).expand(heads, rows, 1)], 2)
    weights = torch.softmax(scores, 2)[:, :, :keys].to(v.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights.view(groups, heads // groups * rows, keys) @ v).view(heads, rows, -1)
