"""The one idea: values and gradients against float64 formulas, merging, names in state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import ShapeError
from luthier.linear import LowRankEmbedding, LowRankLinear, LowRankTerm
from luthier.matrices import DenseMatrix

IN, OUT, RANK, SCALING = 12, 9, 3, 1.75


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape)))


def make_term(seed: int = 0, magnitude: bool = False, bias: bool = False, dropout: float = 0.0) -> LowRankTerm:
    m = random(OUT, seed=seed + 3).abs() + 0.5 if magnitude else None
    b = random(OUT, seed=seed + 4) if bias else None
    return LowRankTerm(random(RANK, IN, seed=seed + 1), random(OUT, RANK, seed=seed + 2), SCALING, dropout, m, b)


def make_layer(dtype: torch.dtype = torch.float32, transposed: bool = False, **terms: LowRankTerm) -> LowRankLinear:
    weight = random(OUT, IN).to(dtype)
    layer = LowRankLinear(DenseMatrix(weight.T.contiguous() if transposed else weight, transposed), random(OUT, seed=9))
    layer.terms.update(terms)
    return layer


def wide_formula(layer: LowRankLinear, x: Tensor, parts: dict[str, dict[str, Tensor]]) -> Tensor:
    """The layer in float64 by the book: W' = W + s B A, with a magnitude m W' / |W'|_row and the norm held constant."""
    weight = layer.matrix.dequantize(torch.float64)
    y = x @ weight.T
    for part in parts.values():
        delta = SCALING * (part["lora_B"] @ part["lora_A"])
        y = y + x @ delta.T
        if "lora_B_bias" in part:
            y = y + SCALING * part["lora_B_bias"]
        if "magnitude" in part:
            y = y * part["magnitude"] / (weight + delta).norm(dim=1).detach()
    return y + layer.bias.to(torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kinds",
    [({},), ({"bias": True},), ({"magnitude": True},), ({}, {"bias": True}), ({"magnitude": True}, {})],
    ids=["lora", "bias", "dora", "two", "dora and lora"],
)
def test_values_and_gradients_equal_float64_autograd(
    kinds: tuple[dict[str, bool], ...], dtype: torch.dtype, transposed: bool
) -> None:
    layer = make_layer(dtype, transposed, **{f"t{i}": make_term(10 * i, **kind) for i, kind in enumerate(kinds)})
    x, upstream = random(2, 5, IN), random(2, 5, OUT)
    narrow_x = x.clone().requires_grad_()
    y = layer(narrow_x)
    y.backward(upstream)

    parts = {
        name: {key: p.detach().to(torch.float64).requires_grad_() for key, p in term.named_parameters()}
        for name, term in layer.terms.items()
    }
    wide_x = x.to(torch.float64).requires_grad_()
    expected = wide_formula(layer, wide_x, parts)
    expected.backward(upstream.to(torch.float64))
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(y.detach(), expected.detach(), **close)
    torch.testing.assert_close(narrow_x.grad, wide_x.grad, **close)
    for name, term in layer.terms.items():
        for key, parameter in term.named_parameters():
            torch.testing.assert_close(parameter.grad, parts[name][key].grad, **close)
    assert layer.matrix.weight.grad is None


def test_dora_with_dropout_is_pefts_formula() -> None:
    layer = make_layer(term=make_term(magnitude=True, dropout=0.3)).train()
    term, x = layer.terms["term"], random(4, IN)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.3)
    weight = layer.matrix.dequantize()
    gain = term.magnitude / (weight + term.delta()).norm(dim=1)
    expected = (
        x @ weight.T
        + (gain - 1) * (dropped @ weight.T)
        + gain * SCALING * (dropped @ term.lora_A.T @ term.lora_B.T)
        + layer.bias
    )
    torch.testing.assert_close(y, expected)
    layer.eval()
    torch.testing.assert_close(layer(x), gain * (x @ weight.T + x @ term.delta().T) + layer.bias)


