"""The ops behind elementwise.py: schemas, fakes, and the calls of the library with their checks."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.kernels import elementwise_reference as reference
from luthier.kernels import native
from luthier.kernels.registry import define_op

F32 = torch.float32
Three = tuple[Tensor, Tensor, Tensor]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rms_norm_native(x: Tensor, residual: Tensor | None, weight: Tensor, plus: float, eps: float) -> Three:
    rows, width = native.check_tensor(x, "x", F32, (None, None)).shape
    native.check_tensor(weight, "the norm's weight", F32, (width,))
    if residual is not None:
        native.check_tensor(residual, "residual", F32, (rows, width))
    total, normed, inverse = _rms_norm_fake(x, residual, weight, plus, eps)
    if rows > 0:
        call = native.entry("lt_rms_norm", *[c_void_p] * 3, *[c_float] * 2, *[c_int64] * 2, *[c_void_p] * 3, c_int)
        summed = None if residual is None else total.data_ptr()
        addresses = (x.data_ptr(), _address(residual), weight.data_ptr())
        call(*addresses, plus, eps, rows, width, summed, normed.data_ptr(), inverse.data_ptr(), native.threads())
    return total, normed, inverse


def _rms_norm_fake(x: Tensor, residual: Tensor | None, weight: Tensor, plus: float, eps: float) -> Three:
    return x.new_empty(0) if residual is None else torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1])


def _rms_norm_backward_native(
    dnormed: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, plus: float, inverse: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    rows, width = native.check_tensor(x, "x", F32, (None, None)).shape
    native.check_tensor(dnormed, "the gradient of normed", F32, (rows, width))
    native.check_tensor(weight, "the norm's weight", F32, (width,))
    native.check_tensor(inverse, "inverse", F32, (rows,))
    if dsum is not None:
        native.check_tensor(dsum, "the gradient of the sum", F32, (rows, width))
    dx, dweight = _rms_norm_backward_fake(dnormed, dsum, x, weight, plus, inverse, wants_weight)
    if rows == 0:
        return dx, dweight.zero_()
    call = native.entry("lt_rms_norm_backward", *[c_void_p] * 4, c_float, c_void_p, *[c_int64] * 2, *[c_void_p] * 2, c_int)
    addresses = (dnormed.data_ptr(), _address(dsum), x.data_ptr(), weight.data_ptr())
    wanted = dweight.data_ptr() if wants_weight else None
    call(*addresses, plus, inverse.data_ptr(), rows, width, dx.data_ptr(), wanted, native.threads())
    return dx, dweight


def _rms_norm_backward_fake(dnormed, dsum, x, weight, plus, inverse, wants_weight) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight) if wants_weight else x.new_empty(0)


def _layer_norm_native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Three:
    rows, width = native.check_tensor(x, "x", F32, (None, None)).shape
    native.check_tensor(weight, "the norm's weight", F32, (width,))
    if bias is not None:
        native.check_tensor(bias, "the norm's bias", F32, (width,))
    normed, mean, inverse = _layer_norm_fake(x, weight, bias, eps)
    if rows > 0:
        call = native.entry("lt_layer_norm", *[c_void_p] * 3, c_float, *[c_int64] * 2, *[c_void_p] * 3, c_int)
        outputs = (normed.data_ptr(), mean.data_ptr(), inverse.data_ptr())
        call(x.data_ptr(), weight.data_ptr(), _address(bias), eps, rows, width, *outputs, native.threads())
    return normed, mean, inverse


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Three:
    return torch.empty_like(x), x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])


def _layer_norm_backward_native(
    dnormed: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, wants_weight: bool
) -> Three:
    rows, width = native.check_tensor(x, "x", F32, (None, None)).shape
    native.check_tensor(dnormed, "the gradient of normed", F32, (rows, width))
    native.check_tensor(weight, "the norm's weight", F32, (width,))
    for tensor in (mean, inverse):
        native.check_tensor(tensor, "a row's statistic", F32, (rows,))
    dx, dweight, dbias = _layer_norm_backward_fake(dnormed, x, weight, mean, inverse, wants_weight)
    if rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    call = native.entry("lt_layer_norm_backward", *[c_void_p] * 5, *[c_int64] * 2, *[c_void_p] * 3, c_int)
    wanted = (dweight.data_ptr(), dbias.data_ptr()) if wants_weight else (None, None)
    addresses = (dnormed.data_ptr(), x.data_ptr(), weight.data_ptr(), mean.data_ptr(), inverse.data_ptr())
    call(*addresses, rows, width, dx.data_ptr(), *wanted, native.threads())
    return dx, dweight, dbias


def _layer_norm_backward_fake(dnormed, x, weight, mean, inverse, wants_weight) -> Three:
    dweight, dbias = (torch.empty_like(weight) if wants_weight else x.new_empty(0) for _ in range(2))
    return torch.empty_like(x), dweight, dbias


def check_heads(x: Tensor, what: str, *, in_place: bool = False) -> Tensor:
    """x itself if it is (T, heads, D) float32 on the CPU with the heads of a row side by side.

    Rows may be apart, and may share memory where they are only read, which `in_place` says they are not.
    """
    if x.dtype != F32 or x.device.type != "cpu":
        raise ShapeError(f"{what} must be float32 on the CPU; got {x.dtype} on {x.device}. Try .float().")
    if x.ndim != 3 or (x.numel() > 0 and not _has_whole_rows(x)):
        raise ShapeError(f"{what} must be (T, heads, D) with contiguous rows; got {tuple(x.shape)} with strides {x.stride()}.")
    tokens, heads, size = x.shape
    if in_place and x.numel() > 0 and tokens > 1 and x.stride(0) < heads * size:
        raise ShapeError(f"{what} is turned in place, so its rows must not overlap; got strides {x.stride()}. Try .clone().")
    return _check_address(x, what)


def _has_whole_rows(x: Tensor) -> bool:
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _check_address(x: Tensor, what: str) -> Tensor:
    if x.data_ptr() % x.element_size():
        raise ShapeError(f"{what} must be aligned to its {x.element_size()}-byte elements; its address is odd. Try .clone().")
    return x


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    size = cos.shape[-1]
    if size % 2 or not 2 <= size <= x.shape[2]:
        raise ShapeError(f"rotary tables have an even width of at most the head size {x.shape[2]}; got {size}.")
    native.check_tensor(cos, "cos", F32, (x.shape[0], size))
    native.check_tensor(sin, "sin", F32, (x.shape[0], size))


def _turn(x: Tensor, to: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> None:
    (tokens, heads, head_size), size = x.shape, cos.shape[-1]
    if tokens == 0 or heads == 0:
        return
    pointers = (x.data_ptr(), x.stride(0), to.data_ptr(), to.stride(0))
    call = native.entry("lt_rotary", *[c_void_p, c_int64] * 2, *[c_int64] * 2, *[c_void_p] * 2, *[c_int64] * 2, *[c_int] * 2)
    call(*pointers, heads, head_size, cos.data_ptr(), sin.data_ptr(), size, tokens, int(transposed), native.threads())


def _rotary_native(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    _check_tables(check_heads(x, "x"), cos, sin)
    out = _rotary_fake(x, cos, sin, transposed)
    _turn(x, out, cos, sin, transposed)
    return out


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rotary_in_place_native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> None:
    for x, what in ((q, "q"), (k, "k")):
        _check_tables(check_heads(x, what, in_place=True), cos, sin)
    for x in (q, k):
        _turn(x, x, cos, sin, transposed)


def _rotary_in_place_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> None:
    return None


def _check_rows(x: Tensor, what: str, shape: tuple[int, int]) -> Tensor:
    if x.dtype != F32 or x.device.type != "cpu" or tuple(x.shape) != shape or (x.numel() > 0 and x.stride(1) != 1):
        raise ShapeError(
            f"{what} must be a float32 matrix {shape} on the CPU with contiguous rows; "
            f"got {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}."
        )
    return _check_address(x, what)


def _gated_native(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    rows, width = shape = (gate.shape[0], gate.shape[1]) if gate.ndim == 2 else (0, 0)
    _check_rows(gate, "gate", shape)
    _check_rows(up, "up", shape)
    out = _gated_fake(gate, up, kind)
    if out.numel() > 0:
        call = native.entry("lt_gated", c_int, *[c_void_p, c_int64] * 2, *[c_int64] * 2, c_void_p, c_int)
        call(kind, gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), rows, width, out.data_ptr(), native.threads())
    return out


def _gated_fake(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_backward_native(dout: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    rows, width = shape = (gate.shape[0], gate.shape[1]) if gate.ndim == 2 else (0, 0)
    _check_rows(gate, "gate", shape)
    _check_rows(up, "up", shape)
    native.check_tensor(dout, "the gradient", F32, shape)
    dgate, dup = _gated_backward_fake(dout, gate, up, kind)
    if dout.numel() > 0:
        call = native.entry(
            "lt_gated_backward", c_int, c_void_p, *[c_void_p, c_int64] * 2, *[c_int64] * 2, *[c_void_p] * 2, c_int
        )
        inputs = (dout.data_ptr(), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0))
        call(kind, *inputs, rows, width, dgate.data_ptr(), dup.data_ptr(), native.threads())
    return dgate, dup


def _gated_backward_fake(dout: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


rms_norm_op = define_op(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float plus, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.rms_norm,
    fake=_rms_norm_fake,
    native_call=_rms_norm_native,
)
rms_norm_backward_op = define_op(
    "rms_norm_backward",
    "(Tensor dnormed, Tensor? dsum, Tensor x, Tensor weight, float plus, Tensor inverse, bool wants_weight) "
    "-> (Tensor, Tensor)",
    reference=reference.rms_norm_backward,
    fake=_rms_norm_backward_fake,
    native_call=_rms_norm_backward_native,
)
layer_norm_op = define_op(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm,
    fake=_layer_norm_fake,
    native_call=_layer_norm_native,
)
layer_norm_backward_op = define_op(
    "layer_norm_backward",
    "(Tensor dnormed, Tensor x, Tensor weight, Tensor mean, Tensor inverse, bool wants_weight) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_backward,
    fake=_layer_norm_backward_fake,
    native_call=_layer_norm_backward_native,
)
rotary_op = define_op(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor",
    reference=reference.rotary,
    fake=_rotary_fake,
    native_call=_rotary_native,
)
rotary_in_place_op = define_op(
    "rotary_",
    "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool transposed) -> ()",
    reference=reference.rotary_in_place,
    fake=_rotary_in_place_fake,
    native_call=_rotary_in_place_native,
)
gated_op = define_op(
    "gated",
    "(Tensor gate, Tensor up, int kind) -> Tensor",
    reference=reference.gated,
    fake=_gated_fake,
    native_call=_gated_native,
)
gated_backward_op = define_op(
    "gated_backward",
    "(Tensor dout, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    reference=reference.gated_backward,
    fake=_gated_backward_fake,
    native_call=_gated_backward_native,
)
