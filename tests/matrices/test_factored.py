"""A matrix in two factors: what it stands for, its products both ways and their gradients against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import linear
from luthier.errors import NumericError, ShapeError
from luthier.kernels import registry
from luthier.linear import LowRankLinear, LowRankTerm, count_numbers, outputs_of
from luthier.matrices import DenseMatrix, FactoredMatrix, NF4Matrix, stored
from luthier.matrices.factored import FactoredKind

ROWS, COLUMNS, RANK, TOKENS = 96, 64, 32, 7
KINDS = ("f32", "bf16", "f16", "nf4", "q8_0", "q4_0")
FORMS = ("plain", "repair", "pivoted")


def factored(form: str, left: str = "f32", right: str = "f32", seed: int = 0) -> FactoredMatrix:
    generator = torch.Generator().manual_seed(seed)
    R = stored(torch.randn(RANK, COLUMNS, generator=generator), right)
    if form == "pivoted":
        places = torch.randperm(ROWS, generator=generator).to(torch.int32)
        return FactoredMatrix(stored(torch.randn(ROWS - RANK, RANK, generator=generator), left), R, places=places)
    base = stored(torch.randn(ROWS, COLUMNS, generator=generator), "nf4") if form == "repair" else None
    return FactoredMatrix(stored(torch.randn(ROWS, RANK, generator=generator), left), R, base=base)


def dense(matrix: FactoredMatrix) -> Tensor:
    """W in float64 out of its parts, by the formula."""
    L, R = matrix.left.dequantize().double(), matrix.right.dequantize().double()
    W = L @ R
    if matrix.places is not None:
        return torch.cat([R, W])[matrix.places.long()]
    return W if matrix.base is None else W + matrix.base.dequantize().double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_matrix(form: str, kind: str) -> None:
    matrix = factored(form, kind, kind)
    W, x, bias = dense(matrix), torch.randn(TOKENS, COLUMNS), torch.randn(ROWS)
    torch.testing.assert_close(matrix.dequantize().double(), W, rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix.matmul(x, bias).double(), x.double() @ W.T + bias, rtol=0, atol=2e-3)
    ids = torch.tensor([[0, ROWS - 1], [5, 5]])
    torch.testing.assert_close(matrix.rows(ids).double(), W[ids], rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix.row_norms_squared(), W.square().sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_one_kernel_multiplies_with_both_factors_in_float32_alone(form: str) -> None:
    matrix = factored(form, "bf16", "nf4")
    W, x, bias = dense(matrix), torch.randn(TOKENS, COLUMNS, dtype=torch.float64), torch.randn(ROWS)
    op = next(op for op in registry.registered_ops() if op.name == "factored_linear")
    for dtype, calls, error in ((torch.float32, 1, 1e-6), (torch.float64, 0, 1e-12), (torch.bfloat16, 0, 0.02)):
        before, own = op.native_calls, x.to(dtype)
        y, expected = matrix.matmul(own, bias), own.double() @ W.T + bias
        assert (y.dtype, op.native_calls - before) == (dtype, calls)
        assert (y.double() - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kinds", [("nf4", "nf4"), ("bf16", "q8_0")])
def test_gradients_through_factors_and_a_term_on_top_are_those_of_float64(form: str, kinds: tuple[str, str]) -> None:
    layer = LowRankLinear(factored(form, *kinds), torch.randn(ROWS))
    A, B = torch.randn(4, COLUMNS), torch.randn(ROWS, 4)
    layer.terms["default"] = LowRankTerm(A, B, 0.5)
    x, dy = torch.randn(TOKENS, COLUMNS, requires_grad=True), torch.randn(TOKENS, ROWS)
    y = layer(x)
    y.backward(dy)
    x64, A64, B64 = (t.detach().double().requires_grad_() for t in (x, A, B))
    y64 = F.linear(x64, dense(layer.matrix), layer.bias.double()) + 0.5 * F.linear(F.linear(x64, A64), B64)
    y64.backward(dy.double())
    term = layer.terms["default"]
    for got, expected in ((y, y64), (x.grad, x64.grad), (term.lora_A.grad, A64.grad), (term.lora_B.grad, B64.grad)):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 1e-5
    assert all(parameter.grad is None for parameter in layer.matrix.parameters())


def test_layers_that_share_a_right_factor_multiply_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stored(torch.randn(RANK, COLUMNS), "bf16")
    layers = [LowRankLinear(FactoredMatrix(stored(torch.randn(rows, RANK), "nf4"), right)) for rows in (96, 32, 32)]
    layers.append(LowRankLinear(DenseMatrix(torch.randn(8, COLUMNS))))
    x = torch.randn(TOKENS, COLUMNS)
    alone = [layer(x) for layer in layers]
    calls = []
    whole = DenseMatrix.matmul
    monkeypatch.setattr(DenseMatrix, "matmul", lambda self, *rest: (calls.append(self), whole(self, *rest))[1])
    together = outputs_of(layers, x)
    assert calls.count(right) == 1
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_merging_a_term_adds_it_to_the_product() -> None:
    layer = LowRankLinear(factored("repair", "bf16", "bf16"))
    layer.terms["default"] = LowRankTerm(torch.randn(4, COLUMNS), torch.randn(ROWS, 4), 2.0)
    merged, _ = layer.merged()
    torch.testing.assert_close(merged.double(), dense(layer.matrix) + layer.terms["default"].delta(), rtol=0, atol=1e-4)


def test_the_state_dict_goes_back_into_a_layer_of_the_same_kind() -> None:
    for form in FORMS:
        one, other = (nn.ModuleDict({"q": LowRankLinear(factored(form, "nf4", "bf16", seed))}) for seed in (0, 1))
        state = one.state_dict()
        names = {key.split(".")[1] for key in state}
        assert names == {"left", "right"} | {"plain": set(), "repair": {"weight"}, "pivoted": {"places"}}[form]
        other.load_state_dict(state)
        assert torch.equal(one["q"].matrix.dequantize(), other["q"].matrix.dequantize())


def test_numbers_are_those_of_the_factors_and_kinds_say_how_they_are_stored() -> None:
    layer = nn.ModuleList([LowRankLinear(factored("plain", "nf4", "bf16"))])
    assert count_numbers(layer) == RANK * (ROWS + COLUMNS)
    expected = {"plain": "r32/nf4,bf16", "repair": "nf4+r32/nf4,bf16", "pivoted": "p32/nf4,bf16"}
    for form in FORMS:
        matrix = factored(form, "nf4", "bf16")
        assert matrix.kind == expected[form]
        assert str(FactoredKind.parse(matrix.kind)) == matrix.kind
        parts = [matrix.left, matrix.right, *([matrix.base] if matrix.base else [])]
        assert matrix.size_bytes == sum(part.size_bytes for part in parts) + (4 * ROWS if form == "pivoted" else 0)
    for text in ("r0/bf16,bf16", "r8/bf17,bf16", "nf4+p8/bf16,bf16", "r8/bf16", "nf4", "r8/bf16,bf16 "):
        assert FactoredKind.parse(text) is None


def test_parts_that_do_not_fit_are_refused() -> None:
    L, R = DenseMatrix(torch.zeros(8, 4)), DenseMatrix(torch.zeros(5, 6))
    with pytest.raises(ShapeError, match=r"factors are \(out, rank\) and \(rank, in\); got \(8, 4\) and \(5, 6\)"):
        FactoredMatrix(L, R)
    R = DenseMatrix(torch.zeros(4, 6))
    with pytest.raises(ShapeError, match="what factors are added to"):
        FactoredMatrix(L, R, base=DenseMatrix(torch.zeros(6, 8)))
    with pytest.raises(ShapeError, match=r"places lie in \[0, 12\)"):
        FactoredMatrix(L, R, places=torch.tensor([0, 12], dtype=torch.int32))
    with pytest.raises(ShapeError, match="places are int32"):
        FactoredMatrix(L, R, places=torch.tensor([0, 1]))


def test_rounding_refuses_what_a_storage_cannot_hold() -> None:
    with pytest.raises(ShapeError, match="a matrix is rounded to"):
        stored(torch.zeros(4, 32), "q3_k")
    with pytest.raises(NumericError, match="rounded to f16"):
        stored(torch.full((4, 4), 1e6), "f16")
    assert isinstance(stored(torch.ones(4, 64), "nf4"), NF4Matrix)


def test_rank_one_and_one_token_work() -> None:
    matrix = FactoredMatrix(stored(torch.randn(5, 1), "bf16"), stored(torch.randn(1, 3), "bf16"))
    x = torch.randn(1, 3)
    torch.testing.assert_close(matrix.matmul(x), x @ matrix.dequantize().T)
    assert linear.right_factor(LowRankLinear(matrix)) is matrix.right
