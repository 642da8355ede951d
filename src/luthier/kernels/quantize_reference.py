"""The quantisers in plain torch: bitsandbytes' NF4, and the GGUF block formats that llama.cpp reads.

Everything here works on any device and is the oracle for the native versions, which give the same bytes: sums run
in a stated order (`_summed`), and products are rounded before they are added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luthier.kernels.storage import NF4_BLOCK

NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
K_BLOCK = 256


def nf4_codes(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of 4-bit NormalFloat, ascending, float32 (QLoRA, arXiv:2305.14314, appendix E)."""
    return torch.tensor(NF4_CODES, dtype=torch.float32, device=device)


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of the flat row-major weight in blocks of 64.

    codes: uint8 (ceil(n / 2), 1), the even element in the high nibble; absmax: float32 (ceil(n / 64),). A block is
    multiplied by 1 / max(absmax, 1e-38); a last block that is not full is divided instead, and its absmax is raised
    to 1e-38: so does bitsandbytes, and the last bit of a code can hang on it. A block with NaN or Inf has absmax NaN.
    """
    flat = weight.reshape(-1).to(torch.float32)
    whole = flat.numel() // NF4_BLOCK * NF4_BLOCK
    blocks, tail = flat[:whole].view(-1, NF4_BLOCK), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
    if tail.numel():
        tail_absmax = tail.abs().amax(0, keepdim=True).clamp(min=1e-38)
        absmax = torch.cat([absmax, tail_absmax])
        scaled = torch.cat([scaled, tail / tail_absmax])
    levels = nf4_codes(weight.device)
    codes = torch.bucketize(scaled.clamp(-1, 1), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7)])  # 7 is the code of zero
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending, float32.

    A value is +-10^(e-6) times the middle of one of 2^e equal steps of [0.1, 1], e = 0..6; then 0 and 1.
    Source: 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, as bitsandbytes tabulates it.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        # The power of ten is a float64 in the original, and its product with a middle is rounded once to float32.
        middles = (((steps[1:] + steps[:-1]) / 2.0) * (10.0 ** (exponent - 6))).to(torch.float32)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def dynamic_lookup() -> Tensor:
    """Code of the dynamic map for each of 65536 equal steps of [-1, 1], uint8: bitsandbytes rounds through this table."""
    codes = dynamic_map()
    points = (torch.arange(65536, dtype=torch.float64) / 32767.5 - 1.0).to(torch.float32)
    right = torch.bucketize(points, codes).clamp(1, 255)
    left = right - 1
    nearer_right = (codes[right] - points).abs() < (points - codes[left]).abs()
    return torch.where(nearer_right, right, left).to(torch.uint8)


def _summed(values: Tensor) -> Tensor:
    """Sum over the last dimension from its first element to its last, the order in which the native version adds."""
    total = values[..., 0]
    for index in range(1, values.shape[-1]):
        total = total + values[..., index]
    return total


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite: a block whose scale is zero or too small is stored as zeros."""
    inverse = 1.0 / scale
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _half_bytes(values: Tensor) -> Tensor:
    """float32 (n, m) -> the float16 nearest to each as bytes, uint8 (n, 2 m)."""
    return values.to(torch.float16).view(torch.uint8)


def packed_nibbles(q: Tensor) -> Tensor:
    """(n, 32) values 0..15 -> (n, 16) bytes; byte j holds value j low and value j + 16 high."""
    return q[:, :16] | (q[:, 16:] << 4)


