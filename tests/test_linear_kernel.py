"""LowRankLinear over every storage: F.linear's semantics, and the surroundings it must work in."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier import kernels
from luthier.kernels import native
from luthier.kernels.quantize import quantize_gguf
from luthier.kernels.registry import registered_ops
from luthier.linear import LowRankLinear, LowRankTerm, count_numbers, joined, row_norms
from luthier.matrices import DenseMatrix, GGUFMatrix, NF4Matrix

IN, OUT, RANK = 64, 24, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


STORAGES = {
    "f32": lambda weight: DenseMatrix(weight),
    "bf16": lambda weight: DenseMatrix(weight.bfloat16()),
    "f16 transposed": lambda weight: DenseMatrix(weight.T.half(), transposed=True),
    "nf4": lambda weight: NF4Matrix.quantize(weight, double=False),
    "nf4 double": lambda weight: NF4Matrix.quantize(weight),
    "q4_1": lambda weight: GGUFMatrix(quantize_gguf(weight, "Q4_1"), "q4_1"),
    "q8_0": lambda weight: GGUFMatrix(quantize_gguf(weight, "Q8_0"), "q8_0"),
}


def make(storage: str, terms: int = 1, **settings) -> LowRankLinear:
    layer = LowRankLinear(STORAGES[storage](random(OUT, IN)), random(OUT, seed=3))
    for i in range(terms):
        A, B = random(RANK + i, IN, seed=i), random(OUT, RANK + i, seed=i)
        layer.terms[f"t{i}"] = LowRankTerm(A, B, 0.5 + i, **settings)
    return layer


def expected(layer: LowRankLinear, x: Tensor) -> Tensor:
    weight = layer.matrix.dequantize(torch.float64) + sum(term.delta().double() for term in layer.terms.values())
    shift = sum(t.scaling * t.lora_B_bias.double() for t in layer.terms.values() if t.lora_B_bias is not None)
    return F.linear(x.double(), weight, layer.bias.double() + shift)


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    size = float(wanted.detach().abs().max())
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("storage", STORAGES)
def test_values_and_gradients_for_any_shape_and_layout_of_x(storage: str, terms: int) -> None:
    layer = make(storage, terms, lora_B_bias=random(OUT, seed=8) if terms else None)
    for x in (random(IN), random(3, IN), random(2, 3, IN), random(IN, 5).T, random(4, 2 * IN)[:, ::2], random(2, 1, 3, IN)):
        x = x.detach().requires_grad_()
        y = layer(x)
        wide = x.detach().double().requires_grad_()
        wanted = expected(layer, wide)
        assert y.shape == wanted.shape
        assert_close(y.detach(), wanted.detach())
        upstream = random(*y.shape, seed=5)
        y.backward(upstream)
        wanted.backward(upstream.double())
        assert_close(x.grad, wide.grad)
        for term in layer.terms.values():
            term.zero_grad()


@pytest.mark.parametrize("storage", STORAGES)
def test_no_rows_and_no_gradients(storage: str) -> None:
    layer = make(storage)
    for shape in ((0, IN), (2, 0, IN)):
        x = torch.empty(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], OUT)
        y.sum().backward()
        assert x.grad.shape == shape
    x = random(3, IN)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = layer(x)
        assert not y.requires_grad
        assert_close(y, expected(layer, x))


@pytest.mark.parametrize("storage", STORAGES)
def test_terms_train_alike_with_and_without_recomputation(storage: str) -> None:
    gradients = []
    for recomputed in (False, True):
        layer, x = make(storage, 2), random(6, IN).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.terms.parameters())])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("storage", STORAGES)
def test_autocast(storage: str) -> None:
    layer, x = make(storage, 2), random(6, IN)
    with torch.autocast("cpu", torch.bfloat16):
        for start in (x, x.bfloat16()):
            y = layer(start.requires_grad_())
            assert y.dtype == start.dtype
            assert_close(y.detach(), expected(layer, x).detach(), 5e-2)
            y.float().sum().backward()
    assert layer.terms["t0"].lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("storage", STORAGES)
def test_copies_and_state_dicts(storage: str) -> None:
    layer, x = make(storage, 2), random(3, IN)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.terms["t0"].lora_A.zero_()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert count_numbers(layer) == OUT * IN + OUT + sum(parameter.numel() for parameter in layer.terms.parameters())


@pytest.mark.parametrize("storage", STORAGES)
def test_dora_starts_where_the_base_is_and_merges(storage: str) -> None:
    layer, x = make(storage, 0), random(5, IN)
    base = layer(x)
    term = LowRankTerm(random(RANK, IN), torch.zeros(OUT, RANK), 2.0)
    term.magnitude = torch.nn.Parameter(row_norms(layer.matrix, term))
    layer.terms["dora"] = term
    assert_close(layer(x).detach(), base)
    with torch.no_grad():
        term.lora_B.normal_()
        term.magnitude.mul_(1.5)
    weight, bias = layer.merged()
    assert_close(F.linear(x, weight, bias), layer(x).detach())


def test_dropout_takes_a_term_out_of_the_kernel_only_while_it_trains() -> None:
    term = LowRankTerm(random(RANK, IN), random(OUT, RANK), 1.0, dropout=0.5)
    assert not term.train().is_fused
    assert term.eval().is_fused


def test_terms_are_joined_into_one() -> None:
    terms = [LowRankTerm(random(r, IN, seed=r), random(OUT, r, seed=r), 0.5 * r) for r in (1, 3)]
    one = joined(terms)
    assert one is not None
    assert one.A.shape == (4, IN)
    torch.testing.assert_close(one.scaling * one.B @ one.A, sum(term.delta() for term in terms))
    assert joined([]) is None


def test_a_weight_that_trains_goes_through_plain_torch() -> None:
    layer, x = make("f32", 1), random(3, IN)
    layer.matrix.weight.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.matrix.weight.grad, x.sum(0).expand(OUT, IN))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_frozen_product_is_the_native_kernels(storage: str) -> None:
    if kernels.active().mode != "native":
        pytest.skip("the compiled library is not installed")
    op = next(op for op in registered_ops() if op.name == "frozen_linear")
    layer, x = make(storage), random(3, IN)
    before = op.native_calls
    y = layer(x)
    assert op.native_calls == before + 1
    with native.forced("reference"):
        assert_close(layer(x).detach(), y.detach())
