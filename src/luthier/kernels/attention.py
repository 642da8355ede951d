"""Causal attention over texts packed end to end, each attending only to itself; a beginning that several share stands once."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_int64, c_void_p
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import ShapeError
from luthier.kernels import native
from luthier.kernels.registry import define_op

Three = tuple[Tensor, Tensor, Tensor]

HEAD_UNIT = 16
MOST_HEAD = 512


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    parents: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale q k^T)) v, causal, inside each text; never a mask or scores over the whole pack.

    q: (T, H, D), k and v: (T, H_kv, D), float32; head h reads key head h // (H / H_kv). -> (T, H, D).
    starts: (N + 1,) int64, rising from 0 to T: segment n is [starts[n], starts[n + 1]).
    parents: (N,) int64: segment n goes on where segment parents[n] < n ends, and begins a text where that is -1. It
    attends to itself and to the whole of its parent, the parent's parent and so on; gradients to those are summed over
    all that share them. Without parents every segment is a text.
    window: a token sees itself and window - 1 tokens before it, counted along its text.
    softcap: scores s become softcap tanh(s / softcap). Backward computes the scores again from the kept log sums.
    rows: (S,) int64, rising: the tokens that q is of, (S, H, D) -> (S, H, D); without them all. Keys are always all.
    Raises ShapeError for other dtypes and sizes, starts that do not cover the pack, parents that come later, rows that
    do not rise or lie outside.
    """
    if parents is None:
        parents = torch.full((max(0, starts.numel() - 1),), -1)
    _check(q, k, v, starts, parents, rows, window, softcap)
    size = q.shape[2]
    padding = -size % HEAD_UNIT
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    options = (scale, softcap or 0.0, window or 0)
    q, k, v, starts, parents = (x.contiguous() for x in (q, k, v, starts, parents))
    rows = None if rows is None else rows.contiguous()
    out = _PackedAttention.apply(q, k, v, starts, parents, rows, options)
    return out[..., :size] if padding else out


def _check(q, k, v, starts, parents, rows, window, softcap) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ShapeError(
            "q is (T, H, D) or with rows (S, H, D), k and v are (T, H_kv, D); "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if any(x.dtype != torch.float32 for x in (q, k, v)):
        raise ShapeError(f"q, k and v must be float32; got {q.dtype}, {k.dtype} and {v.dtype}. Try .float().")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"the key heads must divide the query heads; got {k.shape[1]} and {q.shape[1]}.")
    if not 1 <= q.shape[2] <= MOST_HEAD:
        raise ShapeError(f"the head size must be between 1 and {MOST_HEAD}; got {q.shape[2]}.")
    if window is not None and window < 1:
        raise ShapeError(f"window must be at least 1, or None for no window; got {window}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ShapeError(f"softcap must be above 0 and finite, or None for no cap; got {softcap}.")
    _check_segments(starts, parents, k.shape[0])
    _check_queries(rows, q.shape[0], k.shape[0])


def _check_segments(starts: Tensor, parents: Tensor, tokens: int) -> None:
    if starts.ndim != 1 or starts.numel() < 1 or starts.dtype != torch.int64 or starts.device.type != "cpu":
        raise ShapeError(
            f"starts must be int64 of shape (N + 1,) on the CPU; got {tuple(starts.shape)} {starts.dtype} {starts.device}."
        )
    # As plain numbers: for the few segments of a pack that is quicker than operations of torch, and every layer asks.
    boundaries = starts.tolist()
    if boundaries[0] != 0 or boundaries[-1] != tokens or any(end < begin for begin, end in pairwise(boundaries)):
        raise ShapeError(
            f"starts must rise from 0 to the number of tokens {tokens}; "
            f"got {boundaries[:8]}{' ...' if len(boundaries) > 8 else ''} ending with {boundaries[-1]}."
        )
    segments = len(boundaries) - 1
    if parents.shape != (segments,) or parents.dtype != torch.int64 or parents.device.type != "cpu":
        raise ShapeError(
            f"parents must be int64 of shape ({segments},) on the CPU; got {tuple(parents.shape)} {parents.dtype} "
            f"{parents.device}."
        )
    if any(not -1 <= parent < number for number, parent in enumerate(parents.tolist())):
        raise ShapeError(f"a segment goes on from an earlier one or, with -1, from none; got parents {parents[:8].tolist()}.")


def _check_queries(rows: Tensor | None, queries: int, tokens: int) -> None:
    if rows is None:
        if queries != tokens:
            raise ShapeError(f"q must have the {tokens} rows of k and v; got {queries}. Say by rows which tokens they are of.")
        return
    if rows.shape != (queries,) or rows.dtype != torch.int64 or rows.device.type != "cpu":
        raise ShapeError(
            f"rows must be int64 of shape ({queries},), as q has rows, on the CPU; "
            f"got {tuple(rows.shape)} {rows.dtype} {rows.device}."
        )
    if queries and (int(rows[0]) < 0 or int(rows[-1]) >= tokens or bool((rows.diff() <= 0).any())):
        raise ShapeError(f"rows must rise within [0, {tokens}); got {rows[:8].tolist()}{' ...' if queries > 8 else ''}.")


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, parents, rows, options):
        out, lse = attention_op(q, k, v, starts, parents, rows, *options)
        ctx.options = options
        ctx.save_for_backward(q, k, v, starts, parents, rows, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gradients = attention_backward_op(dout.contiguous(), *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None, None


def _spans(starts: Tensor, parents: Tensor, rows: Tensor | None) -> list[tuple[slice, Tensor, Tensor]]:
    """Of every segment with queries: their rows of q, the keys they may see, and where among these each itself stands."""
    spans: list[tuple[slice, Tensor, Tensor]] = []
    rows = torch.arange(int(starts[-1])) if rows is None else rows
    seen: list[Tensor] = []
    for (begin, end), parent in zip(pairwise(starts.tolist()), parents.tolist(), strict=True):
        own = torch.arange(begin, end)
        seen.append(own if parent < 0 else torch.cat([seen[parent], own]))
        queries = slice(*torch.searchsorted(rows, torch.tensor([begin, end])).tolist())
        spans.append((queries, seen[-1], rows[queries] + (len(seen[-1]) - end)))
    return [span for span in spans if span[0].stop > span[0].start]


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float, window: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, d score / d (q k^T)), (H, queries, keys), -inf where a query sees no key. places: of the queries among k."""
    raw = torch.einsum("qhd,khd->hqk", q, k) * scale
    slope = torch.full_like(raw, scale)
    if softcap:
        tanh = torch.tanh(raw / softcap)
        raw, slope = softcap * tanh, scale * (1 - tanh.square())
    distance = places.to(q.device).unsqueeze(1) - torch.arange(k.shape[0], device=q.device)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return raw.masked_fill(hidden, -torch.inf), slope


def _forward_reference(q, k, v, starts, parents, rows, scale, softcap, window) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    group = q.shape[1] // k.shape[1]
    for queries, seen, places in _spans(starts, parents, rows):
        keys, values = (x[seen].repeat_interleave(group, 1) for x in (k, v))
        scores, _ = _scores(q[queries], keys, scale, softcap, window, places)
        lse[queries] = scores.logsumexp(-1).T
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse


def _backward_reference(dout, q, k, v, starts, parents, rows, out, lse, scale, softcap, window) -> Three:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    for queries, seen, places in _spans(starts, parents, rows):
        keys, values = (x[seen].repeat_interleave(group, 1) for x in (k, v))
        scores, slope = _scores(q[queries], keys, scale, softcap, window, places)
        p = (scores - lse[queries].T.unsqueeze(-1)).exp()
        delta = (dout[queries] * out[queries]).sum(-1).T.unsqueeze(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", dout[queries], values) - delta) * slope
        dq[queries] = torch.einsum("hqk,khd->qhd", ds, keys)
        for total, per_head in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[queries])),
            (dv, torch.einsum("hqk,qhd->khd", p, dout[queries])),
        ):
            total[seen] += per_head.unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


class _Attention(ctypes.Structure):
    """As in csrc/attention.cpp."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("size", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("segments", c_int64),
        ("starts", c_void_p),
        ("parents", c_void_p),
        ("queries", c_int64),
        ("rows", c_void_p),
    )


