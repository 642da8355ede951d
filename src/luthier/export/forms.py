"""How a merged matrix is stored: a dense dtype, NF4, or the blocks of a GGUF type; and what each of them takes."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantize
from torch import Tensor

from luthier.errors import NumericError
from luthier.kernels.quantize import quantize_gguf
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS
from luthier.matrices import DenseMatrix, GGUFMatrix, Matrix, NF4Matrix

DENSE = tuple(DENSE_DTYPES)
MERGED_KINDS = (*DENSE, "nf4")
# Of a GGUF file made from a GGUF base: what no term changes keeps its blocks.
AS_IS = "asis"
GGUF_KINDS = (*DENSE, "q8_0", "q6_k", "q4_k", "q4_1", "q4_0")
# What llama.cpp takes where a row is no whole number of a type's blocks, and where that is none either.
NARROWER_BLOCKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
ANY_ROW = "f16"
F16_LARGEST = torch.finfo(torch.float16).max
# Kinds that only the gguf package quantises; rows at a time, for it works in float32.
BY_PACKAGE = ("q5_0", "q5_1")
PACKAGE_ROWS = 1024


def fitting_kind(kind: str, columns: int) -> str:
    """The kind in which rows of `columns` weights can be stored where `kind` was asked for."""
    for wanted in (kind, NARROWER_BLOCKS.get(kind, ANY_ROW)):
        if wanted not in GGUF_BLOCKS or columns % GGUF_BLOCKS[wanted][0] == 0:
            return wanted
    return ANY_ROW


def changed_kind(kind: str) -> str:
    """The kind in which a matrix that was stored as `kind` is stored once a term has changed it: blocks become q8_0.

    Its weights lie on the grid of its blocks: put back onto the same grid, a change of less than half a step is gone.
    """
    return kind if kind in DENSE else "q8_0"


def as_kind(weight: Tensor, kind: str, name: str) -> Matrix:
    """`weight` (rows, columns), float32, stored as `kind`. name: for errors.

    Raises NumericError where it holds NaN or Inf, or numbers that float16 or a block's float16 scale cannot hold.
    """
    try:
        if kind in DENSE:
            return DenseMatrix(_dense(weight, kind))
        if kind == "nf4":
            return NF4Matrix.quantize(weight)
        if kind in BY_PACKAGE:
            return GGUFMatrix(_by_package(weight, kind), kind)
        return GGUFMatrix(quantize_gguf(weight.contiguous(), kind.upper()), kind)
    except NumericError as error:
        raise NumericError(f"{name}: {error}") from error


def dense(weight: Tensor, kind: str, name: str) -> Tensor:
    """Any tensor in the dtype that `kind` names. Raises NumericError where that cannot hold it."""
    try:
        return _dense(weight, kind)
    except NumericError as error:
        raise NumericError(f"{name}: {error}") from error


def size_bytes(shape: tuple[int, ...], kind: str) -> int:
    """What a tensor of that shape takes stored as `kind`; NF4 with double quantisation."""
    numbers = math.prod(shape)
    if kind in DENSE_DTYPES:
        return numbers * DENSE_DTYPES[kind].itemsize
    if kind == "nf4":
        return -(-numbers // 2) + -(-numbers // 64) + 4 * -(-numbers // (64 * 256)) + 4 * (16 + 256)
    weights, block_bytes = GGUF_BLOCKS[kind]
    return numbers // weights * block_bytes


def ggml_kind(kind: str) -> GGMLQuantizationType:
    """The number that GGUF files know a kind by."""
    return GGMLQuantizationType[kind.upper()]


def matrix_bytes(matrix: Matrix) -> np.ndarray:
    """What a GGUF file holds of the matrix, uint8 (rows, bytes a row)."""
    weight = matrix.weight.detach()
    if isinstance(matrix, DenseMatrix):
        weight = matrix.oriented().contiguous()
    return weight.view(torch.uint8).reshape(matrix.shape[0], -1).numpy()


def _dense(weight: Tensor, kind: str) -> Tensor:
    result = weight.to(DENSE_DTYPES[kind])
    if not bool(result.isfinite().all()):
        if not bool(weight.isfinite().all()):
            raise NumericError("merged weights must be finite; NaN or Inf was found. Use an earlier checkpoint.")
        largest = weight.abs().max().item()
        raise NumericError(f"{kind} holds numbers up to {F16_LARGEST:.0f}; the largest is {largest:.4g}. Try bf16 or f32.")
    return result


def _by_package(weight: Tensor, kind: str) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise NumericError("merged weights must be finite; NaN or Inf was found. Use an earlier checkpoint.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a block of zeros divides by its scale
        parts = [gguf_quantize(rows.numpy(), ggml_kind(kind)) for rows in weight.split(PACKAGE_ROWS)]
    return torch.from_numpy(np.concatenate(parts))
