"""Normalisation, rotary embedding and gated activations in plain torch: the oracles of elementwise.py's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, plus: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, normed, inverse): sum = x + residual (empty without one), inverse = 1 / sqrt(mean(sum^2) + eps), (T,)."""
    total = x if residual is None else x + residual
    inverse = torch.rsqrt(total.square().mean(-1) + eps)
    normed = total * inverse.unsqueeze(-1) * (weight + plus)
    return (x.new_empty(0) if residual is None else total), normed, inverse


def rms_norm_backward(
    dnormed: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, plus: float, inverse: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight): with g = dnormed (weight + plus) and u = x inverse, dx = inverse (g - u mean(g u)) + dsum."""
    unit = x * inverse.unsqueeze(-1)
    g = dnormed * (weight + plus)
    dx = inverse.unsqueeze(-1) * (g - unit * (g * unit).mean(-1, keepdim=True))
    dx = dx if dsum is None else dx + dsum
    return dx, (dnormed * unit).sum(0) if wants_weight else x.new_empty(0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, mean, inverse), the last two (T,)."""
    mean = x.mean(-1)
    centred = x - mean.unsqueeze(-1)
    inverse = torch.rsqrt(centred.square().mean(-1) + eps)
    normed = centred * inverse.unsqueeze(-1) * weight
    return (normed if bias is None else normed + bias), mean, inverse


def layer_norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias): with g = dnormed weight and u = (x - mean) inverse, dx = inverse (g - mean(g) - u mean(g u))."""
    unit = (x - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
    g = dnormed * weight
    dx = inverse.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))
    if not wants_weight:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, (dnormed * unit).sum(0), dnormed.sum(0)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """A new tensor (T, heads, D) whose first R values of a head turn: (a, b) -> (a cos - b sin, b cos' + a sin')."""
    size = cos.shape[-1]
    half = size // 2
    first, second, rest = x[..., :half], x[..., half:size], x[..., size:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    cos_a, cos_b, sin_a, sin_b = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if transposed:
        return torch.cat([first * cos_a + second * sin_b, second * cos_b - first * sin_a, rest], -1)
    return torch.cat([first * cos_a - second * sin_a, second * cos_b + first * sin_b, rest], -1)


def rotary_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> None:
    q.copy_(rotary(q, cos, sin, transposed))
    k.copy_(rotary(k, cos, sin, transposed))


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """act(gate) * up with the activation GATES[kind]."""
    return (F.silu(gate) if kind == 0 else F.gelu(gate, approximate="tanh")) * up


def gated_backward(dout: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """(dgate, dup)"""
    if kind == 0:
        sigmoid = torch.sigmoid(gate)
        act, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate**3)
        tanh = torch.tanh(inner)
        act = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * 0.7978845608028654 * (1 + 3 * 0.044715 * gate**2)
    return dout * up * slope, dout * act
