"""Sensitivity: what an error of a weight is predicted to cost against sums in float64, and layers replaced for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.calibration import energy, mean_loss, replaced, text_packs
from luthier.calibration.inputs import linear_layers
from luthier.errors import ConfigError, ShapeError
from luthier.matrices import DenseMatrix
from luthier.models.load import load

TEXT = "Book a table for two at noon, please. The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path):
    model, tokenizer = load(str(tiny_llama))
    return model, text_packs(tokenizer, TEXT, windows=4, length=48, max_tokens=96)


def test_energy_is_the_sum_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    E, X = torch.randn(12, 20, generator=generator), torch.randn(50, 20, generator=generator)
    weights = torch.rand(50, generator=generator)
    metric = (X.double() * weights.double()[:, None]).T @ X.double()
    expected = float((weights.double() * (X.double() @ E.double().T).square().sum(1)).sum())
    assert energy(E, metric) == pytest.approx(expected, rel=1e-5)


def test_layers_are_replaced_for_a_while_and_come_back_when_a_pass_fails(prepared) -> None:
    model, packs = prepared
    name = "model.layers.0.mlp.down_proj"
    layer, before = linear_layers(model, [name])[name], mean_loss(model, packs)
    own, other = layer.matrix, DenseMatrix(-layer.matrix.dequantize())
    with replaced(model, {name: other}):
        assert layer.matrix is other
        assert mean_loss(model, packs) != before
    assert layer.matrix is own
    assert mean_loss(model, packs) == before
    with pytest.raises(RuntimeError, match="no"), replaced(model, {name: other}):
        raise RuntimeError("no")
    assert layer.matrix is own


def test_what_is_refused(prepared) -> None:
    model, _ = prepared
    with pytest.raises(ConfigError, match="'nothing' is none"), replaced(model, {"nothing": DenseMatrix(torch.ones(2, 2))}):
        pytest.fail("no layer of that name can be replaced")
    with pytest.raises(ShapeError, match="tokens to predict"):
        mean_loss(model, [])