def _quantize_q4_0(blocks: Tensor) -> Tensor:
    """d = (the value of largest magnitude) / -8; q = trunc(x / d + 8.5), at most 15."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    q = (blocks * _reciprocal(scale) + 8.5).clamp(0, 15).to(torch.uint8)
    return torch.cat([_half_bytes(scale), packed_nibbles(q)], 1)


def _quantize_q4_1(blocks: Tensor) -> Tensor:
    """d = (max - min) / 15; q = trunc((x - min) / d + 0.5), at most 15."""
    low = blocks.amin(1, keepdim=True)
    low = torch.where(low == 0, 0.0, low)  # -0 becomes 0
    scale = ((blocks.amax(1, keepdim=True) - low) / 15).abs()
    q = ((blocks - low) * _reciprocal(scale) + 0.5).clamp(0, 15).to(torch.uint8)
    return torch.cat([_half_bytes(scale), _half_bytes(low), packed_nibbles(q)], 1)


def _quantize_q8_0(blocks: Tensor) -> Tensor:
    """d = absmax / 127; q = x / d rounded to nearest, halves away from zero."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _reciprocal(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = whole + (2 * (magnitude - whole)).floor()
    q = (scaled.sign() * rounded).to(torch.int8).view(torch.uint8)
    return torch.cat([_half_bytes(scale), q], 1)


def _affine_fit(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, lift) >= 0 of x ~ scale q - lift, q in 0..15, by weighted least squares over 22 roundings of x.

    x, weight: (..., 32). The first candidate spans min..max in 15 steps; the others take 14 to 16 steps, each with the
    scale and lift that minimise sum w (scale q - lift - x)^2 for its rounding. The best of all is kept.
    """
    low = x.amin(-1).clamp(max=0)
    high = x.amax(-1)
    span = (high - low).abs()  # never -0
    sum_w, sum_wx = _summed(weight), _summed(weight * x)
    best_scale, best_lift = span / 15, 0.0 - low
    best_error = None
    for step in range(-1, 21):
        inverse = (15.0 if step < 0 else 14.0 + 0.1 * step) * _reciprocal(span)
        q = ((x - low.unsqueeze(-1)) * inverse.unsqueeze(-1)).round().clamp(0, 15)
        if step < 0:
            scale, lift = best_scale, best_lift
        else:
            scale, lift = _least_squares(q, x, weight, sum_w, sum_wx)
        residual = (scale.unsqueeze(-1) * q - lift.unsqueeze(-1)) - x
        error = _summed(weight * (residual * residual))
        if best_error is None:
            best_error = error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_lift = torch.where(better, lift, best_lift)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_lift


def _least_squares(q: Tensor, x: Tensor, weight: Tensor, sum_w: Tensor, sum_wx: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and lift that minimise sum w (scale q - lift - x)^2; lift is held at 0 where it would be negative."""
    wq = weight * q
    sum_wq, sum_wqq, sum_wqx = _summed(wq), _summed(wq * q), _summed(wq * x)
    determinant = sum_w * sum_wqq - sum_wq * sum_wq
    inverse = torch.where(determinant > 0, 1.0 / determinant, 0.0)
    scale = (sum_w * sum_wqx - sum_wx * sum_wq) * inverse
    lift = (sum_wq * sum_wqx - sum_wqq * sum_wx) * inverse
    through_zero = torch.where(sum_wqq > 0, sum_wqx / sum_wqq, 0.0)
    negative = lift < 0
    return torch.where(negative, through_zero, scale).clamp(min=0), torch.where(negative, 0.0, lift)


