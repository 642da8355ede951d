"""The C side of `frozen_linear`: structures as in csrc/linear.h, checks, calls."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.kernels import native
from luthier.kernels.storage import KINDS

F32 = torch.float32
NF4 = KINDS.index("nf4")


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("transposed", c_int32),
        ("rows", c_int64),
        ("cols", c_int64),
        ("data", c_void_p),
        ("absmax", c_void_p),
        ("absmax_bytes", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_map", c_void_p),
        ("code", c_void_p),
        ("offset", c_float),
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        ("matrix", POINTER(_Matrix)),
        ("bias", c_void_p),
        ("A", c_void_p),
        ("B", c_void_p),
        ("rank", c_int64),
        ("scaling", c_float),
        ("y", c_void_p),
        ("u", c_void_p),
        ("dy", c_void_p),
        ("v", c_void_p),
    )


def _matrices(stored: list[Tensor], layout: list[int], numbers: list[float]) -> list[_Matrix]:
    matrices, at = [], 0
    for p in range(len(layout) // 5):
        kind, rows, cols, transposed, count = layout[5 * p : 5 * p + 5]
        tensors = stored[at : at + count]
        at += count
        for tensor in tensors:
            native.check_tensor(tensor, "a stored tensor", tensor.dtype)
        matrix = _Matrix(kind, transposed, rows, cols, tensors[0].data_ptr())
        if kind == NF4:
            name = "absmax_bytes" if tensors[1].dtype == torch.uint8 else "absmax"
            setattr(matrix, name, tensors[1].data_ptr())
            matrix.code = tensors[2].data_ptr()
            matrix.offset = numbers[2 * p]
            if count == 5:
                matrix.nested_absmax, matrix.nested_map = tensors[3].data_ptr(), tensors[4].data_ptr()
        matrices.append(matrix)
    if len({matrix.cols for matrix in matrices}) > 1:
        raise ShapeError(f"layers of a group share x; got in_features {[matrix.cols for matrix in matrices]}.")
    return matrices


def _linear(matrix: _Matrix, scaling: float, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> _Linear:
    linear = _Linear(ctypes.pointer(matrix), scaling=scaling)
    if bias is not None:
        linear.bias = native.check_tensor(bias, "bias", F32, (matrix.rows,)).data_ptr()
    if A is not None and B is not None and A.shape[0] > 0:
        linear.rank = A.shape[0]
        linear.A = native.check_tensor(A, "A", F32, (None, matrix.cols)).data_ptr()
        linear.B = native.check_tensor(B, "B", F32, (matrix.rows, A.shape[0])).data_ptr()
    return linear


def forward(x, stored, layout, numbers, bias, A, B) -> tuple[list[Tensor], list[Tensor]]:
    matrices = _matrices(stored, layout, numbers)
    native.check_tensor(x, "x", F32, (None, matrices[0].cols))
    tokens = x.shape[0]
    parts = (_Linear * len(matrices))()
    outputs, inner = [], []
    for p, matrix in enumerate(matrices):
        part = _linear(matrix, numbers[2 * p + 1], bias[p], A[p], B[p])
        outputs.append(x.new_empty(tokens, matrix.rows))
        inner.append(x.new_empty(tokens, part.rank))
        part.y, part.u = outputs[p].data_ptr(), inner[p].data_ptr()
        parts[p] = part
    call = native.entry("lt_linear_forward", c_void_p, c_int64, c_void_p, c_int, c_int)
    if tokens > 0:
        call(x.data_ptr(), tokens, ctypes.addressof(parts), len(matrices), native.threads())
    return outputs, inner


def backward_input(dys, stored, layout, numbers, A, B) -> tuple[Tensor, list[Tensor]]:
    matrices = _matrices(stored, layout, numbers)
    tokens = dys[0].shape[0]
    dx = dys[0].new_empty(tokens, matrices[0].cols)
    parts = (_Linear * len(matrices))()
    inner = []
    for p, (matrix, dy) in enumerate(zip(matrices, dys, strict=True)):
        part = _linear(matrix, numbers[2 * p + 1], None, A[p], B[p])
        part.dy = native.check_tensor(dy, "dy", F32, (tokens, matrix.rows)).data_ptr()
        inner.append(dy.new_empty(tokens, part.rank))
        part.v = inner[p].data_ptr()
        parts[p] = part
    call = native.entry("lt_linear_backward_input", c_void_p, c_int64, c_void_p, c_int, c_int)
    if tokens > 0:
        call(dx.data_ptr(), tokens, ctypes.addressof(parts), len(matrices), native.threads())
    return dx, inner


def outer(inner: Tensor, x: Tensor, scaling: float, turned: bool) -> Tensor:
    tokens, rank = inner.shape
    native.check_tensor(inner, "the inner result", F32)
    native.check_tensor(x, "x", F32, (tokens, None))
    columns = x.shape[1]
    out = x.new_empty(columns, rank) if turned else x.new_empty(rank, columns)
    if rank == 0 or tokens == 0:
        return out.zero_()
    call = native.entry("lt_outer", c_void_p, c_int64, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int, c_int)
    call(inner.data_ptr(), rank, x.data_ptr(), columns, tokens, scaling, out.data_ptr(), int(turned), native.threads())
    return out


def rows(stored, layout, numbers, ids: Tensor | None) -> Tensor:
    (matrix,) = _matrices(stored, layout, numbers)
    if matrix.transposed:
        dense = stored[0].T.to(F32)
        return dense.contiguous() if ids is None else dense[ids].contiguous()
    if ids is not None:
        native.check_tensor(ids, "ids", torch.int64, (None,))
        if ids.numel() > 0 and (int(ids.min()) < 0 or int(ids.max()) >= matrix.rows):
            raise ShapeError(f"ids must lie in [0, {matrix.rows}); got {int(ids.min())} to {int(ids.max())}.")
    count = matrix.rows if ids is None else ids.shape[0]
    out = stored[0].new_empty(count, matrix.cols, dtype=F32)
    call = native.entry("lt_dequantize_rows", c_void_p, c_void_p, c_int64, c_void_p, c_int)
    if count > 0:
        call(ctypes.addressof(matrix), 0 if ids is None else ids.data_ptr(), count, out.data_ptr(), native.threads())
    return out
