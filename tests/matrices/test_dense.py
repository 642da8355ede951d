"""DenseMatrix: storage, orientation, products and their gradients, cached norms."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import ShapeError
from luthier.kernels.storage import DENSE_DTYPES
from luthier.matrices import DenseMatrix

MANY_ROWS = 300_000  # two blocks of BLOCK_ELEMENTS at 7 columns


def make(dtype: torch.dtype = torch.float32, transposed: bool = False, rows: int = 5, columns: int = 7) -> DenseMatrix:
    shape = (columns, rows) if transposed else (rows, columns)
    return DenseMatrix(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DENSE_DTYPES.values())
def test_products_are_those_of_the_widened_matrix(dtype: torch.dtype, transposed: bool) -> None:
    matrix = make(dtype, transposed)
    wide = (matrix.weight.T if transposed else matrix.weight).to(torch.float64)
    assert matrix.shape == (5, 7)
    assert matrix.size_bytes == 35 * dtype.itemsize
    assert torch.equal(matrix.dequantize().to(torch.float64), wide)
    x = torch.randn(2, 3, 7, requires_grad=True)
    y = matrix.matmul(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.to(torch.float64), x.to(torch.float64) @ wide.T, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad.to(torch.float64), upstream.to(torch.float64) @ wide, rtol=1e-5, atol=1e-6)
    assert matrix.weight.grad is None
    ids = torch.tensor([[4, 0], [1, 4]])
    assert torch.equal(matrix.rows(ids).to(torch.float64), wide[ids])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DENSE_DTYPES.values())
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_activations_in_16_bits_are_widened_and_never_the_whole_weight(
    half: torch.dtype, dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = make(dtype, transposed)
    wide = matrix.dequantize().double()
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).to(half).requires_grad_()
    if dtype != half:
        monkeypatch.setattr(DenseMatrix, "dequantize", lambda *_: pytest.fail("the whole weight was cast"))
    y = matrix.matmul(x, torch.ones(5))
    assert y.dtype == half
    y.sum().backward()
    torch.testing.assert_close(y.double(), x.double() @ wide.T + 1, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad.double(), wide.sum(0).expand(3, 7), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", DENSE_DTYPES.values())
def test_a_weight_that_trains_gets_gradients(dtype: torch.dtype) -> None:
    matrix = make(dtype)
    matrix.weight.requires_grad_(True)
    x = torch.randn(3, 7)
    matrix.matmul(x).sum().backward()
    torch.testing.assert_close(matrix.weight.grad, x.sum(0).expand(5, 7).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_are_exact_cached_and_follow_the_weight(transposed: bool) -> None:
    matrix = make(torch.bfloat16, transposed, rows=MANY_ROWS)
    wide = matrix.dequantize(torch.float64)
    torch.testing.assert_close(matrix.row_norms_squared(), wide.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(matrix.column_norms_squared(), wide.square().sum(0), rtol=1e-12, atol=0)
    assert matrix.row_norms_squared() is matrix.row_norms_squared()
    with torch.no_grad():
        matrix.weight.mul_(2)
    torch.testing.assert_close(matrix.row_norms_squared(), 4 * wide.square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_float32_copy_is_laid_out_the_same_and_shares_nothing(transposed: bool) -> None:
    for dtype in DENSE_DTYPES.values():
        matrix = make(dtype, transposed)
        copied = matrix.float32_copy()
        assert copied.weight.dtype == torch.float32
        assert copied.shape == matrix.shape
        assert copied.weight.shape == matrix.weight.shape
        assert copied.weight.data_ptr() != matrix.weight.data_ptr()
        assert torch.equal(copied.dequantize(), matrix.dequantize())


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"a dense matrix has two dimensions in f32, bf16 or f16; got \(3,\) torch\.float32\."):
        DenseMatrix(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"got \(2, 2\) torch\.int64"):
        DenseMatrix(torch.zeros(2, 2, dtype=torch.int64))
