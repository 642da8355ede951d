"""Sensitivity: the metric's prediction against sums taken token by token, and what noise does against a loss taken by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.calibration import collect_moments, text_packs
from luthier.calibration.inputs import linear_layers, look_at_gradients
from luthier.calibration.sensitivity import Sensitivity, energy, loss_metric, mean_loss, measure_sensitivity
from luthier.errors import ConfigError, NumericError, ShapeError
from luthier.matrices import DenseMatrix
from luthier.models.load import load

TEXT = "Book a table for two at noon, please. The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path):
    model, tokenizer = load(str(tiny_llama))
    packs = text_packs(tokenizer, TEXT, windows=4, length=48, max_tokens=96)
    layers = linear_layers(model, None)
    supervised = sum(pack.supervised_tokens for pack in packs)
    moments = collect_moments(model, packs, gradient_weights=True)
    metrics = {name: loss_metric(moments[name], layer.out_features, supervised) for name, layer in layers.items()}
    return model, packs, metrics, supervised


def test_the_metric_is_the_sum_over_tokens(prepared) -> None:
    model, packs, metrics, supervised = prepared
    name = next(name for name in metrics if "down" in name)
    E = torch.randn(linear_layers(model, [name])[name].matrix.shape, generator=torch.Generator().manual_seed(0))
    total = 0.0

    def see(_name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        nonlocal total
        moved = x.double() @ E.double().T
        total += float((g.double().square().sum(1) * moved.square().sum(1)).sum()) / (2 * supervised * len(E))

    for pack in packs:
        look_at_gradients(model, pack, [name], see)
    assert energy(E, metrics[name]) == pytest.approx(total, rel=1e-4)


def test_noise_is_measured_as_by_hand_and_the_model_stays(prepared) -> None:
    model, packs, metrics, _ = prepared
    before = {name: layer.matrix for name, layer in linear_layers(model, None).items()}
    values = [name for name in metrics if "v_proj" in name]
    result = measure_sensitivity(model, packs, {"v": values}, metrics, rise=0.01)["v"]
    assert all(layer.matrix is before[name] for name, layer in linear_layers(model, None).items())
    assert result == measure_sensitivity(model, packs, {"v": values}, metrics, rise=0.01)["v"]

    base, rises, errors = mean_loss(model, packs), [], []
    for sign in (1, -1):
        generator = torch.Generator().manual_seed(0)
        for name in values:
            W = before[name].dequantize()
            E = torch.randn(W.shape, generator=generator)
            unit = energy(W, metrics[name]) ** 0.5 / energy(E, metrics[name]) ** 0.5
            E *= sign * result.relative_error * unit
            errors.append(energy(E, metrics[name]) / energy(W, metrics[name]))
            linear_layers(model, [name])[name].matrix = DenseMatrix(W + E)
        rises.append(mean_loss(model, packs) - base)
        for name in values:
            linear_layers(model, [name])[name].matrix = before[name]
    assert result.measured == pytest.approx(sum(rises) / 2, abs=1e-6)
    assert errors == pytest.approx([result.relative_error**2] * len(errors), rel=1e-3)
    assert result.factor == pytest.approx(max(0.1, result.measured / 0.01))
    assert Sensitivity((), 0.1, 0.01, -0.002).factor == 0.1


def test_the_layers_come_back_when_a_pass_fails(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.calibration import sensitivity

    model, packs, metrics, _ = prepared
    name = next(iter(metrics))
    before, calls = linear_layers(model, [name])[name].matrix, []

    def failing(*_: object) -> float:
        calls.append(linear_layers(model, [name])[name].matrix)
        if len(calls) == 2:
            raise RuntimeError("no")
        return 1.0

    monkeypatch.setattr(sensitivity, "mean_loss", failing)
    with pytest.raises(RuntimeError, match="no"):
        measure_sensitivity(model, packs, {"one": [name]}, metrics)
    assert calls[0] is before
    assert calls[1] is not before
    assert linear_layers(model, [name])[name].matrix is before


def test_what_is_refused(prepared) -> None:
    model, packs, metrics, _ = prepared
    name = next(iter(metrics))
    with pytest.raises(NumericError, match="the metrics of 'one' are zero"):
        measure_sensitivity(model, packs, {"one": [name]}, {name: torch.zeros_like(metrics[name])})
    with pytest.raises(ConfigError, match="'nothing' is none"):
        measure_sensitivity(model, packs, {"one": ["nothing"]}, metrics)
    with pytest.raises(ShapeError, match="per supervised token"):
        loss_metric(collect_moments(model, packs, [name])[name], 64, 0)
    with pytest.raises(ShapeError, match="tokens to predict"):
        mean_loss(model, [])
