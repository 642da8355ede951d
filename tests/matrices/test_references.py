"""The 4-bit tables that NF4 is compared with: values on the table, FP4's those of bitsandbytes, NF4's error the least."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import ShapeError
from luthier.matrices import NF4Matrix
from luthier.matrices.references import TABLES, round_trip


def weight() -> torch.Tensor:
    return torch.randn(64, 200, generator=torch.Generator().manual_seed(0))


def test_nf4_is_the_matrix() -> None:
    assert torch.equal(round_trip(weight(), "nf4"), NF4Matrix.quantize(weight(), double=False).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp4_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    """In rows of whole blocks, which alone its CPU version reads right."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    wide = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = theirs.quantize_4bit(wide, blocksize=64, quant_type="fp4")
    assert torch.equal(round_trip(wide, "fp4").to(dtype), theirs.dequantize_4bit(codes, state))
    levels = theirs.get_4bit_type("fp4", device="cpu").unique()
    torch.testing.assert_close(torch.tensor(TABLES["fp4"]), levels, rtol=1e-6, atol=0)


def test_e2m1_is_a_float_of_four_bits() -> None:
    """(-1)^s 2^(e - 1) (1 + m / 2), and (-1)^s m / 2 where e is 0."""
    positive = [m / 2 if e == 0 else 2 ** (e - 1) * (1 + m / 2) for e in range(4) for m in range(2)]
    assert TABLES["e2m1"] == tuple(sorted({sign * value / 6 for sign in (-1, 1) for value in positive}))


def test_int4_rounds_to_sevenths_of_the_largest() -> None:
    assert TABLES["int4"] == tuple(step / 7 for step in (-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7))
    torch.testing.assert_close(round_trip(weight(), "int4"), _int4(weight()), rtol=1e-6, atol=0)


def _int4(values: torch.Tensor) -> torch.Tensor:
    blocks = values.double().reshape(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / step).round() * step).reshape(values.shape).float()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 47)])
def test_zero_and_ragged_weights(table: str, shape: tuple[int, int]) -> None:
    assert torch.equal(round_trip(torch.zeros(shape), table), torch.zeros(shape))
    assert torch.equal(round_trip(torch.full(shape, 0.5), table), torch.full(shape, 0.5))


def test_errors_of_normal_weights() -> None:
    """NF4's is the least; an even grid's is less than that of bitsandbytes' FP4, which has nothing between 0.005 and 0.167."""
    errors = {table: float((round_trip(weight(), table) - weight()).norm() / weight().norm()) for table in TABLES}
    assert sorted(errors, key=errors.__getitem__) == ["nf4", "e2m1", "int4", "fp4"]


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ShapeError, match="one of e2m1, fp4, int4, nf4; got 'fp8'"):
        round_trip(weight(), "fp8")
