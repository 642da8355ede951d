"""The 4-bit tables that NF4 is compared with: values on the table, FP4's those of bitsandbytes, errors in QLoRA's order."""

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


def test_fp4_values_are_those_of_bitsandbytes() -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    codes, state = theirs.quantize_4bit(weight(), blocksize=64, quant_type="fp4")
    different = round_trip(weight(), "fp4") != theirs.dequantize_4bit(codes, state)
    assert different.float().mean() < 0.05  # bitsandbytes rounds FP4 by a table of thresholds of its own
    levels = theirs.get_4bit_type("fp4", device="cpu").unique()
    torch.testing.assert_close(torch.tensor(TABLES["fp4"]), levels, rtol=1e-6, atol=0)


def test_normal_weights_lose_least_in_nf4_and_most_in_int4() -> None:
    errors = {table: float((round_trip(weight(), table) - weight()).norm() / weight().norm()) for table in TABLES}
    assert errors["nf4"] < errors["int4"]
    assert errors["nf4"] < errors["fp4"]


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ShapeError, match="one of fp4, int4, nf4; got 'fp8'"):
        round_trip(weight(), "fp8")
