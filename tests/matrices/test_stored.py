"""Matrices rounded from one storage into another: the bytes of a rounding at once, in the memory of a few rows."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import NumericError
from luthier.matrices import DenseMatrix, GGUFMatrix, NF4Matrix, converted, stored
from luthier.training.live_bytes import LiveBytes

ROWS, COLUMNS = 3000, 512


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("before", ["bf16", "q4_1"])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "q4_0", "q8_0", "q4_k"])
def test_converting_gives_what_rounding_the_whole_gives(before: str, kind: str) -> None:
    source = stored(weight(), before)
    got, expected = converted(source, kind), stored(source.dequantize(), kind)
    assert (got.kind, got.shape) == (kind, (ROWS, COLUMNS))
    theirs = dict(expected.state_dict())
    for key, tensor in got.state_dict().items():
        assert torch.equal(tensor, theirs.pop(key))
    assert not theirs


@pytest.mark.parametrize("kind", ["nf4", "q8_0"])
def test_converting_holds_a_few_rows_in_float32(kind: str) -> None:
    source = stored(weight(), "bf16")
    converted(source, kind)  # tables that are made once
    with LiveBytes() as live:
        matrix = converted(source, kind)
    assert isinstance(matrix, NF4Matrix | GGUFMatrix)
    assert matrix.size_bytes <= live.peak < 4 * ROWS * COLUMNS


@pytest.mark.parametrize("kind", ["nf4", "q8_0"])
def test_what_is_not_finite_is_named_by_its_place_in_the_whole(kind: str) -> None:
    W = weight()
    W[ROWS - 1, 7] = torch.nan
    with pytest.raises(NumericError, match=rf"\[{ROWS - 1}, 7\]"):
        converted(DenseMatrix(W.to(torch.bfloat16)), kind)