def test_dora_with_dropout_scales_the_terms_before_it() -> None:
    layer = make_layer(first=make_term(bias=True), second=make_term(20, magnitude=True, bias=True, dropout=1e-9))
    x = random(4, IN)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_dropout_acts_on_the_term_alone_and_only_in_training() -> None:
    layer, x = make_layer(term=make_term(dropout=0.5)), random(64, IN)
    base = make_layer()(x)
    torch.manual_seed(0)
    first = layer.train()(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    torch.testing.assert_close(first, base + layer.terms["term"](x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("kinds", [({},), ({"magnitude": True},), ({"bias": True}, {"magnitude": True})])
def test_merged_equals_the_layer(kinds: tuple[dict[str, bool], ...]) -> None:
    layer = make_layer(torch.bfloat16, **{f"t{i}": make_term(10 * i, **kind) for i, kind in enumerate(kinds)}).eval()
    x = random(6, IN)
    weight, bias = layer.merged()
    torch.testing.assert_close(F.linear(x, weight, bias), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.bias, make_layer().bias)


def test_a_disabled_term_adds_nothing() -> None:
    layer, x = make_layer(one=make_term(), two=make_term(10, magnitude=True)), random(3, IN)
    for term in layer.terms.values():
        term.enabled = False
    assert torch.equal(layer(x), make_layer()(x))


def test_a_row_of_zeros_stays_zero_under_dora() -> None:
    layer = LowRankLinear(DenseMatrix(torch.tensor([[1.0, 1.0], [0.0, 0.0]])))
    layer.terms["term"] = LowRankTerm(torch.ones(1, 2), torch.tensor([[-1.0], [0.0]]), 1.0, magnitude=torch.ones(2))
    y = layer(torch.ones(1, 2))
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.0]]
    assert layer.merged()[0].abs().max() == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.terms["term"].parameters())


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_embedding_values_and_gradients_equal_float64_autograd(scale: float, magnitude: bool) -> None:
    vocabulary, hidden = 21, 6
    matrix = DenseMatrix(random(vocabulary, hidden).to(torch.bfloat16))
    layer = LowRankEmbedding(matrix, padding_idx=None, scale=scale)
    m = random(hidden, seed=5).abs() + 0.5 if magnitude else None
    term = LowRankTerm(random(RANK, vocabulary), random(hidden, RANK), SCALING, magnitude=m)
    layer.terms["term"] = term
    ids = torch.tensor([[3, 20, 3], [0, 7, 1]])
    upstream = random(2, 3, hidden)
    y = layer(ids)
    y.backward(upstream)

    wide = {key: p.detach().to(torch.float64).requires_grad_() for key, p in term.named_parameters()}
    weight = matrix.dequantize(torch.float64)
    table = weight + SCALING * (wide["lora_B"] @ wide["lora_A"]).T
    if magnitude:
        table = table * wide["magnitude"] / table.norm(dim=0).detach()
    expected = scale * table[ids]
    expected.backward(upstream.to(torch.float64))
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    for key, parameter in term.named_parameters():
        torch.testing.assert_close(parameter.grad, wide[key].grad, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(layer.merged()[ids] * scale, y.detach(), rtol=1e-5, atol=1e-5)


def test_the_padding_row_gets_no_gradient() -> None:
    layer = LowRankEmbedding(DenseMatrix(random(5, 4)), padding_idx=0)
    layer.terms["term"] = LowRankTerm(random(2, 5), random(4, 2), 1.0)
    layer(torch.tensor([0, 1])).sum().backward()
    grad = layer.terms["term"].lora_A.grad
    assert grad[:, 0].abs().max() == 0
    assert grad[:, 1].abs().max() > 0


def test_state_dicts_keep_the_names_of_plain_layers() -> None:
    layer = make_layer(term=make_term())
    state = layer.state_dict()
    assert sorted(state) == ["bias", "terms.term.lora_A", "terms.term.lora_B", "weight"]
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(random(2, IN)), layer(random(2, IN)))


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"A is \(r, in\) and B is \(out, r\); got \(3, 12\) and \(9, 4\)\."):
        LowRankTerm(torch.zeros(3, 12), torch.zeros(9, 4), 1.0)
