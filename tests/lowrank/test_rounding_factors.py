"""Factors in NF4: errors measured on the inputs, beside nearest rounding of the same factors and beside the dense optimum."""

from __future__ import annotations

import pytest
import torch
from oracle import layer, output_error

from luthier.errors import ShapeError
from luthier.lowrank import Factors, pivoted, projected, rebalanced, round_factors, round_pivoted
from luthier.matrices import NF4Matrix, stored


@pytest.mark.parametrize(("out", "inputs", "rank"), [(96, 128, 32), (128, 64, 24)])
def test_rounded_factors_beat_nearest_codes_and_stay_near_the_optimum(out: int, inputs: int, rank: int) -> None:
    W, X, H = layer(out, inputs, tokens=400)
    result = projected(W, H)
    factors = result.factors(rank)
    rounded = round_factors(W, H, factors)
    balanced = rebalanced(factors)
    nearest = Factors(NF4Matrix.quantize(balanced.A).dequantize(), NF4Matrix.quantize(balanced.B).dequantize())
    added = output_error(W, rounded.dequantize(), X) - result.dropped(rank)
    assert 0 < added < 0.35 * (output_error(W, nearest.product(), X) - result.dropped(rank))
    assert rounded.size_bytes == NF4Matrix.quantize(balanced.A).size_bytes + NF4Matrix.quantize(balanced.B).size_bytes
    assert rounded.dequantize().shape == W.shape


def test_the_second_factor_makes_up_for_the_first() -> None:
    W, X, H = layer(96, 128, tokens=400)
    factors = projected(W, H).factors(32)
    rounded = round_factors(W, H, factors, lambda weight, _: NF4Matrix.quantize(weight))
    once = NF4Matrix.quantize(rebalanced(factors).B).dequantize() @ rounded.right.dequantize()
    assert output_error(W, rounded.dequantize(), X) < output_error(W, once, X)


def test_rounded_pivots_beat_nearest_codes() -> None:
    W, X, H = layer(96, 128, tokens=400)
    parts = pivoted(projected(W, H).factors(48))
    rounded = round_pivoted(W, H, parts)
    nearest = NF4Matrix.quantize(parts.basis), NF4Matrix.quantize(parts.coefficients)
    plain = torch.empty_like(W)
    plain[parts.pivots] = nearest[0].dequantize()
    plain[parts.others] = nearest[1].dequantize() @ nearest[0].dequantize()
    assert output_error(W, rounded.dequantize(), X) < 0.7 * output_error(W, plain, X)
    assert rounded.size_bytes == nearest[0].size_bytes + nearest[1].size_bytes + 4 * len(W)
    assert rounded.kind == "p48/nf4,nf4"


def test_in_16_bits_pivots_are_the_optimum_itself() -> None:
    W, X, H = layer(96, 128, tokens=400)
    result = projected(W, H)
    rounded = round_pivoted(W, H, pivoted(result.factors(48)), lambda weight, _: stored(weight, "f32"))
    assert output_error(W, rounded.dequantize(), X) == pytest.approx(result.dropped(48), rel=1e-3)


def test_a_repair_stands_on_its_base() -> None:
    W, X, H = layer(96, 128, tokens=400)
    base = NF4Matrix.quantize(W)
    left = W - base.dequantize()
    repaired = round_factors(left, H, projected(left, H).factors(16), base=base)
    assert repaired.kind == "nf4+r16/nf4,nf4"
    assert output_error(W, repaired.dequantize(), X) < 0.6 * output_error(W, base.dequantize(), X)


def test_pivots_that_are_every_row_are_refused() -> None:
    W, _, H = layer(32, 128, tokens=400)
    with pytest.raises(ShapeError, match="all 32 rows are pivots"):
        round_pivoted(W, H, pivoted(projected(W, H).factors(32)))