def _description(q, k, v, starts, parents, rows, scale, softcap, window) -> _Attention:
    queries, heads, size = native.check_tensor(q, "q", torch.float32, (None, None, None)).shape
    tokens, kv_heads, _ = native.check_tensor(k, "k", torch.float32, (None, None, size)).shape
    native.check_tensor(v, "v", torch.float32, (tokens, kv_heads, size))
    native.check_tensor(starts, "starts", torch.int64, (None,))
    native.check_tensor(parents, "parents", torch.int64, (None,))
    _check_segments(starts, parents, tokens)
    _check_queries(rows, queries, tokens)
    if size % HEAD_UNIT or kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"native attention takes head sizes that are multiples of {HEAD_UNIT}, in whole groups; got {tuple(q.shape)}."
        )
    pointers = starts.data_ptr(), parents.data_ptr()
    described = _Attention(heads, kv_heads, size, scale, softcap, window, parents.numel(), *pointers)
    if rows is not None:
        # A pointer that is not null says that there are rows, be they none.
        address = native.check_tensor(rows, "rows", torch.int64).data_ptr() if queries else starts.data_ptr()
        described.queries, described.rows = queries, address
    return described


def _forward_native(q, k, v, starts, parents, rows, scale, softcap, window) -> tuple[Tensor, Tensor]:
    described = _description(q, k, v, starts, parents, rows, scale, softcap, window)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    call = native.entry("lt_attention_forward", *[c_void_p] * 6, c_int)
    call(ctypes.addressof(described), *(x.data_ptr() for x in (q, k, v, out, lse)), native.threads())
    return out, lse


def _backward_native(dout, q, k, v, starts, parents, rows, out, lse, scale, softcap, window) -> Three:
    described = _description(q, k, v, starts, parents, rows, scale, softcap, window)
    for tensor, what in ((dout, "the gradient"), (out, "out")):
        native.check_tensor(tensor, what, torch.float32, tuple(q.shape))
    native.check_tensor(lse, "lse", torch.float32, tuple(q.shape[:2]))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call = native.entry("lt_attention_backward", *[c_void_p] * 10, c_int)
    call(ctypes.addressof(described), *(x.data_ptr() for x in (dout, q, k, v, out, lse, dq, dk, dv)), native.threads())
    return dq, dk, dv


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor starts, Tensor parents, Tensor? rows"
_OPTIONS = "float scale, float softcap, int window"
attention_op = define_op(
    "packed_attention",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=_forward_reference,
    fake=lambda q, k, v, *_: (torch.empty_like(q), q.new_empty(q.shape[:2])),
    native_call=_forward_native,
)
attention_backward_op = define_op(
    "packed_attention_backward",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda _, q, k, v, *_rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
    native_call=_backward_native,
)
