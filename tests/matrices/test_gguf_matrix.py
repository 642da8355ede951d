"""GGUFMatrix: numbers are exactly those of gguf.quants for every type; products, rows and norms follow from them."""

from __future__ import annotations

import copy

import gguf
import numpy as np
import pytest
import torch

from luthier.errors import ShapeError
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.matrices import GGUFMatrix
from luthier.matrices.gguf import SCALE_OFFSETS


def make(kind: str, rows: int = 7, blocks: int = 2) -> tuple[GGUFMatrix, torch.Tensor]:
    """A matrix of random blocks whose scales are finite, and what gguf.quants makes of it."""
    size = GGUF_BLOCKS[kind][1]
    data = np.random.default_rng(len(kind)).integers(0, 256, (rows, blocks, size), np.uint8)
    for at in SCALE_OFFSETS[kind]:
        data[:, :, at + 1] = data[:, :, at + 1] % 0x3C  # float16 below 1
    data = data.reshape(rows, blocks * size)
    expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()]))
    return GGUFMatrix(torch.from_numpy(data), kind), expected


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_numbers_products_rows_and_norms(kind: str) -> None:
    matrix, expected = make(kind)
    assert matrix.shape == tuple(expected.shape)
    assert matrix.size_bytes == matrix.weight.numel()
    assert torch.equal(matrix.dequantize(), expected)
    assert torch.equal(matrix.dequantize(torch.float16), expected.half())
    assert torch.equal(matrix.rows(torch.tensor([[6, 0], [0, 3]])), expected[torch.tensor([[6, 0], [0, 3]])])
    assert matrix.rows(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, expected.shape[1])
    assert torch.equal(matrix.row_range(2, 5), expected[2:5])
    assert torch.equal(matrix.float32_copy().weight, expected)
    wide = expected.double()
    torch.testing.assert_close(matrix.row_norms_squared(), wide.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(matrix.column_norms_squared(), wide.square().sum(0), rtol=1e-12, atol=0)
    x = torch.randn(5, expected.shape[1], requires_grad=True)
    y = matrix.matmul(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    size = float(expected.abs().max())
    torch.testing.assert_close(y, (x.double() @ wide.T).float(), rtol=1e-4, atol=1e-4 * size)
    torch.testing.assert_close(x.grad, (upstream.double() @ wide).float(), rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_blocks_that_are_not_finite_are_counted(kind: str) -> None:
    matrix, _ = make(kind)
    assert matrix.not_finite() == 0
    weights, size = GGUF_BLOCKS[kind]
    for number, at in enumerate(SCALE_OFFSETS[kind]):
        matrix.weight.data[number, size + at : size + at + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    assert matrix.not_finite() == weights * len(SCALE_OFFSETS[kind])
    assert int((~matrix.dequantize().isfinite()).sum()) == matrix.not_finite()


def test_blocks_stay_bytes_whatever_the_model_is_cast_to() -> None:
    matrix, expected = make("q4_1")
    assert torch.equal(copy.deepcopy(matrix).to(torch.bfloat16).dequantize(), expected)
    other, _ = make("q4_1", rows=7)
    other.weight.data.zero_()
    other.load_state_dict(matrix.state_dict())
    assert torch.equal(other.dequantize(), expected)


def test_what_is_no_block_matrix_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"q4_0 rows are whole blocks of 18 bytes, uint8; got \(3, 19\) torch\.uint8"):
        GGUFMatrix(torch.zeros(3, 19, dtype=torch.uint8), "q4_0")
    with pytest.raises(ShapeError, match=r"blocks are one of q4_0, .*; got 'q4_k_m'\. Did you mean 'q4_k'\?"):
        GGUFMatrix(torch.zeros(3, 144, dtype=torch.uint8), "q4_k_m")