def _quantize_q4_k(blocks: Tensor) -> Tensor:
    """Eight sub-blocks of 32, x ~ d s q - dmin m, with 6-bit s and m and float16 d and dmin.

    A weight's error counts sqrt(mean x^2) + |x|. After the scales are rounded, q is rounded again to them.
    """
    x = blocks.view(-1, 8, 32)
    # The root is taken in float64, since torch's float32 root may be off by one in the last place.
    magnitude = (_summed(x * x) / 32).to(torch.float64).sqrt().to(torch.float32)
    weight = magnitude.unsqueeze(-1) + x.abs()
    scale, lift = _affine_fit(x, weight)
    d, scale_6bit = _six_bits(scale)
    dmin, lift_6bit = _six_bits(lift)
    step = (d.to(torch.float32) * scale_6bit).unsqueeze(-1)
    offset = (dmin.to(torch.float32) * lift_6bit).unsqueeze(-1)
    q = ((x + offset) * _reciprocal(step)).round().clamp(0, 15).to(torch.uint8)
    pairs = q.view(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    s, m = scale_6bit.to(torch.uint8), lift_6bit.to(torch.uint8)
    scales = torch.cat(
        [s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6), (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1
    )
    return torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), scales, packed], 1)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 8) non-negative -> (float16 (n, 1) unit, float32 (n, 8) the multiples 0..63 of that unit that come nearest)."""
    unit = (values.amax(1, keepdim=True) / 63).to(torch.float16)
    multiples = (values * _reciprocal(unit.to(torch.float32))).round().clamp(0, 63)
    return unit, multiples


def _quantize_q6_k(blocks: Tensor) -> Tensor:
    """Sixteen sub-blocks of 16, x ~ d s q, q in -32..31, 8-bit s and float16 d. A weight's error counts x^2."""
    x = blocks.view(-1, 16, 16)
    scale = _symmetric_fit(x)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (largest / -128).to(torch.float16)
    scale_8bit = (scale * _reciprocal(d.to(torch.float32))).round().clamp(-128, 127)
    step = (d.to(torch.float32) * scale_8bit).unsqueeze(-1)
    q = ((x * _reciprocal(step)).round().clamp(-32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    packed_low = torch.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], 2).reshape(-1, 128)
    packed_high = (high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)).reshape(-1, 64)
    return torch.cat([packed_low, packed_high, scale_8bit.to(torch.int8).view(torch.uint8), d.view(torch.uint8)], 1)


def _symmetric_fit(x: Tensor) -> Tensor:
    """The scale of x ~ scale q, q in -32..31, that minimises sum x^2 (scale q - x)^2 over 19 roundings of x.

    x: (..., 16). The value of largest magnitude goes to -(32 + 0.1 k), k = -9..9; for each rounding the best scale is
    sum(w q x) / sum(w q^2), and it lowers the error by sum(w q x)^2 / sum(w q^2).
    """
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    weight = x * x
    inverse = -_reciprocal(largest)
    best_scale, best_gain = torch.zeros_like(largest), torch.zeros_like(largest)
    for step in (0, *range(-9, 0), *range(1, 10)):
        q = (x * ((32.0 + 0.1 * step) * inverse).unsqueeze(-1)).round().clamp(-32, 31)
        wq = weight * q
        sum_wqx, sum_wqq = _summed(wq * x), _summed(wq * q)
        scale = torch.where(sum_wqq > 0, sum_wqx / sum_wqq, 0.0)
        gain = scale * sum_wqx
        better = gain > best_gain
        best_scale = torch.where(better, scale, best_scale)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale


GGUF_QUANTIZERS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (32, _quantize_q4_0),
    "Q4_1": (32, _quantize_q4_1),
    "Q8_0": (32, _quantize_q8_0),
    "Q4_K": (K_BLOCK, _quantize_q4_k),
    "Q6_K": (K_BLOCK, _quantize_q6_k),
}


# Where in a block its float16 scale d stands; Q4_1 and Q4_K have a minimum behind it, another float16.
GGUF_SCALE_OFFSETS = {"Q4_0": 0, "Q4_1": 0, "Q8_0": 0, "Q4_K": 0, "Q6_K": 208}


def gguf_quantize(weight: Tensor, kind: str) -> Tensor:
    """The rows of `weight` as GGUF blocks of `kind`: float (rows, columns) -> uint8 (rows, columns / block * bytes).

    A block with NaN or Inf is stored with scale NaN and zeros.
    """
    block, quantize = GGUF_QUANTIZERS[kind]
    blocks = weight.to(torch.float32).reshape(-1, block)
    bad = ~blocks.isfinite().all(1)
    stored = quantize(torch.where(bad.unsqueeze(1), 0.0, blocks))
    at = GGUF_SCALE_OFFSETS[kind]
    stored[bad, at : at + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8, device=weight.device)
    return stored.view(weight.shape[0], -1)
