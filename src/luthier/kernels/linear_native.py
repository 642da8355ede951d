"""The C side of `frozen_linear`: structures as in csrc/linear.h, checks, calls."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.kernels import native
from luthier.kernels.storage import KINDS, NUMBERS, Storage, storages_of

F32 = torch.float32


class Matrix(ctypes.Structure):
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


class Factors(ctypes.Structure):
    _fields_ = (("right", POINTER(Matrix)), ("left", POINTER(Matrix)), ("places", c_void_p), ("outputs", c_int64))


class _Linear(ctypes.Structure):
    _fields_ = (
        ("matrix", POINTER(Matrix)),
        ("bias", c_void_p),
        ("A", c_void_p),
        ("B", c_void_p),
        ("rank", c_int64),
        ("scaling", c_float),
        ("y", c_void_p),
        ("u", c_void_p),
        ("dy", c_void_p),
        ("v", c_void_p),
        ("factors", POINTER(Factors)),
    )


def matrices(stored: list[Tensor], layout: list[int], numbers: list[float]) -> list[Matrix]:
    """The stored matrices as C structures; they point into the tensors and are valid as long as those live.

    Whoever calls an op may pass anything, so everything is checked here: raises ShapeError as `storages_of` does, and for
    tensors that are not on the CPU or not aligned to their elements.
    """
    return [_matrix(storage) for storage in storages_of(stored, layout, numbers)]


def _matrix(s: Storage) -> Matrix:
    for tensor in s.tensors():
        if not tensor.is_cpu or tensor.data_ptr() % tensor.element_size():
            native.check_tensor(tensor, "a stored tensor", tensor.dtype)  # says which
    matrix = Matrix(KINDS.index(s.kind), s.transposed, *s.shape, s.data.data_ptr())
    if s.absmax is not None and s.code is not None:
        setattr(matrix, "absmax" if s.nested_absmax is None else "absmax_bytes", s.absmax.data_ptr())
        matrix.code, matrix.offset = s.code.data_ptr(), s.offset
    if s.nested_absmax is not None and s.nested_map is not None:
        matrix.nested_absmax, matrix.nested_map = s.nested_absmax.data_ptr(), s.nested_map.data_ptr()
    return matrix


def _linear(matrix: Matrix, scaling: float, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> _Linear:
    linear = with_small((matrix.rows, matrix.cols), scaling, bias, A, B)
    linear.matrix = ctypes.pointer(matrix)
    return linear


def with_small(shape: tuple[int, int], scaling: float, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> _Linear:
    """A layer (out_features, in_features) with its bias and term, its matrix yet to come. Raises ShapeError."""
    rows, columns = shape
    linear = _Linear(scaling=scaling)
    if bias is not None:
        linear.bias = native.check_tensor(bias, "bias", F32, (rows,)).data_ptr()
    if A is None and B is None:
        return linear
    if A is None or B is None:
        raise ShapeError("a low-rank term has both A and B; one of them is missing.")
    native.check_tensor(A, "A", F32, (None, columns))
    native.check_tensor(B, "B", F32, (rows, A.shape[0]))
    if A.shape[0] > 0:
        linear.rank, linear.A, linear.B = A.shape[0], A.data_ptr(), B.data_ptr()
    return linear


def _check_lists(count: int, **lists: list) -> None:
    """A list for each name, an element for each matrix."""
    for name, values in lists.items():
        if len(values) != count:
            raise ShapeError(f"{name} must have one element for each of {count} matrices; got {len(values)}.")


def forward(x, stored, layout, numbers, bias, A, B) -> tuple[list[Tensor], list[Tensor]]:
    group = matrices(stored, layout, numbers)
    _check_lists(len(group), bias=bias, A=A, B=B)
    native.check_tensor(x, "x", F32, (None, group[0].cols))
    tokens = x.shape[0]
    parts = (_Linear * len(group))()
    outputs, inner = [], []
    for p, matrix in enumerate(group):
        part = _linear(matrix, numbers[NUMBERS * p + 1], bias[p], A[p], B[p])
        outputs.append(x.new_empty(tokens, matrix.rows))
        inner.append(x.new_empty(tokens, part.rank))
        part.y, part.u = outputs[p].data_ptr(), inner[p].data_ptr()
        parts[p] = part
    call = native.entry("lt_linear_forward", c_void_p, c_int64, c_void_p, c_int, c_int)
    if tokens > 0:
        call(x.data_ptr(), tokens, ctypes.addressof(parts), len(group), native.threads())
    return outputs, inner


def backward_input(dys, stored, layout, numbers, A, B) -> tuple[Tensor, list[Tensor]]:
    group = matrices(stored, layout, numbers)
    _check_lists(len(group), dys=dys, A=A, B=B)
    tokens = dys[0].shape[0] if dys[0].ndim > 0 else 0
    dx = dys[0].new_empty(tokens, group[0].cols)
    parts = (_Linear * len(group))()
    inner = []
    for p, (matrix, dy) in enumerate(zip(group, dys, strict=True)):
        part = _linear(matrix, numbers[NUMBERS * p + 1], None, A[p], B[p])
        part.dy = native.check_tensor(dy, "dy", F32, (tokens, matrix.rows)).data_ptr()
        inner.append(dy.new_empty(tokens, part.rank))
        part.v = inner[p].data_ptr()
        parts[p] = part
    call = native.entry("lt_linear_backward_input", c_void_p, c_int64, c_void_p, c_int, c_int)
    if tokens > 0:
        call(dx.data_ptr(), tokens, ctypes.addressof(parts), len(group), native.threads())
    return dx, inner


def outer(inner: Tensor, x: Tensor, scaling: float, turned: bool) -> Tensor:
    tokens, rank = native.check_tensor(inner, "the inner result", F32, (None, None)).shape
    native.check_tensor(x, "x", F32, (tokens, None))
    columns = x.shape[1]
    out = x.new_empty(columns, rank) if turned else x.new_empty(rank, columns)
    if rank == 0 or tokens == 0:
        return out.zero_()
    call = native.entry("lt_outer", c_void_p, c_int64, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int, c_int)
    call(inner.data_ptr(), rank, x.data_ptr(), columns, tokens, scaling, out.data_ptr(), int(turned), native.threads())
    return out


def check_ids(ids: Tensor, rows: int) -> None:
    """Raises ShapeError for an id outside a matrix of so many rows."""
    if ids.numel() > 0 and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise ShapeError(f"ids must lie in [0, {rows}); got {int(ids.min())} to {int(ids.max())}.")


def rows(stored, layout, numbers, ids: Tensor | None) -> Tensor:
    (matrix,) = matrices(stored, layout, numbers)
    if ids is not None:
        native.check_tensor(ids, "ids", torch.int64, (None,))
        check_ids(ids, matrix.rows)
    if matrix.transposed:
        columns = stored[0] if ids is None else stored[0].index_select(1, ids)
        return columns.T.to(F32, copy=True, memory_format=torch.contiguous_format)
    count = matrix.rows if ids is None else ids.shape[0]
    out = stored[0].new_empty(count, matrix.cols, dtype=F32)
    call = native.entry("lt_dequantize_rows", c_void_p, c_void_p, c_int64, c_void_p, c_int)
    if count > 0:
        call(ctypes.addressof(matrix), 0 if ids is None else ids.data_ptr(), count, out.data_ptr(), native.threads())
    return out
