"""The loss of the language model's head: cross entropy of a frozen matrix's logits, which never exist as a whole."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import ShapeError
from luthier.kernels import linear_native, native
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.linear_ops import Part, flatten, unflatten
from luthier.kernels.registry import define_op
from luthier.kernels.storage import Storage

LOGITS_BYTES = 24 * 2**20
FEWEST_ROWS, MOST_ROWS = 64, 640
SUMMED_AT_ONCE = 16384


def linear_cross_entropy(
    hidden: Tensor,
    head: Storage,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, each row's loss) of predicting targets from hidden states through a frozen head.

    z = scale (hidden W^T + bias), then softcap tanh(z / softcap) if given; loss = logsumexp(z) - (1 - e) z[target]
    - e mean(z) with e = label_smoothing. Only the sum carries a gradient, and only to hidden; it is computed in the
    same pass, so that no logits are kept. They exist for a few rows at a time: 24 MiB, or 64 rows where those are more.
    hidden: (S, width), float32; W: (vocabulary, width); targets: (S,) int64. -> float32 () and (S,).
    Raises ShapeError for other dtypes and sizes, and for a target outside the vocabulary.
    """
    _check(hidden, head, targets, bias, softcap, label_smoothing)
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    options = (scale, softcap or 0.0, label_smoothing, wants_gradient)
    return _LinearCrossEntropy.apply(hidden.contiguous(), head, bias, targets.contiguous(), options)


def rows_at_once(rows: int, vocabulary: int) -> int:
    """Rows whose logits are held at the same time: equal pieces of all rows."""
    most = max(FEWEST_ROWS, min(MOST_ROWS, LOGITS_BYTES // (4 * vocabulary)))
    pieces = -(-rows // most)
    return -(-rows // pieces) if pieces else 1


def _check(hidden, head, targets, bias, softcap, label_smoothing) -> None:
    vocabulary, width = head.shape
    if hidden.ndim != 2 or hidden.shape[1] != width or hidden.dtype != torch.float32:
        raise ShapeError(f"hidden must be float32 of shape (S, {width}); got {tuple(hidden.shape)} {hidden.dtype}.")
    if targets.dtype != torch.int64 or tuple(targets.shape) != (hidden.shape[0],):
        raise ShapeError(f"targets must be int64 of shape ({hidden.shape[0]},); got {tuple(targets.shape)} {targets.dtype}.")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise ShapeError(
            f"targets must lie in [0, {vocabulary}); got {int(targets.min())} to {int(targets.max())}. "
            "Pass supervised rows only: there is no index that is ignored."
        )
    if bias is not None and (tuple(bias.shape) != (vocabulary,) or bias.dtype != torch.float32):
        raise ShapeError(f"bias must be float32 of shape ({vocabulary},); got {tuple(bias.shape)} {bias.dtype}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ShapeError(f"softcap must be above 0 and finite, or None for no cap; got {softcap}.")
    if not 0 <= label_smoothing < 1:
        raise ShapeError(f"label_smoothing must be in [0, 1); got {label_smoothing}.")


def _summed(losses: Tensor) -> Tensor:
    """The sum, in pieces that torch adds on one thread, so that its order does not depend on their number."""
    pieces = [piece.sum(dtype=torch.float64) for piece in losses.split(SUMMED_AT_ONCE)]
    return torch.stack(pieces).sum().to(torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, targets, options):
        stored, layout, numbers, *_ = flatten([Part(head)])
        losses, dhidden = cross_entropy_op(hidden, stored, layout, numbers, bias, targets, *options)
        ctx.save_for_backward(dhidden)
        ctx.mark_non_differentiable(losses)
        return _summed(losses), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _dlosses):
        (dhidden,) = ctx.saved_tensors
        return dhidden * dloss, None, None, None, None


def _reference(hidden, stored, layout, numbers, bias, targets, scale, softcap, smoothing, gradient) -> tuple[Tensor, Tensor]:
    (part,) = unflatten(stored, layout, numbers, [bias], [None], [None])
    weight = dequantize_reference(part.storage)
    losses, gradients = [], []
    for rows, wanted in zip(hidden.split(FEWEST_ROWS), targets.split(FEWEST_ROWS), strict=True):
        logits = F.linear(rows, weight, bias) * scale
        slope = torch.full_like(logits, scale)
        if softcap:
            tanh = torch.tanh(logits / softcap)
            logits, slope = softcap * tanh, scale * (1 - tanh.square())
        losses.append(F.cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing))
        if gradient:
            aim = F.one_hot(wanted, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
            gradients.append(((logits.softmax(-1) - aim) * slope) @ weight)
    return torch.cat(losses), torch.cat(gradients) if gradient else hidden.new_empty(0)


def _fake(hidden, stored, layout, numbers, bias, targets, scale, softcap, smoothing, gradient) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[0]), torch.empty_like(hidden) if gradient else hidden.new_empty(0)


def _room_of_a_row(vocabulary: int, width: int) -> int:
    function = native.library().lt_head_room
    function.argtypes, function.restype = (c_int64, c_int64), c_int64
    return function(vocabulary, width)


def _native(hidden, stored, layout, numbers, bias, targets, scale, softcap, smoothing, gradient) -> tuple[Tensor, Tensor]:
    (matrix,) = linear_native.matrices(stored, layout, numbers)
    rows, _ = native.check_tensor(hidden, "hidden", torch.float32, (None, matrix.cols)).shape
    native.check_tensor(targets, "targets", torch.int64, (rows,))
    if bias is not None:
        native.check_tensor(bias, "bias", torch.float32, (matrix.rows,))
    losses, dhidden = _fake(hidden, stored, layout, numbers, bias, targets, scale, softcap, smoothing, gradient)
    if rows == 0:
        return losses, dhidden
    chunk = rows_at_once(rows, matrix.rows)
    room = hidden.new_empty(chunk, _room_of_a_row(matrix.rows, matrix.cols))
    call = native.entry(
        "lt_linear_cross_entropy",
        *[c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float],
        *[c_void_p, c_int64, c_void_p, c_void_p, c_int],
    )
    inputs = (hidden.data_ptr(), rows, ctypes.addressof(matrix), None if bias is None else bias.data_ptr(), targets.data_ptr())
    outputs = (losses.data_ptr(), dhidden.data_ptr() if gradient else None)
    call(*inputs, scale, softcap, smoothing, room.data_ptr(), chunk, *outputs, native.threads())
    return losses, dhidden


cross_entropy_op = define_op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor[] stored, int[] layout, float[] numbers, Tensor? bias, Tensor targets, float scale, "
    "float softcap, float smoothing, bool gradient) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    native_call=_native,
)
