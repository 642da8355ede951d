"""Causal attention over documents packed end to end: each attends only to itself, and to a prefix that all may share."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import ShapeError
from luthier.kernels import native
from luthier.kernels.registry import define_op

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
    prefix: int = 0,
) -> Tensor:
    """softmax(cap(scale q k^T)) v, causal, inside each document; never a mask or scores over the whole pack.

    q: (T, H, D), k and v: (T, H_kv, D), float32; head h reads key head h // (H / H_kv). -> (T, H, D).
    starts: (N + 1,) int64, rising from `prefix` to T: document n is [starts[n], starts[n + 1]).
    prefix: the first `prefix` tokens come before every document: they attend to themselves, each document attends to
    all of them and to itself, and their gradients are summed over the documents.
    window: a token sees itself and window - 1 tokens before it, counted in the document's positions (behind the prefix).
    softcap: scores s become softcap tanh(s / softcap). Backward computes the scores again from the kept log sums.
    Raises ShapeError for other dtypes and sizes, or starts that do not cover the pack.
    """
    _check(q, k, v, starts, window, softcap, prefix)
    size = q.shape[2]
    padding = -size % HEAD_UNIT
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    options = (scale, softcap or 0.0, window or 0, prefix)
    out = _PackedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), starts.contiguous(), options)
    return out[..., :size] if padding else out


def _check(q, k, v, starts, window, softcap, prefix) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ShapeError(
            f"q is (T, H, D), k and v are (T, H_kv, D); got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if any(x.dtype != torch.float32 for x in (q, k, v)):
        raise ShapeError(f"q, k and v must be float32; got {q.dtype}, {k.dtype} and {v.dtype}. Try .float().")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"the key heads must divide the query heads; got {k.shape[1]} and {q.shape[1]}.")
    if not 1 <= q.shape[2] <= MOST_HEAD:
        raise ShapeError(f"the head size must be between 1 and {MOST_HEAD}; got {q.shape[2]}.")
    if window is not None and window < 1:
        raise ShapeError(f"window must be at least 1, or None for no window; got {window}.")
    if softcap is not None and not softcap > 0:
        raise ShapeError(f"softcap must be above 0, or None for no cap; got {softcap}.")
    _check_starts(starts, q.shape[0], prefix)


def _check_starts(starts: Tensor, tokens: int, prefix: int) -> None:
    if starts.ndim != 1 or starts.numel() < 1 or starts.dtype != torch.int64 or starts.device.type != "cpu":
        raise ShapeError(
            f"starts must be int64 of shape (N + 1,) on the CPU; got {tuple(starts.shape)} {starts.dtype} {starts.device}."
        )
    first, last = int(starts[0]), int(starts[-1])
    if prefix < 0 or first != prefix or last != tokens or bool((starts.diff() < 0).any()):
        raise ShapeError(
            f"starts must rise from the prefix's length {prefix} to the number of tokens {tokens}; "
            f"got {starts[:8].tolist()}{' ...' if starts.numel() > 8 else ''} ending with {last}."
        )


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, options):
        out, lse = attention_op(q, k, v, starts, *options)
        ctx.options = options
        ctx.save_for_backward(q, k, v, starts, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, starts, out, lse = ctx.saved_tensors
        return *attention_backward_op(dout.contiguous(), q, k, v, starts, out, lse, *ctx.options), None, None


def _spans(starts: Tensor, prefix: int) -> list[tuple[int, int, int]]:
    """(begin, end, prefix tokens before it) of the prefix, if there is one, and of every document."""
    documents = [(begin, end, prefix) for begin, end in pairwise(starts.tolist()) if end > begin]
    return [(0, prefix, 0), *documents] if prefix else documents


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float, window: int, before: int) -> tuple[Tensor, Tensor]:
    """(scores, d score / d (q k^T)), (H, L, before + L), -inf where a query sees no key."""
    raw = torch.einsum("qhd,khd->hqk", q, k) * scale
    slope = torch.full_like(raw, scale)
    if softcap:
        tanh = torch.tanh(raw / softcap)
        raw, slope = softcap * tanh, scale * (1 - tanh.square())
    distance = torch.arange(q.shape[0], device=q.device).unsqueeze(1) + before - torch.arange(k.shape[0], device=q.device)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return raw.masked_fill(hidden, -torch.inf), slope


def _with_prefix(x: Tensor, begin: int, end: int, before: int, group: int) -> Tensor:
    """The prefix's rows and the span's, repeated for each query head."""
    return torch.cat([x[:before], x[begin:end]]).repeat_interleave(group, 1)


def _forward_reference(q, k, v, starts, scale, softcap, window, prefix) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    group = q.shape[1] // k.shape[1]
    for begin, end, before in _spans(starts, prefix):
        keys, values = (_with_prefix(x, begin, end, before, group) for x in (k, v))
        scores, _ = _scores(q[begin:end], keys, scale, softcap, window, before)
        lse[begin:end] = scores.logsumexp(-1).T
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse


def _backward_reference(dout, q, k, v, starts, out, lse, scale, softcap, window, prefix) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    for begin, end, before in _spans(starts, prefix):
        keys, values = (_with_prefix(x, begin, end, before, group) for x in (k, v))
        scores, slope = _scores(q[begin:end], keys, scale, softcap, window, before)
        p = (scores - lse[begin:end].T.unsqueeze(-1)).exp()
        delta = (dout[begin:end] * out[begin:end]).sum(-1).T.unsqueeze(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", dout[begin:end], values) - delta) * slope
        dq[begin:end] = torch.einsum("hqk,khd->qhd", ds, keys)
        for total, per_head in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[begin:end])),
            (dv, torch.einsum("hqk,qhd->khd", p, dout[begin:end])),
        ):
            grouped = per_head.unflatten(1, (-1, group)).sum(2)
            total[:before] += grouped[:before]
            total[begin:end] += grouped[before:]
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
        ("prefix", c_int64),
        ("documents", c_int64),
        ("starts", c_void_p),
    )


def _description(q, k, v, starts, scale, softcap, window, prefix) -> _Attention:
    tokens, heads, size = native.check_tensor(q, "q", torch.float32, (None, None, None)).shape
    kv_heads = native.check_tensor(k, "k", torch.float32, (tokens, None, size)).shape[1]
    native.check_tensor(v, "v", torch.float32, (tokens, kv_heads, size))
    native.check_tensor(starts, "starts", torch.int64, (None,))
    _check_starts(starts, tokens, prefix)
    if size % HEAD_UNIT or kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"native attention takes head sizes that are multiples of {HEAD_UNIT}, in whole groups; got {tuple(q.shape)}."
        )
    return _Attention(heads, kv_heads, size, scale, softcap, window, prefix, starts.numel() - 1, starts.data_ptr())


def _forward_native(q, k, v, starts, scale, softcap, window, prefix) -> tuple[Tensor, Tensor]:
    described = _description(q, k, v, starts, scale, softcap, window, prefix)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    call = native.entry("lt_attention_forward", *[c_void_p] * 6, c_int)
    call(ctypes.addressof(described), *(x.data_ptr() for x in (q, k, v, out, lse)), native.threads())
    return out, lse


def _backward_native(dout, q, k, v, starts, out, lse, scale, softcap, window, prefix) -> tuple[Tensor, Tensor, Tensor]:
    described = _description(q, k, v, starts, scale, softcap, window, prefix)
    for tensor, what in ((dout, "the gradient"), (out, "out")):
        native.check_tensor(tensor, what, torch.float32, tuple(q.shape))
    native.check_tensor(lse, "lse", torch.float32, tuple(q.shape[:2]))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call = native.entry("lt_attention_backward", *[c_void_p] * 10, c_int)
    call(ctypes.addressof(described), *(x.data_ptr() for x in (dout, q, k, v, out, lse, dq, dk, dv)), native.threads())
    return dq, dk, dv


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor starts"
_OPTIONS = "float scale, float softcap, int window, int prefix"
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
