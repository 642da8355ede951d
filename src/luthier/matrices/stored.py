"""A matrix of numbers rounded into one of the storages."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import NumericError, ShapeError, nearest
from luthier.kernels.quantize import quantize_gguf
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS, KINDS
from luthier.matrices.dense import DenseMatrix
from luthier.matrices.frozen import FrozenMatrix, StoredMatrix
from luthier.matrices.gguf import GGUFMatrix
from luthier.matrices.nf4 import CONVERTED_ELEMENTS, NF4Matrix

ROUNDED_KINDS = (*DENSE_DTYPES, "nf4", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k")


def stored(weight: Tensor, kind: str) -> StoredMatrix:
    """weight (out_features, in_features), float32 and finite, each number rounded to the nearest that `kind` has there.

    Raises ShapeError for a kind that nothing here rounds to, or rows that are not whole blocks; NumericError for NaN, Inf,
    and numbers that float16 cannot hold.
    """
    if kind not in ROUNDED_KINDS:
        raise ShapeError(f"a matrix is rounded to {', '.join(ROUNDED_KINDS)}; got {kind!r}.{nearest(kind, list(KINDS))}")
    weight = weight.detach().to(torch.float32).contiguous()
    if kind == "nf4":
        return NF4Matrix.quantize(weight)
    if kind not in DENSE_DTYPES:
        return GGUFMatrix(quantize_gguf(weight, kind.upper()), kind)
    dense = weight.to(DENSE_DTYPES[kind])
    if not bool(torch.isfinite(dense).all()):
        raise NumericError(f"a matrix must be finite as it is stored; rounded to {kind}, it is not.")
    return DenseMatrix(dense)


def converted(matrix: FrozenMatrix, kind: str) -> StoredMatrix:
    """`stored(matrix.dequantize(), kind)`; where `kind` has fewer than 16 bits, a few rows in float32 at a time."""
    if kind == "nf4":
        return NF4Matrix.converted(matrix)
    if kind in DENSE_DTYPES:
        return stored(matrix.dequantize(), kind)
    (rows, columns), (width, size) = matrix.shape, GGUF_BLOCKS[kind]
    blocks = torch.empty(rows, columns // width * size, dtype=torch.uint8)
    try:
        for start, some in matrix.row_blocks(CONVERTED_ELEMENTS):
            blocks[start : start + len(some)] = quantize_gguf(some, kind.upper())
    except NumericError:
        return stored(matrix.dequantize(), kind)  # which names its place in the whole
    return GGUFMatrix(blocks, kind)
