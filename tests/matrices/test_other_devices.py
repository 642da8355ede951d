"""On a device other than the CPU all storages go through the reference; `meta` stands for a GPU: it has shapes and no numbers.

An operation on tensors of two devices is an error there too, so what would be left behind on the CPU is found.
"""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.linear import LowRankEmbedding, LowRankLinear, LowRankTerm
from luthier.matrices import DenseMatrix, GGUFMatrix, Matrix, NF4Matrix

ROWS, COLUMNS = 12, 256


def make(kind: str) -> Matrix:
    if kind in GGUF_BLOCKS:
        weights, size = GGUF_BLOCKS[kind]
        return GGUFMatrix(torch.zeros(ROWS, COLUMNS // weights * size, dtype=torch.uint8), kind)
    weight = torch.zeros(ROWS, COLUMNS)
    return NF4Matrix.quantize(weight, double=kind == "nf4 double") if "nf4" in kind else DenseMatrix(weight.bfloat16())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "nf4 double", *GGUF_BLOCKS])
def test_layers_compute_where_they_are_moved_to(kind: str, dtype: torch.dtype, variant: str) -> None:
    layer = LowRankLinear(make(kind), torch.zeros(ROWS))
    magnitude = torch.ones(ROWS) if variant == "dora" else None
    layer.terms["a"] = LowRankTerm(torch.zeros(4, COLUMNS), torch.zeros(ROWS, 4), 2.0, magnitude=magnitude)
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    x = torch.zeros(5, COLUMNS, dtype=dtype, device="meta", requires_grad=True)
    y = layer(x)
    assert (y.shape, y.dtype, y.device.type) == ((5, ROWS), dtype, "meta")
    y.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in layer.terms.parameters())
    assert layer.matrix.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("kind", ["bf16", "nf4", "nf4 double", *GGUF_BLOCKS])
def test_rows_norms_and_the_reference_itself(kind: str) -> None:
    matrix = make(kind).to("meta")
    assert dequantize_reference(matrix.storage()).shape == (ROWS, COLUMNS)
    embedding = LowRankEmbedding(matrix)
    embedding.terms["a"] = LowRankTerm(torch.zeros(4, ROWS), torch.zeros(COLUMNS, 4), 1.0, magnitude=torch.ones(COLUMNS)).to(
        "meta"
    )
    assert embedding(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, COLUMNS)
    assert matrix.row_range(2, 5).shape == (3, COLUMNS)
    assert matrix.row_norms_squared().shape == (ROWS,)
